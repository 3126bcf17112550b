"""`fedlora report`: the page of one run."""

import time
from collections.abc import Iterator
from html import escape
from importlib.metadata import version
from pathlib import Path

import yaml

from fedlora.record import Record
from fedlora.reports import baselines, meaning, page, paper
from fedlora.reports.comparison import Comparison
from fedlora.reports.console import size, span
from fedlora.reports.covered import Covered
from fedlora.reports.figures import figures
from fedlora.reports.spread import among_clients, by_label, like_minded, named_clients
from fedlora.reports.tables import Table

NAME, SHARED = "report.html", "share.html"


def report(
    run: Record | str | Path, out: str | Path | None = None, drawn: str | Path | None = None, share: bool = False
) -> Path:
    """Write the page of a run, one HTML file that opens offline.

    Args:
        run: in whatever state it is, or its folder; what it lacks is said.
        out: the file, by default `report.html` in the run folder, or `share.html`.
        drawn: a folder for its charts as SVG, PDF and PNG, as wide as a column of a paper; None: none are drawn.
        share: leave out what epsilon does not cover, all but the figures of the test rows.

    Returns:
        The page.

    Raises:
        UserError: there is no run, it has no privacy and is to be shared, or the file cannot be written.
    """
    run = run if isinstance(run, Record) else Record.open(run)
    run = Covered.of(run) if share else run
    page.save(html(run), file := Path(out) if out else run.folder / (SHARED if share else NAME))
    if drawn is not None:
        paper.draw((figure for part in figures(run).values() for figure in part), drawn)
    return file


def html(run: Record) -> str:
    """The page of a run."""
    summary, scenario = run.summary, run.scenario
    strategy = str(scenario.get("strategy", {}).get("use", "unknown strategy"))
    clients, seed, shared = scenario.get("clients", {}), scenario.get("seed", "?"), isinstance(run, Covered)
    made = page.Page(
        str(scenario.get("name", run.folder.name)),
        f"fedlora · run report · {strategy}",
        f"{scenario.get('model', {}).get('base', 'A model')} fine-tuned by {clients.get('total', '?')} clients "
        f"with {strategy}{'' if shared else f', seed {seed}'}.",
    )
    made.notices(run.remarks())
    made.key_figures(_key_figures(run))
    if scenario.get("privacy"):
        made.section("What epsilon means here", *_meaning(run, shared))
    found = figures(run)
    beside = [] if shared else baselines.beside(run)  # those that are pooled are not private
    told = [f"<p>{escape(said)}</p>" for said in Comparison([run, *beside]).sentences]
    learnt = made.figures(found["learning"]) or "<p>No round was measured yet.</p>"
    made.section("What was learnt", *told, *_parts(run), learnt, *by_label(run))
    made.section("What privacy it keeps", *_privacy(run), made.figures(found["privacy"]))
    if not shared:
        made.section(
            "Who took part",
            *_clients(run),
            *named_clients(run),
            *among_clients(run),
            *like_minded(run),
            made.figures(found["clients"]),
            *_failures(run),
        )
        made.section("What it cost", made.figures(found["cost"]) or "<p>No round is recorded yet.</p>")
    made.section("What was run", *_settings(run))
    wrote = summary.get("versions", {}).get("fedlora", run.introduced_by or "an unknown version")
    ended = "a site's part" if run.at_site else f"ended {summary.get('finished', 'not yet')}"
    return made.render(
        f"Run by fedlora {wrote}, {ended}; page by fedlora {version('fedlora')}, "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC."
    )


def _key_figures(run: Record) -> Iterator[tuple[str, str, str]]:
    rounds, summary, metric = run.rounds, run.summary, run.metric
    measured = [line for line in rounds if line.get(metric) is not None]
    kept = run.best_round
    value = measured[-1][metric] if measured and kept is None else summary.get(metric)
    best = (max if run.higher_is_better else min)((line[metric] for line in measured), default=None)
    held_out = (
        f"on {summary['test_examples']:,} test examples" if "test_examples" in summary else "on the test set"
    )
    if run.majority is not None:
        always = "of which" if run.metric == "accuracy" else "where always saying"
        held_out += f", {always} the commonest label is {run.majority:.4f}"
    if kept is not None:
        held_out, best = f"{held_out}, after round {kept}, which validation rows chose", value
    yield (
        metric.capitalize(),
        "–" if value is None else f"{value:.4f}",  # noqa: RUF001
        held_out if best is None or best == value else f"{held_out}; best {best:.4f}",
    )
    spent = [line["epsilon"] for line in rounds if line.get("epsilon") is not None]
    asked = run.scenario.get("privacy") or {}
    if spent:
        whose = f"for each {run.protects}{', the largest over clients' * (run.protects != 'client')}"
        yield "Epsilon", f"{max(spent):.2f}", f"at delta {asked.get('delta', '?')}, {whose}"
        if (own := summary.get("own_epsilon")) is not None:
            yield "Epsilon by own noise", f"{own:.2f}", "of a client's own part of the noise alone; the largest"
        elif (seen := summary.get("server_epsilon")) is not None:
            yield "Epsilon from the server", f"{seen:.2f}", "which sees each round's sum; the largest over clients"
    elif asked:
        yield "Epsilon", "unbounded", "the noise is too little for any, or nobody trained"
    else:
        yield "Epsilon", "none", "nothing was clipped or noised"
    if isinstance(run, Covered):
        yield "Rounds", f"{len(rounds)}", f"of {run.scenario.get('rounds', '?')}"
        return
    for way in ("up", "down"):
        total = sum(line.get(f"bytes_{way}", 0) for line in rounds)
        yield f"Sent {way}", size(total), "by clients" if way == "up" else "to clients"
    yield "Rounds", f"{len(rounds)}", f"of {run.scenario.get('rounds', '?')}"
    failed = sum(line.get("failures", 0) for line in rounds)
    yield "Failures", f"{failed}", "of clients, over all rounds"
    if rounds and (clock := rounds[-1].get("virtual_seconds")) is not None:
        late = sum(line.get("late", 0) for line in rounds)
        yield "Virtual time", f"{clock / 3600:.2f} h", f"by the clock of the devices; {late} were late or vanished"
    yield "Time", span(sum(line.get("seconds", 0.0) for line in rounds)), "of rounds, as minutes:seconds"


def _parts(run: Record) -> Iterator[str]:
    """The model of each rank, and the layers that a probe chose."""
    if prefixes := run.summary.get("prefixes"):
        names = [key for key in (run.metric, "loss") if key in next(iter(prefixes.values()))]
        rows = [
            [rank, *("–" if (v := told[n]) is None else f"{v:.4f}" for n in names)]  # noqa: RUF001
            for rank, told in prefixes.items()
        ]
        yield "<p>One adapter was trained by clients of several ranks. Cut to a rank, it is a model for these.</p>"
        yield Table(("rank", *names), rows).html("The model of each rank")
    if layers := run.summary.get("layers"):
        yield f"<p>After a probe {len(layers)} layers trained: {escape(', '.join(layers))}.</p>"


def _meaning(run: Record, shared: bool) -> Iterator[str]:
    yield from (f"<p>{escape(said)}</p>" for said in meaning.explained(run))
    items = "".join(f"<li>{escape(said)}</li>" for said in meaning.not_covered(run, shared))
    yield f"<h3>What it does not cover</h3><ul>{items}</ul>"
    yield (
        '<p class="note">Who is promised what, against whom, and how it is checked: <code>docs/privacy.md</code> '
        "in fedlora's sources, which is the page “Privacy” of its documentation.</p>"
    )


def _privacy(run: Record) -> Iterator[str]:
    words = run.summary.get("privacy")
    if words is None and run.scenario.get("privacy"):
        known = (
            f"what the site's {run.protects}s lost in it"
            if run.at_site
            else "the run has not ended; what it spent so far"
        )
        words = f"{known} is below"
    words = str(words or "none: no gradient was clipped or noised")
    first, _, rest = words.partition("; ")
    yield f'<p class="promise">{escape(first[0].upper() + first[1:])}.</p>'
    yield "".join(f"<p>{escape(part[0].upper() + part[1:])}.</p>" for part in rest.split("; ") if part)


def _clients(run: Record) -> Iterator[str]:
    holders = run.partitions.get("clients", [])
    held, persons = ([c[f"num_{what}"] for c in holders if f"num_{what}" in c] for what in ("examples", "persons"))
    asked = run.scenario.get("clients", {})
    if held:
        of = f" of {min(persons):,} to {max(persons):,} persons" if persons else ""
        yield (
            f"<p>{len(held)} clients hold {sum(held):,} examples, from {min(held):,} to {max(held):,} each{of}; "
            f"{asked.get('per_round') or len(held)} take part in a round.</p>"
        )
    private = run.scenario.get("privacy") and not run.scenario["privacy"].get("share_metrics")
    if private:
        yield (
            "<p>Losses and accuracies of single clients are not shown: they are computed from private rows "
            "and stayed with the clients. <code>privacy.share_metrics</code> would let them out, and epsilon does "
            "not cover them.</p>"
        )


def _failures(run: Record) -> Iterator[str]:
    failed = [line for line in run.clients if line.get("error")]
    yield "<h3>Failures</h3>"
    if not failed:
        yield "<p>No client failed.</p>"
        return
    rows = [[str(line["client"]), str(line["round"]), str(line["error"])] for line in failed[:200]]
    left = f", the first 200 of {len(failed)}" if len(failed) > 200 else ""
    told = Table(("client", "round", "what went wrong"), rows, frozenset({2})).html(f"Clients that failed{left}")
    yield page.scrolled(told, "Failures")


def _settings(run: Record) -> Iterator[str]:
    if isinstance(run, Covered):
        text = yaml.safe_dump(dict(run.scenario), sort_keys=False, allow_unicode=True)
        yield "<p>What was trained and promised, with every default; not which files, and not the seed.</p>"
    else:
        text = (run.folder / "scenario.yaml").read_text(encoding="utf-8")
        yield (
            "<p>The scenario with every default written out; <code>fedlora simulate</code> takes it as it is.</p>"
        )
    yield f'<pre tabindex="0" role="region" aria-label="Scenario"><code>{escape(text)}</code></pre>'
    if versions := run.summary.get("versions"):
        yield Table(("package", "version"), [[k, str(v)] for k, v in versions.items()], frozenset({0, 1})).html(
            "Versions"
        )
