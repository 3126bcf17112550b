"""Labels and scores of rows as numbers: what examples are taught by, and what partitions tell rows apart by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.reading import Rows


def one_each(rows: Rows, names: Sequence[str]) -> NDArray[np.int64]:
    """The number of each row's label, (rows,)."""
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[str(label)] for label in rows.labels or ()], np.int64)


def several(rows: Rows, names: Sequence[str]) -> NDArray[np.uint8]:
    """1 for each label of a row, (rows, labels)."""
    number: dict[Any, int] = {name: i for i, name in enumerate(names)}
    made = np.zeros((len(rows.texts), len(names)), np.uint8)
    for row, held in enumerate(rows.labels or ()):
        made[row, [number[name] for name in held]] = 1
    return made


def scores(rows: Rows, names: Sequence[str]) -> NDArray[np.float32]:
    """The scores of each row, from 0 to 1, (rows, scores)."""
    return np.asarray(rows.labels, np.float32).reshape(len(rows.texts), len(names))


BY_TARGET: Mapping[str, Callable[[Rows, Sequence[str]], NDArray[Any]]] = {
    "class": one_each,
    "many": several,
    "score": scores,
}
"""What makes them, by the target of a task."""
