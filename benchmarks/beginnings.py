"""The studies of docs/beginnings.md: run a sweep, keep its figures as committed data, draw from those alone.

    python benchmarks/beginnings.py reduced --set "data.files={train: sst2.tsv, text: sentence, label: label}"
    python benchmarks/beginnings.py reduced --no-runs    # out of docs/beginnings/reduced.csv

A sweep of `scenarios/sweeps/paper` that was interrupted goes on when the command is given again; those beside each
other share their runs. Each run is a line of `docs/beginnings/<sweep>.csv`: what the sweep varies, its scenario's
hash, its seed, and what came out.

How learning rates are chosen: every method has the same grid and the same seeds, and the whole grid is printed.
"Best" is the learning rate with the highest mean accuracy over seeds. The same figures choose and evaluate it, so
its accuracy is too high. "Blind" has no such bias: for each seed the other seeds choose the learning rate, and its
accuracy on this seed counts. In `tuned` alpha is chosen in the same way, together with the learning rate.
"""

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from fedlora import sweep as sweeps
from fedlora.reports.tables import Table, spread
from fedlora.run import Run

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = (
    "accuracy",
    "loss",
    "bytes_up",
    "bytes_down",
    "epsilon_spent",
    "aggregation_error",
    "seconds",
    "precision",
)
RATE, SEED, METHOD = "lr", "seed", "strategy"
TUNED = {"tuned": ("alpha",)}  # what a sweep chooses along with the rate
NAMES = {
    "fedavg_lora": "LoRA",
    "ffa_lora": "FFA-LoRA",
    "fedsvd": "FedSVD",
    "rolora": "RoLoRA",
    "fed_sb": "Fed-SB",
    "la_lora": "LA-LoRA",
    "fedask": "FedASK",
    "fedex_lora": "FedEx-LoRA",
    "flexlora": "FlexLoRA",
}

Row = Mapping[str, str]
Choice = tuple[float, ...]  # a learning rate, and what else is tuned
Cell = Mapping[Choice, Mapping[str, Row]]  # the runs of a configuration, by choice and seed


def run(name: str, overrides: Sequence[str], out: Path) -> None:
    """Bring the sweep to its end; what another one beside it has run is not run again."""
    if not (held := out / "runs").exists():
        (out.parent / "runs").mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        held.symlink_to(Path("..") / "runs")
    done = sweeps.sweep(f"paper/{name}", out, lambda line: print(line, flush=True), overrides)
    print("\n".join(done.lines()))


def collect(name: str, overrides: Sequence[str], out: Path) -> None:
    """A line for each run of the sweep that has ended."""
    asked, rows = sweeps.load(f"paper/{name}", overrides), []
    for point in asked.points():
        made = asked.run(point)
        folder = out / "runs" / f"{made.name}-{made.hash}"
        if not folder.exists() or not (ended := Run.open(folder)).ended:
            continue
        told = {**ended.rounds[-1], **ended.summary}
        told |= {way: ended.summary[f"{way}_total"] for way in ("bytes_up", "bytes_down")}
        told["epsilon_spent"] = ended.summary["epsilon"]
        settings = {_word(key): _cell(value) for key, value in sweeps.spread_out(point).items()}
        rows.append({"hash": made.hash, **settings, **{key: _cell(told.get(key)) for key in RESULTS}})
    with (DOCS / "beginnings" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _word(key: str) -> str:
    """The name of a column."""
    told = {"strategy.use": METHOD, "clients.use": "trains", "privacy": "epsilon", "data.partition.shares": "skew"}
    return told.get(key, key.rpartition(".")[2])


def _cell(value: Any) -> str:
    """A setting or a figure; of a privacy section its epsilon, of shares of labels the largest."""
    if isinstance(value, dict):
        value = value["epsilon"]
    if isinstance(value, list):
        value = max(share for row in value for share in row)
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def read(name: str) -> tuple[list[str], dict[tuple[str, ...], Cell]]:
    """The runs of a sweep by what it varies beside seed, rate and what else is tuned."""
    chosen = _chosen(name)
    with (DOCS / "beginnings" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys: list[str] = []
    for key in rows[0]:
        if key not in ("hash", *chosen, SEED, METHOD, *RESULTS):
            told = {tuple(row[k] for k in [*keys, key]) for row in rows}
            if len(told) > len({place[:-1] for place in told}):  # else it follows from those before
                keys.append(key)
    keys.append(METHOD)
    cells: dict[tuple[str, ...], Any] = {}
    for row in rows:
        cell = cells.setdefault(tuple(row[key] for key in keys), {})
        cell.setdefault(tuple(float(row[key]) for key in chosen), {})[row[SEED]] = row
    return keys, cells


def _chosen(name: str) -> tuple[str, ...]:
    """What a sweep's best is the best of."""
    return (RATE, *TUNED.get(name, ()))


def _accuracies(runs: Mapping[str, Row], *, but: str | None = None) -> list[float]:
    return [float(row["accuracy"]) for seed, row in runs.items() if seed != but]


def best(cell: Cell, but: str | None = None) -> Choice:
    """The learning rate with the highest mean accuracy, over all seeds or all but one; the lower of equals."""
    return max(sorted(cell), key=lambda choice: statistics.fmean(_accuracies(cell[choice], but=but) or [0.0]))


def blind(cell: Cell) -> list[float]:
    """For each seed, the accuracy at the rate that the other seeds choose."""
    seeds = sorted(set.intersection(*(set(runs) for runs in cell.values())))
    return [float(cell[best(cell, but=s)][s]["accuracy"]) for s in seeds] if len(seeds) > 1 else []


def table(name: str) -> Table:
    """A row for each configuration, the whole grid at its end."""
    keys, cells = read(name)
    choices = sorted({choice for cell in cells.values() for choice in cell})
    chosen = _chosen(name)
    rows = []
    for place, cell in cells.items():
        at = best(cell)
        runs = list(cell[at].values())
        rows.append(
            [
                *(NAMES.get(word, word) for word in place),
                *(f"{value:g}" for value in at),
                spread(_accuracies(cell[at])),
                spread(blind(cell)),
                f"{statistics.fmean(float(row['loss']) for row in runs):.3f}",
                f"{float(runs[0]['bytes_up']) / 1e6:.2f}",
                str(len(runs)),
                *(spread(_accuracies(cell[choice])) if choice in cell else "-" for choice in choices),
            ]
        )
    head = [
        *keys,
        *(f"best {key}" for key in chosen),
        "accuracy at it",
        "blind",
        "loss",
        "MB up",
        "seeds",
        *(_named(chosen, choice) for choice in choices),
    ]
    return Table(head, rows, frozenset(range(len(keys))))


def _named(chosen: Sequence[str], choice: Choice) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in zip(chosen, choice, strict=True))


def figures(name: str) -> dict[str, alt.Chart | alt.LayerChart | alt.FacetChart]:
    """Accuracy by what the sweep varies, over the grid of rates, by bytes (of many methods), by LoRA's error."""
    keys, cells = read(name)
    axis = keys[0]
    points, grid, errors = [], [], []
    for place, cell in cells.items():
        about = {**dict(zip(keys, place, strict=True)), "method": _method(keys, place)}
        values = blind(cell) or _accuracies(cell[best(cell)])
        sent = float(next(iter(cell[best(cell)].values()))["bytes_up"])
        points.append({**about, "MB": sent / 1e6, **_band(values)})
        for (rate, *other), runs in cell.items():
            method = ", ".join(filter(None, [about["method"], _named(_chosen(name)[1:], tuple(other))]))
            grid.append({**about, "method": method, "lr": rate, **_band(_accuracies(runs))})
        errors += [
            {**about, "error": float(row["aggregation_error"]), "accuracy": float(row["accuracy"])}
            for runs in cell.values()
            for row in runs.values()
            if row["aggregation_error"] != "none"
        ]
    order = list(dict.fromkeys(row[axis] for row in points))
    rates = sorted({row["lr"] for row in grid})
    scale = alt.Scale(type="log", nice=False, padding=12)
    rate = alt.X("lr:Q", scale=scale, title="learning rate", axis=alt.Axis(values=rates, format="~g"))
    made = {
        name: _bars(points, alt.X(f"{axis}:N", sort=order, title=axis, axis=alt.Axis(labelAngle=0))),
        f"{name}-rates": _facets(_bars(grid, rate, lines=True), axis, order),
    }
    if len({place[-1] for place in cells}) > 2:
        sent_up = alt.X("MB:Q", scale=scale, title="MB sent up by all", axis=alt.Axis(tickCount=3))
        made[f"{name}-bytes"] = _facets(_bars(points, sent_up, lines=True), axis, order)
    if errors:
        made[f"{name}-error"] = (
            alt.Chart(alt.Data(values=errors))
            .mark_point(filled=True, size=45)
            .encode(
                x=alt.X(
                    "error:Q",
                    title="aggregation error of the last round, of the true average",
                    scale=alt.Scale(type="log"),
                ),
                y=alt.Y("accuracy:Q", scale=alt.Scale(zero=False)),
                color=alt.Color(f"{axis}:N", sort=order, title=axis),
            )
            .properties(width=420, height=230)
        )
    return made


def _method(keys: Sequence[str], place: Sequence[str]) -> str:
    """The method, with what sets it apart beside the first of the keys, where there are others."""
    words = dict(list(zip(keys, place, strict=True))[len(keys) > 1 :])
    name = words.pop(METHOD, "")
    return ", ".join([NAMES.get(name, name), *(f"{key} {value}" for key, value in words.items())])


def _band(values: Sequence[float]) -> dict[str, float]:
    mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {"accuracy": mean, "low": mean - sd, "high": mean + sd}


def _bars(rows: Sequence[Mapping[str, Any]], x: alt.X, lines: bool = False) -> alt.LayerChart:
    """Means with bars of one standard deviation, a colour for each method."""
    colour = alt.Color("method:N", sort=None, legend=alt.Legend(title=None, orient="top"))
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=x, color=colour)
    if not lines:
        base = base.encode(xOffset=alt.XOffset("method:N", sort=None))
    y = alt.Y("accuracy:Q", scale=alt.Scale(zero=False))
    layers = [base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="accuracy"), y2="high:Q")]
    layers += [
        base.mark_point(filled=True, size=60).encode(y=y),
        *([base.mark_line().encode(y=y)] if lines else []),
    ]
    return alt.LayerChart(layer=layers, width=max(420, 18 * len(rows)), height=230)


def _facets(chart: alt.LayerChart, axis: str, order: Sequence[str]) -> alt.LayerChart | alt.FacetChart:
    """A small chart for each value of what the sweep varies beside the method."""
    if axis == METHOD:
        return chart
    small = chart.properties(width=170, height=180)
    return small.facet(alt.Facet(f"{axis}:N", sort=order, title=axis), columns=4)


def draw(name: str) -> None:
    """Write the figures, and put them and the table between their marks in docs/beginnings.md."""
    links = []
    for file, chart in figures(name).items():
        (DOCS / "beginnings" / f"{file}.svg").write_text(vl_convert.vegalite_to_svg(chart.to_json()))
        links.append(f"![{file}](beginnings/{file}.svg)")
    page, mark, end = DOCS / "beginnings.md", f"<!-- table: {name} -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(mark)
    if rest:
        after = rest.partition(end)[2]
        made = "\n\n".join([table(name).markdown(), *links])
        page.write_text(f"{before}{mark}{made}\n\n{end}{after}")


def main() -> None:
    """Run what is missing of a sweep, keep it, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="of scenarios/sweeps/paper, such as reduced")
    parser.add_argument("--set", metavar="a.b=v", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, help="its folder (default: sweeps/paper/<sweep>)")
    parser.add_argument("--no-runs", action="store_true", help="collect and draw what is there")
    given = parser.parse_args()
    out = given.out or Path("sweeps") / "paper" / given.sweep
    if not given.no_runs:
        run(given.sweep, given.overrides, out)
    if out.exists():
        collect(given.sweep, given.overrides, out)
    draw(given.sweep)
    print("\n".join(table(given.sweep).text("")))


if __name__ == "__main__":
    main()
