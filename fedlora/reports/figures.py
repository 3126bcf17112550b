"""The figures of one run, by section of its report."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fedlora.record import Record
from fedlora.reports.charts import (
    MAJORITY,
    MOST_CLIENTS,
    Figure,
    Row,
    heat,
    lines,
    measured,
    metric_by_round,
    stacks,
)

MOST_LABELS = 30  # of a confusion that is drawn


def figures(run: Record) -> Mapping[Literal["learning", "privacy", "clients", "cost"], list[Figure]]:
    """All charts that a run has data for, by section."""
    return {
        "learning": [*_learning(run)],
        "privacy": [*_privacy(run)],
        "clients": [*_clients(run)],
        "cost": [*_cost(run)],
    }


def _learning(run: Record) -> Sequence[Figure]:
    found, metric = [], run.metric
    if len(rows := measured(run.rounds, metric, run.majority)) > 1:  # a single point is a figure, and no chart
        note = "Measured on the held-out test set."
        if any(f"validation_{metric}" in line for line in run.rounds):
            note = "Measured on the held-out test set, and on the validation rows that choose and do not report."
        if run.majority is not None:
            of = " of the test set" if metric == "accuracy" else ""
            note += f" Dashed: the commonest label, which is {run.majority:.4f}{of}."
        if run.best_round is not None:
            note += f" Round {run.best_round}, ringed, is the one that was kept."
        by_round = metric_by_round(run.rounds, metric, run.majority, run.best_round)
        found.append(Figure(f"{metric.capitalize()} by round", note, by_round))
        if all("megabytes" in row for row in rows):
            x = ("megabytes", "megabytes, up and down, all clients")
            chart = lines(rows, x, (metric, metric), rule=MAJORITY)
            note = "The same against all that was sent so far."
            found.append(Figure(f"{metric.capitalize()} by megabyte", note, chart))
        if "hours" in rows[-1]:
            chart = lines(rows, ("hours", "virtual hours"), (metric, metric), rule=MAJORITY)
            note = "The same by the clock of the simulated devices."
            found.append(Figure(f"{metric.capitalize()} by virtual hour", note, chart))
    for name in run.figures:
        if name not in (metric, "loss") and len(measured(run.rounds, name)) > 1:
            better = "more" if run.by(name).higher_is_better else "less"
            by_round = metric_by_round(run.rounds, name, None, run.best_round)
            note = f"Measured on the same rows; {better} is better."
            found.append(Figure(f"{spoken(name)} by round", note, by_round))
    found += _confusion(run)
    losses = [
        {"round": line["round"], "set": label, "loss": line[key]}
        for key, label in (("loss", "test"), ("validation_loss", "validation"), ("train_loss", "training"))
        for line in run.rounds
        if line.get(key) is not None
    ]
    if len({row["round"] for row in losses}) > 1:
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
    if len(errors) > 1:
        chart = lines(errors, ("round", "round"), ("error", "relative error"), whole=True, zero=True)
        note = "How far the aggregate is from the mean of the clients' full weight changes, as a share of it."
        found.append(Figure("Aggregation error by round", note, chart))
    return [*found, *_diagnostics(run)]


_BY_ROUND = {
    "nuclear_norm": "How far the representations of test rows spread; it falls where they collapse.",
    "singular_values_left": "The share of singular values of the mean change that shrinking has left.",
    "left_out": "Clients that stuck out, and weighed nothing.",
}
_BY_LAYER = {
    "effective_rank": "Of the change of each layer so far: 1 where it has one direction.",
    "noise_to_signal": "Of the known noise over the mean change of a round: about 1 where it is noise alone.",
}


def _diagnostics(run: Record) -> Iterator[Figure]:
    """What is known of a round's aggregate, as a whole and by layer."""
    for name, note in _BY_ROUND.items():
        rows = [{"round": r["round"], name: r[name]} for r in run.rounds if r.get(name) is not None]
        if len(rows) > 1:
            drawn = lines(rows, ("round", "round"), (name, spoken(name).lower()), whole=True, zero=True)
            yield Figure(f"{spoken(name)} by round", note, drawn)
    for name, note in _BY_LAYER.items():
        cells = [
            {"round": r["round"], "layer": layer, name: told[name]}
            for r in run.rounds
            for layer, told in r.get("layers", {}).items()
            if told.get(name) is not None
        ]
        if len({cell["round"] for cell in cells}) > 1:
            height = tall(len({cell["layer"] for cell in cells}))
            words = spoken(name).lower()
            by_layer = heat(cells, ("round", "round"), ("layer", "layer"), (name, words), height=height)
            yield Figure(f"{spoken(name)} by layer", note, by_layer)


def _confusion(run: Record) -> Iterator[Figure]:
    """Which label the test rows of each were taken for, where they are few enough to see."""
    labels, counts = run.test.get("labels") or [], run.test.get("confusion") or []
    if not 1 < len(labels) <= MOST_LABELS:
        return
    rows = [
        {"label": label, "taken for": other, "rows": n, "share": n / max(sum(row), 1)}
        for label, row in zip(labels, counts, strict=True)
        for other, n in zip(labels, row, strict=True)
    ]
    chart = heat(
        rows,
        ("taken for", "taken for"),
        ("label", "label"),
        ("share", "share of the label's rows"),
        height=tall(len(labels)),
        number=".0%",
        domain=(0.0, 1.0),
        angle=0 if max(map(len, labels)) * len(labels) < 60 else -45,
    )
    note = f"What test rows of each label were taken for after round {run.test['round']}; a line of it sums to 1."
    yield Figure("Confusion of labels", note, chart)


def spoken(name: str) -> str:
    """A figure's name as a title says it."""
    words = name.replace("_", " ")
    return words[0].upper() + words[1:]


def _privacy(run: Record) -> Sequence[Figure]:
    whole = run.protects == "client"
    asked = run.scenario.get("privacy") or {}
    own = "person" if (asked.get("example") or asked).get("person") else "example"
    stated: list[Row] = []
    if whole or not run.clients:
        stated = [
            {"round": line["round"], "of": "each client" if whole else "largest", "epsilon": line["epsilon"]}
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
            stated.append({"round": round, "of": f"each {own}, {name}" if whole else name, "epsilon": value})
    if len({row["round"] for row in stated}) < 2:
        return []
    note = "Spent so far to protect each client, by the server's noise."
    if not whole:
        note = "Spent so far: the largest over clients, which is what the run states"
        note += ", and the median." if run.clients else "."
    chart = lines(stated, ("round", "round"), ("epsilon", "epsilon"), series="of", whole=True, zero=True)
    found = [Figure("Epsilon by round", note, chart)]
    if each:
        chart_each = heat(
            each, ("round", "round"), ("client", "client"), ("epsilon", "epsilon"), height=tall(len(drawn))
        )
        note = f"Spent so far on the {own}s of each client.{_thinning(len(drawn), total)}"
        found.append(Figure("Epsilon of each client", note, chart_each))
    return found


def _clients(run: Record) -> Sequence[Figure]:
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
        if run.scenario.get("privacy"):
            note += (
                " Exact counts: only the simulator knows them, and epsilon does not cover them. Do not share this "
                "chart where rows are real people's; fedlora report --share leaves it out."
            )
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
        found.append(Figure(title, f"As the client reported it, by round.{_thinning(len(some), total)}", chart))
    return found


def _cost(run: Record) -> Sequence[Figure]:
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
