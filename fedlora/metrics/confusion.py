"""Which label the rows of each were taken for, and what that says of single labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora.metrics.contract import Evaluation

CONFUSION = "confusion"  # among the figures of an evaluation
MOST = 200  # labels that are told apart in a run's record

Counts = Sequence[Sequence[int]]
"""Of each label, in order, how many of its rows were taken for each, (labels, labels)."""


def tells(target: str, labels: Sequence[str]) -> bool:
    """Whether rows with such a target and such labels can be told apart."""
    return target == "class" and 1 < len(labels) <= MOST


def confusion(found: Evaluation, labels: int) -> list[list[int]]:
    """The counts, by the likeliest label of each row."""
    assert found.outputs is not None and found.targets is not None
    pairs = found.targets * labels + found.outputs.argmax(-1)
    counts: list[list[int]] = np.bincount(pairs, minlength=labels**2).reshape(labels, labels).tolist()
    return counts


def by_label(labels: Sequence[str], counts: Counts) -> list[dict[str, Any]]:
    """Of each label `label, precision, recall, f1, rows`; a share of nothing is None."""
    table = np.asarray(counts, np.int64)
    right, taken, rows = np.diag(table), table.sum(0), table.sum(1)
    return [
        {
            "label": label,
            "precision": _share(right[k], taken[k]),
            "recall": _share(right[k], rows[k]),
            "f1": _share(2 * right[k], taken[k] + rows[k]),
            "rows": int(rows[k]),
        }
        for k, label in enumerate(labels)
    ]


def told(round: int, labels: Sequence[str], counts: Counts) -> dict[str, Any]:
    """What `test.json` holds: `round`, `labels`, `confusion` and `classes`."""
    return {
        "round": round,
        "labels": list(labels),
        CONFUSION: [list(row) for row in counts],
        "classes": by_label(labels, counts),
    }


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
