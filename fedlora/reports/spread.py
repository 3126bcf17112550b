"""Tables of a run's page: figures of labels, how figures differ between clients, and who goes with whom."""

import statistics
from collections.abc import Iterator

from fedlora.errors import cut
from fedlora.record import Record
from fedlora.reports.figures import MOST_LABELS
from fedlora.reports.page import scrolled
from fedlora.reports.tables import Table
from fedlora.rounds.diagnostics import GROUPS

_NAMED = 100  # clients in a table
_TOGETHER = 20  # clients of a group that are named
_PAIRS = 30  # of labels that are taken for each other, in a table


def by_label(run: Record) -> Iterator[str]:
    """Precision, recall, F1 and rows of each label; of many labels which are taken for which most often."""
    classes, labels = run.test.get("classes") or [], run.test.get("labels") or []
    if not classes:
        return
    keys = ("precision", "recall", "f1")
    rows = [[str(c["label"]), *(_share(c[key]) for key in keys), f"{c['rows']:,}"] for c in classes]
    made = Table(("label", "precision", "recall", "F1", "rows"), rows).html(
        f"Of the test rows, after round {run.test['round']}"
    )
    yield f"<h3>Labels</h3>{scrolled(made, 'Figures of each label')}"
    if len(labels) <= MOST_LABELS:
        return
    pairs = [
        (n, label, other)
        for label, row in zip(labels, run.test["confusion"], strict=True)
        for other, n in zip(labels, row, strict=True)
        if n and other != label
    ]
    often = sorted(pairs, key=lambda pair: -pair[0])[:_PAIRS]
    if often:
        table = Table(("label", "taken for", "rows"), [[a, b, f"{n:,}"] for n, a, b in often], frozenset({0, 1}))
        yield f"<h3>Confusion of labels</h3>{scrolled(table.html('The most frequent'), 'Confusion of labels')}"


def names_of(run: Record) -> dict[int, str]:
    """What clients are called, by a natural column; none elsewhere."""
    holders = run.partitions.get("clients") or []
    return {held["client"]: str(held["name"]) for held in holders if "name" in held}


def named_clients(run: Record) -> Iterator[str]:
    """Which client is which value of a natural column, and how many examples, and persons, it holds."""
    holders = run.partitions.get("clients") or []
    if called := names_of(run):
        held = [h for h in holders if h["client"] in called][:_NAMED]
        whom = [word for word in ("examples", "persons") if all(f"num_{word}" in h for h in held)]
        rows = [
            [str(h["client"]), cut(called[h["client"]]), *(f"{h[f'num_{word}']:,}" for word in whom)] for h in held
        ]
        more = f", the first {_NAMED} of {len(called)}" if len(called) > _NAMED else ""
        table = Table(("client", "name", *whom), rows, frozenset({1})).html(f"Clients by name{more}")
        yield f"<h3>Clients by name</h3>{scrolled(table, 'Clients by name')}"


def among_clients(run: Record) -> Iterator[str]:
    """Of each figure that clients reported of themselves the worst, the median, the best and the spread."""
    told: dict[str, dict[int, float]] = {}
    last = max((line["round"] for line in run.clients if any(k.startswith("local_") for k in line)), default=None)
    for line in run.clients:
        if line["round"] == last:
            for key, value in line.items():
                if key.startswith("local_") and isinstance(value, int | float):
                    told.setdefault(key.removeprefix("local_"), {})[line["client"]] = value
    rows, called = [], names_of(run)
    for name, values in told.items():
        if name not in run.figures:
            continue
        worst = (min if run.by(name).higher_is_better else max)(values, key=values.__getitem__)
        best = (max if run.by(name).higher_is_better else min)(values.values())
        spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
        middle = statistics.median(values.values())
        cells = (values[worst], middle, best, spread)
        rows.append(
            [
                name,
                str(len(values)),
                f"{worst} {called.get(worst, '')}".rstrip(),
                *(f"{value:.4f}" for value in cells),
            ]
        )
    if rows:
        head = ("figure", "clients", "worst client", "worst", "median", "best", "standard deviation")
        table = Table(head, rows).html(f"Of clients' own rows, after round {last}")
        yield f"<h3>Clients by their own rows</h3>{scrolled(table, 'Clients by their own rows')}"


def like_minded(run: Record) -> Iterator[str]:
    """Which clients changed the same directions in the last round that says so, and in how many they did."""
    told = [line for line in run.rounds if line.get(GROUPS)]
    several = [group for group in told[-1][GROUPS] if len(group) > 1] if told else []
    if not several:
        return
    called = names_of(run)
    seen = [{client: i for i, group in enumerate(line[GROUPS]) for client in group} for line in told]
    rows = []
    for group in several[:_NAMED]:
        there = [held for held in seen if all(client in held for client in group)]
        joined = sum(len({held[client] for client in group}) == 1 for held in there)
        names = [f"{client} {cut(called.get(client, ''))}".rstrip() for client in group]
        more = f" and {len(names) - _TOGETHER} more" if len(names) > _TOGETHER else ""
        rows.append([f"{', '.join(names[:_TOGETHER])}{more}", str(len(group)), f"{joined} of {len(there)}"])
    head = ("clients", "how many", "rounds together, of those with all of them")
    table = Table(head, rows).html(f"Groups by principal angles, in round {told[-1]['round']}")
    alone = len(seen[-1]) - sum(map(len, several))
    rest = (
        f"<p>{alone} {'client' if alone == 1 else 'clients'} of the round went with nobody.</p>" if alone else ""
    )
    yield f"<h3>Clients that change the same directions</h3>{scrolled(table, 'Groups of clients')}{rest}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
