"""The charts of runs, in Vega-Lite by Altair. They name no colours: who shows them does.

Each chart holds its own data, in rows that can be read and copied by themselves.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import altair as alt

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
    rule: str | None = None,
    ringed: float | None = None,
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
        rule: the column of a level to draw across, the same in all rows; those without it have none.
        ringed: the x whose points have a ring around them; None: none has.
    """
    held = data(rows)
    scale = _scale([row[column] for row in rows for column in (y[0], rule, *(band or ())) if column in row], zero)
    base = alt.Chart(held).encode(
        x=alt.X(
            f"{x[0]}:Q",
            title=x[1],
            scale=alt.Scale(zero=False, nice=False, padding=12),
            axis=alt.Axis(grid=False, tickMinStep=1, format="d") if whole else alt.Axis(grid=False),
        ),
        y=alt.Y(f"{y[0]}:Q", title=y[1], scale=scale),
        tooltip=_hover(rows),
    )
    if series:
        base = base.encode(
            color=alt.Color(
                f"{series}:N", sort=None, legend=alt.Legend(title=None, orient="top", columns=2, symbolOpacity=1)
            )
        )
    layers: list[alt.Chart] = []
    if rule and any(rule in row for row in rows):
        level = alt.Y(f"max({rule}):Q", title=y[1], scale=scale)
        mark = alt.Chart(held).transform_calculate(level=json.dumps(rule)).mark_rule(strokeWidth=1.5, color="gray")
        dashes = alt.StrokeDash(
            "level:N",
            scale=alt.Scale(domain=[rule], range=[[4, 4]]),
            legend=alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeColor="gray"),
        )
        layers.append(
            mark.encode(
                y=level, strokeDash=dashes, tooltip=alt.Tooltip(f"max({rule}):Q", title=rule, format=".4~g")
            )
        )
    if band:
        layers.append(base.mark_area(opacity=0.18).encode(y=alt.Y(f"{band[0]}:Q", title=y[1]), y2=f"{band[1]}:Q"))
    layers += [base.mark_line(), base.mark_point(filled=True, size=28, opacity=1)]
    if ringed is not None:
        ring = base.transform_filter(f"datum.{x[0]} == {ringed}")
        layers.append(ring.mark_point(filled=False, size=160, strokeWidth=2, opacity=1))
    layers.append(base.mark_point(filled=True, size=500, opacity=0))  # something larger to hover over
    return alt.LayerChart(layer=layers, width="container", height=230)


def _scale(values: Sequence[float | None], zero: bool) -> alt.Scale:
    """The scale of an axis; around a value that never changes there is room, so that ticks have labels."""
    known = {value for value in values if value is not None}
    if zero or len(known) != 1:
        return alt.Scale(zero=zero)
    (value,) = known
    around = abs(value) / 10 or 1.0
    return alt.Scale(domain=[value - around, value + around])


def data(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as a chart holds them."""
    return {"values": [dict(row) for row in rows]}


def _hover(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Every column of a row, shown where a pointer is on it."""
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
    angle: int = 0,
) -> alt.Chart:
    """A cell for each x and y, coloured in steps by its value; labels under it turned by `angle`."""
    low, high = domain or (min(r[value[0]] for r in rows), max(r[value[0]] for r in rows))
    scale = alt.Scale(type="quantize", domain=[low, high if high > low else low + 1], nice=False)
    chart: alt.Chart = (
        alt.Chart(data(rows))
        .mark_rect()
        .encode(
            x=alt.X(f"{x[0]}:O", title=x[1], sort=None, axis=alt.Axis(labelOverlap=True, labelAngle=angle)),
            y=alt.Y(f"{y[0]}:O", title=y[1], sort=None, axis=alt.Axis(labelOverlap=True, labelLimit=120)),
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
    """Points that differ by shape and colour, each on a bar from `low` to `high`, a line where `front` is true."""
    base = alt.Chart(data(rows)).encode(
        x=alt.X(f"{x[0]}:Q", title=x[1], scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(grid=False)),
        y=alt.Y(f"{y[0]}:Q", title=y[1], scale=alt.Scale(zero=False, padding=16)),
        tooltip=_hover(rows),
    )
    best = (
        base.transform_filter(f"datum['{front}']")
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
    joined = [best] if any(row[front] for row in rows) else []  # a layer of nothing has no extent
    return alt.LayerChart(layer=[*joined, bars, dots], width="container", height=260)


MAJORITY = "commonest label"  # the column of what guessing it gets right


def metric_by_round(
    recorded: Sequence[Row], metric: str, majority: float | None = None, best: int | None = None
) -> alt.LayerChart:
    """A metric in each round in which it was measured, on the rows that report and on those that choose.

    Args:
        recorded: the lines of `metrics.jsonl`.
        metric: of the test rows.
        majority: the level of guessing the commonest label; None: no line is drawn.
        best: the round that was kept, which has a ring; None: the last one was.
    """
    rows, chosen = measured(recorded, metric, majority), f"validation_{metric}"
    on = {line["round"]: line[chosen] for line in recorded if line.get(chosen) is not None}
    series = "set" if on else None
    if series:
        loss = {line["round"]: line.get("validation_loss") for line in recorded}
        told = [row for row in rows if row["round"] in on]
        rows = [{**row, "set": "test"} for row in rows] + [
            {**row, metric: on[row["round"]], "loss": loss[row["round"]], "set": "validation"} for row in told
        ]
    return lines(rows, ("round", "round"), (metric, metric), series=series, whole=True, rule=MAJORITY, ringed=best)


def measured(recorded: Sequence[Row], metric: str, majority: float | None = None) -> list[Row]:
    """Of the lines of `metrics.jsonl` those with a metric, with what was sent until then."""
    sent = accumulate(line.get("bytes_up", 0) + line.get("bytes_down", 0) for line in recorded)
    return [
        {
            "round": line["round"],
            **({"megabytes": total / 1e6} if "bytes_up" in line else {}),
            metric: line[metric],
            "loss": line.get("loss"),
            **({"hours": line["virtual_seconds"] / 3600} if "virtual_seconds" in line else {}),
            **({} if majority is None else {MAJORITY: majority}),
        }
        for line, total in zip(recorded, sent, strict=True)
        if line.get(metric) is not None
    ]
