"""The studies of docs/evidence.md: run a sweep, keep its figures as committed data, draw from those alone.

    python benchmarks/evidence.py methods --set "data.files={train: sst2.tsv, text: sentence, label: label}"
    python benchmarks/evidence.py methods --no-runs    # out of docs/evidence/methods.csv

A sweep of `scenarios/sweeps/trained` that was interrupted goes on when the command is given again. Sweeps
beside each other share their runs. Each run is a line of `docs/evidence/<sweep>.csv`: what it was, its
scenario's hash, its seed, and what came out. A table has a row for what was compared and a column for each
epsilon: the metric, its standard deviation over seeds, and the loss. Below it stands how each row differs from
a reference, over the same epsilons and seeds, by a paired t-test, with p-values corrected for their number
(Holm 1979).
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import vl_convert
from scipy.stats import ttest_rel

from fedlora import sweep as sweeps
from fedlora.planning import plan
from fedlora.reports.tables import Table, spread
from fedlora.run import Run
from fedlora.scenario import Scenario

DOCS = Path(__file__).parents[1] / "docs"
WHAT = ("baseline", "strategy", "kind", "r", "alpha", "local steps", "rounds", "partition", "noise")  # of rows
REFERENCE = {"baseline": "none", "strategy": "ffa_lora", "kind": "lora", "r": "8"}
WITHIN = {"r": "8", "alpha": "8", "local steps": "1", "partition": "label_shares", "noise": "independent"}  # one
NAMES = {
    "fedavg_lora": "LoRA",
    "ffa_lora": "FFA-LoRA",
    "ffa_lora, shrunk": "FFA-LoRA, shrunk",
    "fedsvd": "FedSVD",
    "rolora": "RoLoRA",
    "fed_sb": "Fed-SB",
    "la_lora": "LA-LoRA",
    "fedask": "FedASK",
    "fedex_lora": "FedEx-LoRA",
    "flexlora": "FlexLoRA",
    "lora_fair": "LoRA-FAIR",
}

Row = Mapping[str, str]
Place = tuple[str, ...]  # what a row of a table is about
Cells = Mapping[Place, Mapping[str, Mapping[str, Row]]]  # the runs of each, by column and seed


def run(name: str, overrides: Sequence[str], out: Path) -> None:
    """Say what the sweep will take, and bring it to its end."""
    study = sweeps.load(f"trained/{name}", overrides)
    points = [study.run(point) for point in study.points()]
    told = plan(points[0])
    took = f", each some {told.seconds:.0f} s on this machine, the start apart" if told.seconds else ""
    print(f"{name}: {len(points)} runs of {points[0].rounds} rounds{took}", flush=True)
    if not (held := out / "runs").exists():
        (out.parent / "runs").mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        held.symlink_to(Path("..") / "runs")
    print("\n".join(sweeps.sweep(f"trained/{name}", out, lambda line: print(line, flush=True), overrides).lines()))


def collect(name: str, overrides: Sequence[str], out: Path) -> None:
    """A line for each run of the sweep that has ended."""
    study = sweeps.load(f"trained/{name}", overrides)
    rows = [row for point in study.points() if (row := line(out, study.run(point)))]
    with (DOCS / "evidence" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def asked(made: Scenario) -> dict[str, str]:
    """What a run is, in the words of a table."""
    server, guarded, kind = made.strategy.server, made.example_privacy, made.model.adapter.kind
    told = {
        "baseline": made.baseline and made.baseline.kind,
        "strategy": made.strategy.use + (", shrunk" if made.strategy.shrink else ""),
        "kind": kind if isinstance(kind, str) else getattr(kind, "config", kind.use),
        "r": made.model.adapter.r,
        "alpha": made.model.adapter.alpha,
        "local steps": made.clients.local_steps,
        "rounds": made.rounds,
        "partition": made.data.partition.kind,
        "noise": "bands" if guarded and guarded.bands not in (None, 1) else "independent",
        "lr": made.clients.lr if server is None else server.lr,
        "epsilon": made.privacy and made.privacy.epsilon,
        "seed": made.seed,
    }
    return {key: _cell(value) for key, value in told.items()}


def line(out: Path, made: Scenario) -> dict[str, str] | None:
    """What a run was and what came of it; None if it has not ended."""
    folder = out / "runs" / f"{made.name}-{made.hash}"
    if not folder.exists() or not (ended := Run.open(folder)).ended:
        return None
    told = {
        ended.metric: ended.measured(ended.metric),
        "loss": ended.measured("loss"),
        "bytes_up": ended.summary["bytes_up_total"],
        "bytes_down": ended.summary["bytes_down_total"],
        "epsilon_spent": ended.summary["epsilon"],
        "majority": ended.majority,
        "seconds": ended.summary.get("seconds"),
    }
    return {"hash": made.hash, **asked(made), **{key: _cell(value) for key, value in told.items()}}


def _cell(value: object) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Study:
    """A study as its data hold it.

    Attributes:
        keys: what sets its rows apart.
        column: what sets its columns apart: epsilon, or the learning rate where it varies within a row.
        metric: that its runs are judged by.
        cells: its runs.
    """

    keys: Sequence[str]
    column: str
    metric: str
    cells: Cells

    @property
    def columns(self) -> list[str]:
        """Epsilons in the order in which they were run, learning rates from the smallest."""
        found = list(dict.fromkeys(column for runs in self.cells.values() for column in runs))
        return sorted(found, key=float) if self.column == "lr" else found

    def values(self, runs: Mapping[str, Row]) -> list[float]:
        """The metric of each run."""
        return [float(row[self.metric]) for row in runs.values()]


def read(name: str) -> Study:
    """What the data of a study say."""
    with (DOCS / "evidence" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys: list[str] = []
    for key in (key for key in WHAT if key in rows[0]):
        apart = len({tuple(row[k] for k in [*keys, key]) for row in rows})
        if apart > len({tuple(row[k] for k in keys) for row in rows}):  # else it follows from those before
            keys.append(key)
    once = {(*(row[key] for key in keys), row["epsilon"], row["seed"]) for row in rows}
    column = "epsilon" if len(once) == len(rows) else "lr"
    cells: dict[Place, dict[str, dict[str, Row]]] = {}
    for row in rows:
        place = tuple(row[key] for key in keys)
        cells.setdefault(place, {}).setdefault(row[column], {})[row["seed"]] = row
    named = list(rows[0])
    return Study(keys, column, named[named.index("loss") - 1], cells)


def table(name: str) -> Table:
    """A row for what was compared, a column for each epsilon or rate: the metric, and the loss in brackets."""
    study = read(name)
    rows = []
    for place, by_column in study.cells.items():
        sent = sorted({float(row["bytes_up"]) for runs in by_column.values() for row in runs.values()})
        rows.append(
            [
                *(NAMES.get(word, word) for word in place),
                *(_figure(study, by_column.get(column, {})) for column in study.columns),
                "/".join(dict.fromkeys(f"{size / 1e6:.2f}" for size in (sent[0], sent[-1]))),
                str(max(len(runs) for runs in by_column.values())),
            ]
        )
    head = [*study.keys, *(f"{study.column} {column}" for column in study.columns), "MB up", "seeds"]
    return Table(head, rows, frozenset(range(len(study.keys))))


def _figure(study: Study, runs: Mapping[str, Row]) -> str:
    if not runs:
        return "-"
    return f"{spread(study.values(runs))} ({statistics.fmean(float(row['loss']) for row in runs.values()):.2f})"


def differences(name: str) -> Table:
    """Of each row from its reference, paired over private epsilons and seeds.

    Noise that cancels is compared with independent noise, a method at another alpha, rank, skew or number of local
    steps with itself, and all else with FFA-LoRA.
    """
    study, found = read(name), []
    for place in study.cells if study.column == "epsilon" else ():
        reference = _reference(study.keys, place)
        both = [*_pairs(study, place, reference)]
        if place != reference and len(both) > 2:
            test = ttest_rel(*zip(*both, strict=True))
            mean, ahead = statistics.fmean(a - b for a, b in both), sum(a > b for a, b in both)
            found.append((place, reference, mean, *test.confidence_interval(), ahead, len(both), test.pvalue))
    corrected, rows = holm([line[-1] for line in found]), []
    for at in sorted(range(len(found)), key=lambda at: -found[at][2]):
        place, reference, mean, low, high, ahead, count, _ = found[at]
        told = [_label(place), _label(reference), f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        rows.append([*told, f"{ahead} of {count}", f"{corrected[at]:.2g}"])
    head = ["of", "from", "difference", "95 % interval", "ahead", "p (Holm)"]
    return Table(head, rows, frozenset(range(2)))


def _reference(keys: Sequence[str], place: Place) -> Place:
    """What a row of a table is compared with."""
    if {"noise", "alpha"} & set(keys):  # each method with its own
        return tuple(WITHIN.get(key, word) for key, word in zip(keys, place, strict=True))
    return tuple(REFERENCE[key] for key in keys)


def _label(place: Place) -> str:
    return ", ".join(NAMES.get(word, word) for word in place if word != "none") or "the run itself"


def _pairs(study: Study, place: Place, reference: Place) -> Iterator[tuple[float, float]]:
    own, other = study.cells[place], study.cells.get(reference, {})
    for epsilon in own.keys() & other.keys() - {"none"}:
        for seed in own[epsilon].keys() & other[epsilon].keys():
            yield float(own[epsilon][seed][study.metric]), float(other[epsilon][seed][study.metric])


def holm(values: Sequence[float]) -> list[float]:
    """P-values, corrected for their number n: the smallest times n, the next times n - 1, and so on."""
    made, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = made[at] = min(1.0, max(least, values[at] * (len(values) - rank)))
    return made


def figures(name: str) -> dict[str, alt.LayerChart | alt.FacetChart]:
    """The metric by bytes for each epsilon; those that nothing beats at their bytes are joined by a line."""
    study, points = read(name), []
    for place, by_column in study.cells.items():
        for column, runs in by_column.items():
            values = study.values(runs)
            mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            sent = float(next(iter(runs.values()))["bytes_up"]) / 1e6
            about = {"name": _label(place), "of": f"{study.column} {column}", "MB": sent}
            points.append({**about, study.metric: mean, "low": mean - sd, "high": mean + sd})
    for point in points:
        rivals = [p for p in points if p["of"] == point["of"] and p["MB"] <= point["MB"]]
        point["front"] = point["MB"] > 0 and point[study.metric] == max(p[study.metric] for p in rivals)
    base = alt.Chart(alt.Data(values=points)).transform_filter("datum.MB > 0")
    x = alt.X(
        "MB:Q", scale=alt.Scale(type="log", padding=12), title="MB sent up by all", axis=alt.Axis(tickCount=3)
    )
    y = alt.Y(f"{study.metric}:Q", scale=alt.Scale(zero=False), title=study.metric)
    colour = alt.Color("name:N", sort=None, legend=alt.Legend(title=None, orient="right"))
    front = base.transform_filter("datum.front").mark_line(strokeDash=[4, 3], color="grey").encode(x=x, y=y)
    bars = base.mark_rule(strokeWidth=2).encode(
        x=x, y=alt.Y("low:Q", title=study.metric), y2="high:Q", color=colour
    )
    dots = base.mark_point(filled=True, size=60).encode(x=x, y=y, color=colour)
    chart = alt.LayerChart(layer=[front, bars, dots], width=230, height=220)
    order = [f"{study.column} {column}" for column in study.columns]
    return {name: chart.facet(alt.Facet("of:N", sort=order, title=None), columns=3)}


def made(name: str) -> str:
    """What stands on the page: the table, the differences, the figures."""
    told = [table(name).markdown()]
    if (apart := differences(name)).rows:
        told.append(apart.markdown())
    return "\n\n".join([*told, f"![{name}](evidence/{name}.svg)"])


def draw(name: str) -> None:
    """Write the figures, and put them and the tables between their marks in docs/evidence.md."""
    for file, chart in figures(name).items():
        (DOCS / "evidence" / f"{file}.svg").write_text(vl_convert.vegalite_to_svg(chart.to_json()))
    page, mark, end = DOCS / "evidence.md", f"<!-- table: {name} -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(mark)
    if rest:
        page.write_text(f"{before}{mark}{made(name)}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Run what is missing of a sweep, keep it, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="of scenarios/sweeps/trained, such as methods")
    parser.add_argument("--set", metavar="a.b=v", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, help="its folder (default: sweeps/trained/<sweep>)")
    parser.add_argument("--no-runs", action="store_true", help="collect and draw what is there")
    given = parser.parse_args()
    out = given.out or Path("sweeps") / "trained" / given.sweep
    if not given.no_runs:
        run(given.sweep, given.overrides, out)
    if out.exists():
        collect(given.sweep, given.overrides, out)
    draw(given.sweep)
    print("\n".join(table(given.sweep).text("")))


if __name__ == "__main__":
    main()
