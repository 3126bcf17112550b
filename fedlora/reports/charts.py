"""The charts of runs, in Vega-Lite by Altair. They name no colours: who shows them does.

Each chart holds its own data, in rows that can be read and copied by themselves.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import altair as alt

from fedlora.run import Run

Row = Mapping[str, Any]
Chart = alt.Chart | alt.LayerChart

MOST_CLIENTS = 60  # drawn apart in one chart; of more, evenly spread ones are
HEAT_STEPS = 5  # colours of a heat map


@dataclass(frozen=True)
class Figure:
    """A chart and what to say about it.

    Attributes:
        title: of a few words.
        note: what it shows, in a sentence or two; also the text for who cannot see it.
        chart: its data are rows.
    """

    title: str
    note: str
    chart: Chart


def lines(
    rows: Sequence[Row],
    x: tuple[str, str],
    y: tuple[str, str],
    *,
    series: str | None = None,
    band: tuple[str, str] | None = None,
    whole: bool = False,
    zero: bool = False,
) -> alt.LayerChart:
    """Points joined by lines.

    Args:
        rows: in the order of x.
        x: its column and its title.
        y: its column and its title.
        series: the column that tells the lines apart.
        band: columns of the lower and upper edge of a band around each line.
        whole: x holds whole numbers.
        zero: the y axis starts at zero.
    """
    base = alt.Chart(data(rows)).encode(
        x=alt.X(
            f"{x[0]}:Q",
            title=x[1],
            scale=alt.Scale(zero=False, nice=False, padding=12),
            axis=alt.Axis(grid=False, tickMinStep=1, format="d") if whole else alt.Axis(grid=False),
        ),
        y=alt.Y(f"{y[0]}:Q", title=y[1], scale=alt.Scale(zero=zero)),
        tooltip=_hover(rows),
    )
    if series:
        base = base.encode(
            color=alt.Color(
                f"{series}:N", sort=None, legend=alt.Legend(title=None, orient="top", columns=2, symbolOpacity=1)
            )
        )
    layers: list[alt.Chart] = []
    if band:
        layers.append(base.mark_area(opacity=0.18).encode(y=alt.Y(f"{band[0]}:Q", title=y[1]), y2=f"{band[1]}:Q"))
    layers += [base.mark_line(), base.mark_point(filled=True, size=28, opacity=1)]
    layers.append(base.mark_point(filled=True, size=500, opacity=0))  # something larger to hover over
    return alt.LayerChart(layer=layers, width="container", height=230)


def data(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as a chart holds them."""
    return {"values": [dict(row) for row in rows]}


def _hover(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Every column of a row, as what is shown where a pointer rests on it."""
    return [
        alt.Tooltip(f"{name}:Q", format=".4~g") if isinstance(value, float) else alt.Tooltip(f"{name}:N")
        for name, value in rows[0].items()
    ]


def heat(
    rows: Sequence[Row],
    x: tuple[str, str],
    y: tuple[str, str],
    value: tuple[str, str],
    *,
    height: int,
    number: str = ".2~f",
    domain: tuple[float, float] | None = None,
) -> alt.Chart:
    """A cell for each x and y, coloured in steps by its value."""
    low, high = domain or (min(r[value[0]] for r in rows), max(r[value[0]] for r in rows))
    scale = alt.Scale(type="quantize", domain=[low, high if high > low else low + 1], nice=False)
    chart: alt.Chart = (
        alt.Chart(data(rows))
        .mark_rect()
        .encode(
            x=alt.X(f"{x[0]}:O", title=x[1], sort=None, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y[0]}:O", title=y[1], sort=None, axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                f"{value[0]}:Q",
                title=value[1],
                scale=scale,
                legend=alt.Legend(orient="top", format=number, labelOverlap="greedy"),
            ),
            tooltip=_hover(rows),
        )
        .properties(width="container", height=height)
    )
    return chart


def stacks(
    rows: Sequence[Row], x: tuple[str, str], y: tuple[str, str], part: str, *, order: Sequence[str]
) -> alt.Chart:
    """Bars on each other, one colour for each part."""
    chart: alt.Chart = (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            x=alt.X(f"{x[0]}:O", title=x[1], axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y[0]}:Q", title=y[1], stack=True),
            color=alt.Color(f"{part}:N", sort=list(order), legend=alt.Legend(title=None, orient="top", columns=3)),
            tooltip=_hover(rows),
        )
        .properties(width="container", height=230)
    )
    return chart


def points(
    rows: Sequence[Row], x: tuple[str, str], y: tuple[str, str], series: str, *, front: str
) -> alt.LayerChart:
    """Points told apart by shape and colour, each on a bar from `low` to `high`, a line where `front` is true."""
    base = alt.Chart(data(rows)).encode(
        x=alt.X(f"{x[0]}:Q", title=x[1], scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(grid=False)),
        y=alt.Y(f"{y[0]}:Q", title=y[1], scale=alt.Scale(zero=False, padding=16)),
        tooltip=_hover(rows),
    )
    best = (
        base.transform_filter(f"datum.{front}")
        .mark_line(strokeDash=[4, 4], opacity=0.7)
        .encode(tooltip=alt.value(None))
    )
    legend = alt.Legend(title=None, orient="top", columns=2)
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(
        color=alt.Color(f"{series}:N", sort=None, legend=legend),
        shape=alt.Shape(f"{series}:N", sort=None, legend=legend),
    )
    bars = base.mark_rule(
        strokeWidth=2, color="gray", opacity=0.6
    ).encode(  # of one colour, or it has a legend of its own
        y=alt.Y("low:Q", title=y[1]), y2="high:Q"
    )
    return alt.LayerChart(layer=[best, bars, dots], width="container", height=260)


def metric_by_round(run: Run) -> alt.LayerChart:
    """The metric of a run in each round in which it was measured."""
    return lines(_measured(run), ("round", "round"), (run.metric, run.metric), whole=True)


def figures(run: Run) -> Mapping[Literal["learning", "privacy", "clients", "cost"], list[Figure]]:
    """All charts that a run has data for, by section."""
    return {
        "learning": [*_learning(run)],
        "privacy": [*_privacy(run)],
        "clients": [*_clients(run)],
        "cost": [*_cost(run)],
    }


def _measured(run: Run) -> list[Row]:
    metric, lines = run.metric, run.rounds
    sent = accumulate(line.get("bytes_up", 0) + line.get("bytes_down", 0) for line in lines)
    return [
        {
            "round": line["round"],
            "megabytes": total / 1e6,
            metric: line[metric],
            "loss": line.get("loss"),
            **({"hours": line["virtual_seconds"] / 3600} if "virtual_seconds" in line else {}),
        }
        for line, total in zip(lines, sent, strict=True)
        if line.get(metric) is not None
    ]


def _learning(run: Run) -> Sequence[Figure]:
    found, metric = [], run.metric
    if rows := _measured(run):
        by_round = metric_by_round(run)
        found.append(Figure(f"{metric.capitalize()} by round", "Measured on the held-out test set.", by_round))
        chart = lines(rows, ("megabytes", "megabytes, up and down, all clients"), (metric, metric))
        found.append(
            Figure(f"{metric.capitalize()} by megabyte", "The same against all that was sent so far.", chart)
        )
        if "hours" in rows[-1]:
            chart = lines(rows, ("hours", "virtual hours"), (metric, metric))
            note = "The same by the clock of the simulated devices."
            found.append(Figure(f"{metric.capitalize()} by virtual hour", note, chart))
    losses = [
        {"round": line["round"], "set": label, "loss": line[key]}
        for key, label in (("loss", "test"), ("train_loss", "training"))
        for line in run.rounds
        if line.get(key) is not None
    ]
    if losses:
        private = (
            "" if any(row["set"] == "training" for row in losses) else " Training losses stayed with the clients."
        )
        chart = lines(losses, ("round", "round"), ("loss", "loss"), series="set", whole=True)
        found.append(Figure("Loss by round", f"Mean over examples.{private}", chart))
    errors = [
        {"round": line["round"], "error": line["aggregation_error"]}
        for line in run.rounds
        if line.get("aggregation_error") is not None
    ]
    if errors:
        chart = lines(errors, ("round", "round"), ("error", "relative error"), whole=True, zero=True)
        note = "How far the aggregate is from the mean of the clients' full weight changes, as a share of it."
        found.append(Figure("Aggregation error by round", note, chart))
    return found


def _privacy(run: Run) -> Sequence[Figure]:
    whole = (run.scenario.get("privacy") or {}).get("unit") == "client"
    stated: list[Row] = []
    if whole:
        stated = [
            {"round": line["round"], "of": "each client", "epsilon": line["epsilon"]}
            for line in run.rounds
            if line.get("epsilon") is not None
        ]
    spent: dict[int, dict[int, float]] = {}
    for line in run.clients:
        if line.get("epsilon") is not None:
            spent.setdefault(line["round"], {})[line["client"]] = line["epsilon"]
    drawn, total = thinned(sorted({client for now in spent.values() for client in now}))
    so_far: dict[int, float] = {}
    each: list[Row] = []
    for round, now in sorted(spent.items()):
        so_far |= now
        each += [{"client": c, "round": round, "epsilon": so_far[c]} for c in drawn if c in so_far]
        for name, value in (("largest", max(so_far.values())), ("median", statistics.median(so_far.values()))):
            stated.append({"round": round, "of": f"each example, {name}" if whole else name, "epsilon": value})
    if not stated:
        return []
    note = (
        "Spent so far to protect each client, by the server's noise."
        if whole
        else "Spent so far: the largest over clients, which is what the run states, and the median."
    )
    chart = lines(stated, ("round", "round"), ("epsilon", "epsilon"), series="of", whole=True, zero=True)
    found = [Figure("Epsilon by round", note, chart)]
    if each:
        chart_each = heat(
            each, ("round", "round"), ("client", "client"), ("epsilon", "epsilon"), height=tall(len(drawn))
        )
        note = f"Spent so far on the examples of each client.{_thinning(len(drawn), total)}"
        found.append(Figure("Epsilon of each client", note, chart_each))
    return found


def _clients(run: Run) -> Sequence[Figure]:
    found = []
    labels, holders = run.partitions.get("labels") or [], run.partitions.get("clients") or []
    if labels and holders:
        some, total = thinned(holders)
        rows = [
            {"client": h["client"], "label": label, "examples": n, "share": n / max(h["num_examples"], 1)}
            for h in some
            for label, n in zip(labels, h["labels"], strict=True)
        ]
        note = f"The share of each label among a client's examples.{_thinning(len(some), total)}"
        chart = heat(
            rows,
            ("label", "label"),
            ("client", "client"),
            ("share", "share of the client's examples"),
            height=tall(len(some)),
            number=".0%",
            domain=(0.0, 1.0),
        )
        found.append(Figure("Labels of each client", note, chart))
    lines = run.clients
    known = {"round", "client", "num_examples", "steps", "bytes_up", "bytes_down", "epsilon", "seconds", "error"}
    told = sorted({key for line in lines for key, v in line.items() if isinstance(v, int | float)} - known)
    some, total = thinned(sorted({line["client"] for line in lines}))
    for key in told:
        rows = [
            {"client": line["client"], "round": line["round"], key: float(line[key])}
            for line in lines
            if line.get(key) is not None and line["client"] in set(some)
        ]
        if len({row[key] for row in rows}) == 1:  # such as a count of what never happened
            continue
        words = key.replace("_", " ")
        title = f"{words.capitalize()} of each client"
        chart = heat(rows, ("round", "round"), ("client", "client"), (key, words), height=tall(len(some)))
        found.append(Figure(title, f"As the client told it, by round.{_thinning(len(some), total)}", chart))
    return found


def _cost(run: Run) -> Sequence[Figure]:
    found, rounds = [], run.rounds
    rows = [
        {"round": line["round"], "way": way, "megabytes": line[key] / 1e6}
        for line in rounds
        for key, way in (("bytes_up", "up"), ("bytes_down", "down"))
        if key in line
    ]
    if rows:
        chart = stacks(rows, ("round", "round"), ("megabytes", "megabytes"), "way", order=("up", "down"))
        found.append(
            Figure("Megabytes by round", "All clients together, counted on what Flower serialises.", chart)
        )
    order = ("train", "evaluate", "aggregate", "diagnose", "account")
    phases = [
        {"round": line["round"], "phase": phase, "seconds": seconds}
        for line in rounds
        for phase, seconds in line.get("phases", {}).items()
    ]
    if phases:
        chart = stacks(phases, ("round", "round"), ("seconds", "seconds"), "phase", order=order)
        note = "Training with what travels, evaluation, aggregation, its error, and accounting for privacy."
        found.append(Figure("Time by round", note, chart))
    return found


def thinned(items: Sequence[Any]) -> tuple[list[Any], int]:
    """At most `MOST_CLIENTS` of the items, evenly spread, and how many there are."""
    step = max(1, -(-len(items) // MOST_CLIENTS))
    return list(items[::step]), len(items)


def tall(cells: int) -> int:
    """The height of a heat map with so many rows."""
    return max(120, min(cells * 24, 420))


def _thinning(shown: int, total: int) -> str:
    return f" Of {total} clients {shown} are drawn." if shown < total else ""
