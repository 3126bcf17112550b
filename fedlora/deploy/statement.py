"""`fedlora site report`: one page for the owner of a site: what was spent, by whom, on what, and what was refused.

It is made of the site file, the rows, the account and the record of what was asked. It loads no model, and can be
made beside a worker. It holds exact counts of the rows: it stays with their owner.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.deploy import history
from fedlora.deploy.account import STATISTIC
from fedlora.deploy.checking import SiteChecked, Spent, check
from fedlora.deploy.figures import FIGURES
from fedlora.deploy.site import Budget, Site, load
from fedlora.deploy.state import RUN, State
from fedlora.deploy.surveyed import SURVEY
from fedlora.errors import UserError, counted
from fedlora.privacy import accounting, ledger, wording
from fedlora.privacy.accounting import Event
from fedlora.record import Record
from fedlora.reports import page
from fedlora.reports.charts import Figure, Row, lines
from fedlora.reports.tables import Table

NAME = "report.html"
_DAY = 86400  # seconds
_MOST = 200  # refusals on a page
_NOBODY = "not signed"
_SERVED = (history.ANSWERED, history.AGAIN)
_ASKED = (history.INTRODUCTION, history.ROUND, history.FIGURES)

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Ran:
    """A run that a site took part in.

    Attributes:
        key: its name.
        scenario: its scenario's name, where that is known.
        submitter: who signed it.
        events: what it cost, in the site's account.
        rounds: how many of these are of a round.
        said: what is known of its end.
    """

    key: str
    scenario: str
    submitter: str
    events: Sequence[Event]
    rounds: int
    said: str


def report(file: Path, out: Path | None = None) -> Path | None:
    """Write the page of a site; gives its file, or None where nothing was asked of it and no file is named.

    Args:
        file: the site's YAML file.
        out: where the page comes, by default `report.html` in the state folder.

    Raises:
        UserError: the site file is wrong, a record of the site is damaged, or the page cannot be written.
    """
    made, site = html(file), load(file)
    if out is None and not site.folder.is_dir():
        return None
    page.save(made, place := out or site.folder / NAME)
    return place


def html(file: Path) -> str:
    """The page of a site.

    Raises:
        UserError: as for `report`.
    """
    site, found = load(file), check(file)
    if any(problem.startswith(str(site.folder / "ledger")) for problem in found.problems):
        raise UserError(*found.problems)
    told = history.read(site.folder / history.NAME)
    ran = [*runs(site, told)]
    made = page.Page(
        site.name,
        "fedlora · a site's own report",
        f"What was asked of the rows of {site.name}, who asked, and what it cost. For their owner alone.",
    )
    made.notices([*found.problems, *found.notes])
    made.key_figures(_key_figures(found, ran, told))
    cap = site.privacy
    made.section("What was spent", *_spent(cap, ran), made.figures([*_by_time(cap, told)]))
    made.section("Which runs", *_runs(cap, ran))
    made.section("What was refused", *_refused(told))
    made.section("The rows", *_rows(found))
    made.section("What a run may do here", f"<ul>{''.join(f'<li>{escape(r)}</li>' for r in found.rules)}</ul>")
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return made.render(f"Page by fedlora {version('fedlora')}, {now} UTC. Exact counts of rows: keep it here.")


def runs(site: Site, told: Sequence[Line]) -> Iterator[Ran]:
    """The runs that a site took part in, in the order in which they came.

    Args:
        site: whose.
        told: the record of what was asked.

    Raises:
        UserError: a record is damaged.
    """
    paid: dict[str, list[dict[str, Any]]] = {}
    file = site.folder / "ledger" / "privacy.jsonl"
    for line in ledger.read(file, torn=True) if file.exists() else ():
        paid.setdefault(str(line.get("run")), []).append(line)
    answered = [line for line in told if line["outcome"] in _SERVED and line["what"] in _ASKED]
    known: dict[str, Line] = {line["run"]: line for line in answered}  # the last of each
    for key in dict.fromkeys([*paid, *known]):
        last, own, said = known.get(key, {}), paid.get(key, []), _ended(State(site.folder), key)
        taken = [line for line in own if STATISTIC in line]
        beside = [line for line in own if not line["round"] and line not in taken]
        said += "; gave a statistic of the rows before its first round" if taken else ""
        if beside and RUN.fullmatch(key):
            said += f"; trained further here by {counted(sum(line['steps'] for line in beside), 'step')}"
        whose = last.get("submitter") or _NOBODY
        named = "unknown" if RUN.fullmatch(key) else key.partition(":")[0]
        events = [Event.from_json(line) for line in own]
        yield Ran(key, last.get("scenario") or named, whose, events, len(own) - len(beside) - len(taken), said)


def _ended(state: State, key: str) -> str:
    """What a site knows of a run's end."""
    if key.startswith(SURVEY):
        return "noised counts of the rows, for whoever may ask"
    if key.startswith(FIGURES):
        return "noised figures of the rows that are held out, for that run"
    if state.forgotten(key):
        return "forgotten: its files were removed"
    if state.introduction(key) is None:
        return "its files are no longer kept here"
    return Record.open(state.of_run(key)).site_said


def _key_figures(found: SiteChecked, ran: Sequence[Ran], told: Sequence[Line]) -> Iterator[tuple[str, str, str]]:
    if (cap := found.privacy) is None:
        yield "Epsilon", "no cap", "the site file has no privacy section: nothing bounds what runs may learn"
    else:
        yield (
            "Epsilon",
            f"{cap.epsilon:.2f}",
            f"of {cap.max_epsilon:g} at delta {cap.delta:g}, for each {_whom(cap)}",
        )
    yield "Runs", str(sum(RUN.fullmatch(run.key) is not None for run in ran)), "took part in"
    rounds = [line for line in told if (line["what"], line["outcome"]) == (history.ROUND, history.ANSWERED)]
    yield "Rounds", str(len(rounds)), "trained and answered"
    yield "Refused", str(sum(line["outcome"] == history.REFUSED for line in told)), "messages, all in all"
    if (rows := found.understood) is not None:
        learnt = "a count that runs learn, beside epsilon"
        yield "Rows", f"{rows.rows:,}", f"to train on{f'; {learnt}' if rows.persons is None else ''}"
        if rows.persons is not None:
            yield "Persons", f"{rows.persons:,}", f"whose rows these are; {learnt}"


def _whom(cap: Spent) -> str:
    return wording.protected("example" if cap.person is None else "person", cap.person)


def _spent(cap: Budget | None, ran: Sequence[Ran]) -> Iterator[str]:
    if cap is None:
        yield "<p>This site keeps no account.</p>"
        return
    yield (
        f"<p>The site file allows epsilon {cap.max_epsilon:g} in all runs together. What a run spent is "
        "counted as if it were the only one: what all spent together is not the sum of these.</p>"
    )
    by = {whose: [event for run in ran if run.submitter == whose for event in run.events] for whose in _whose(ran)}
    rows = [
        [whose, str(sum(r.submitter == whose for r in ran)), _epsilon(cap, all_)] for whose, all_ in by.items()
    ]
    yield page.scrolled(Table(("submitter", "runs", "epsilon"), rows).html("By submitter"), "By submitter")


def _whose(ran: Sequence[Ran]) -> list[str]:
    return [*dict.fromkeys(run.submitter for run in ran)]


def _epsilon(cap: Budget, events: Sequence[Event]) -> str:
    return f"{accounting.epsilon(events, cap.delta, cap.accountant):.3g}"


def _by_time(cap: Budget | None, told: Sequence[Line]) -> Iterator[Figure]:
    known = [line for line in told if line["epsilon_site"] is not None]
    if cap is None or len({line["epsilon_site"] for line in known}) < 2:
        return
    began = datetime.fromisoformat(known[0]["time"])
    rows: list[Row] = [
        {
            "days": (datetime.fromisoformat(line["time"]) - began).total_seconds() / _DAY,
            "epsilon": line["epsilon_site"],
            "cap": cap.max_epsilon,
            "run": line["run"],
        }
        for line in known
    ]
    chart = lines(
        rows, ("days", f"days since {began:%Y-%m-%d %H:%M} UTC"), ("epsilon", "epsilon"), zero=True, rule="cap"
    )
    yield Figure("Epsilon by time", "Of all runs together. Dashed: the most that the site file allows.", chart)


def _runs(cap: Budget | None, ran: Sequence[Ran]) -> Iterator[str]:
    if not ran:
        yield "<p>The site took part in none yet.</p>"
        return
    rows = [
        [
            run.key,
            run.scenario,
            run.submitter,
            str(run.rounds) if run.rounds else "-",
            "-" if cap is None else _epsilon(cap, run.events),
            run.said,
        ]
        for run in ran
    ]
    head = ("run", "scenario", "submitter", "paid rounds", "epsilon", "what is known of it")
    yield page.scrolled(Table(head, rows, frozenset({0, 1, 2, 5})).html("Runs, the first first"), "Runs")


def _refused(told: Sequence[Line]) -> Iterator[str]:
    refused = [line for line in told if line["outcome"] in (history.REFUSED, history.FAILED)]
    if not refused:
        yield "<p>Nothing.</p>"
        return
    rows = [
        [line["time"], line["run"] or "-", history.asked(line), line["submitter"] or _NOBODY, line["why"] or "-"]
        for line in reversed(refused[-_MOST:])
    ]
    left = f", the last {_MOST} of {len(refused):,}" if len(refused) > _MOST else ""
    made = Table(("time", "run", "asked", "submitter", "why"), rows, frozenset(range(5)))
    yield page.scrolled(made.html(f"Refusals, the last first{left}"), "Refusals")


def _rows(found: SiteChecked) -> Iterator[str]:
    if (told := found.understood) is None:
        yield "<p>They cannot be read: the notices above say why.</p>"
        return
    yield (
        "<p><strong>These counts are exact, and never leave the site</strong>, except the number of "
        f"{'rows to train on' if told.persons is None else 'persons'}. No epsilon covers them.</p>"
    )
    out = f"{counted(len(told.left_out), 'row')} left out, {len(told.empty):,} without a word"
    yield f"<p>{told.rows:,} rows to train on, read for task: {told.task}; {out}; {told.repeated:,} repeated.</p>"
    if told.labels:
        rows = [[name, f"{count:,}"] for name, count in sorted(told.labels.items(), key=lambda pair: -pair[1])]
        yield page.scrolled(Table(("label", "rows"), rows).html("Rows by label"), "Rows by label")
