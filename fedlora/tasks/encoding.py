"""Rows as a task encodes them, held to what it promises: what is wrong is told by row, never by what stands there.

Of some texts a tokenizer makes no token, and a model has nothing to compute by. Such a row is read as one token,
by which only the row as a whole is judged. It is not refused: whether a site answers would tell what one of its
rows holds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlora.data.reading import Rows
from fedlora.data.store import Encoded
from fedlora.errors import SettingError, UserError
from fedlora.tasks.base_model import filler
from fedlora.tasks.contract import UNSCORED, Task


def encoded(task: type[Task], use: str, reader: Any, rows: Rows, names: Sequence[str], max_length: int) -> Encoded:
    """What a task makes of rows, none of them without a token.

    Args:
        task: that encodes.
        use: its name.
        reader: as the task gives it.
        rows: of one split.
        names: of the labels, in order.
        max_length: the most tokens of an example.

    Raises:
        SettingError: it fails, of which the kind and the row are told, or breaks its promise.
    """
    try:
        made = task.encode(reader, rows, names, max_length)
    except UserError:
        raise
    except Exception as error:
        at, count = _failing(task, reader, rows, names, max_length), len(rows.texts)
        where = "" if at is None else f" at row {at} of {count}"
        raise SettingError("task", f"{use}.encode fails{where}: {type(error).__name__}") from error
    _check(made, task, use, len(rows.texts), names)
    return _filled(made, reader) if task.tokens else made


def _failing(task: type[Task], reader: Any, rows: Rows, names: Sequence[str], max_length: int) -> int | None:
    """The first row, from 1, that fails by itself; None where none does."""
    for at, text in enumerate(rows.texts):
        try:
            task.encode(
                reader, Rows([text], None if rows.labels is None else [rows.labels[at]]), names, max_length
            )
        except Exception:
            return at + 1
    return None


def _check(made: Any, task: type[Task], use: str, count: int, names: Sequence[str]) -> None:
    """Make sure that so many rows were encoded as the contract says.

    Raises:
        SettingError: they were not.
    """
    if not isinstance(made, Encoded):
        raise SettingError("task", f"{use}.encode returns {type(made).__name__}, and should a fedlora.Encoded")
    parts = {"tokens": made.tokens, "targets": made.targets, "types": made.types, "marks": made.marks}
    for what, found in parts.items():
        if found is not None and len(found) != count:
            raise SettingError("task", f"{use}.encode makes {len(found)} {what} of {count} rows: one for each")
    try:
        targets = made.held
        whole = all(np.asarray(row).dtype.kind in "iu" for row in made.tokens if len(row))
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise SettingError("task", f"{use}.encode makes tokens or targets that are no whole numbers")
    if task.target == "class":
        if task.labelled and names and count and not 0 <= targets.min() <= targets.max() < len(names):
            raise SettingError("task", f"{use}.encode makes targets beyond the {len(names)} labels")
    elif task.target in ("many", "score") and not (
        targets.shape == (count, len(names)) and np.all((targets >= 0) & (targets <= 1))
    ):
        raise SettingError("task", f"{use}.encode makes targets that are not from 0 to 1, one for each of {names}")
    if made.marks is not None:
        each = zip(made.tokens, made.marks, strict=True)
        most = len(names) if task.labelled else 1
        if any(len(tokens) != len(marks) or max(marks, default=0) >= most for tokens, marks in each):
            raise SettingError("task", f"{use}.encode makes marks that are not one of a label for each token")


def _filled(made: Encoded, reader: Any) -> Encoded:
    """The same with a token for each row that has none."""
    if not (empty := sum(not len(row) for row in made.tokens)):
        return made

    def whole(parts: Sequence[Any], instead: int) -> list[Any]:
        return [part if len(part) else [instead] for part in parts]

    return replace(
        made,
        tokens=whole(made.tokens, filler(reader)),
        types=None if made.types is None else whole(made.types, 0),
        marks=None if made.marks is None else whole(made.marks, UNSCORED),
        empty=empty,
    )
