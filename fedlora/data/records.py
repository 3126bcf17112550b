"""Rows of JSON: an array of objects, objects one after another, or one object of columns."""

import json
import re
from collections.abc import Mapping
from typing import Any

from fedlora.data.cells import halved
from fedlora.data.delimited import Torn

_BLANK = re.compile(r"[ \t\r\n]*")


def read(text: str, suffix: str) -> dict[str, list[Any]]:
    """The cells of every row by column; None where a row has none.

    Args:
        text: of the file.
        suffix: of its name: in a `.json` an object by itself may hold the columns.

    Raises:
        Torn: a line is no row.
    """
    rows = _objects(text)
    for line, row in rows:
        _check_keys(row, line)
        _check_names(row, line)
    if len(rows) == 1:
        ((line, only),) = rows
        if isinstance(only, list):
            rows = [(0, row) for row in only]
        elif isinstance(only, dict) and (columns := _columns(only, suffix)) is not None:
            return columns
        elif isinstance(only, dict) and suffix == ".json" and (inner := _inner(only)) is not None:
            rows = [(0, row) for row in inner]
    names: dict[str, None] = {}
    for at, (line, row) in enumerate(rows, 1):
        if not isinstance(row, dict):
            where = "" if line else f"row {at} "
            raise Torn(line or 1, f'{where}should be an object of columns, such as {{"text": ..., "label": ...}}')
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for _, row in rows] for name in names}


def _objects(text: str) -> list[tuple[int, Any]]:
    """What stands one after another, each with its line: one a line, or over several."""
    found, wrong = [], None
    for line, words in enumerate(text.split("\n"), 1):
        if words.strip():
            try:
                found.append((line, json.loads(words, object_pairs_hook=_object)))
            except (ValueError, RecursionError) as error:
                what = (
                    f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
                )
                wrong = Torn(line, f"is no JSON: {what}")
                break
    if wrong is None:
        return found
    found, at, decoder = [], 0, json.JSONDecoder(object_pairs_hook=_object)
    while (at := _blank(text, at)) < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if text[_blank(text, 0)] == "[" and isinstance(error, json.JSONDecodeError):
                raise Torn(error.lineno, f"is no JSON: {error.msg}, column {error.colno}") from None
            raise wrong from None
        found.append((text.count("\n", 0, at) + 1, value))
        at = end
    return found


class _Twice(dict[str, Any]):
    """An object that has a key twice, of which JSON's readers keep the last alone."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Twice(made)


def _check_keys(value: Any, line: int) -> None:
    """Make sure that no object in a row, or in an array of rows, has a key twice.

    Raises:
        Torn: one has; by its line, and in an array by its row.
    """
    for at, row in enumerate(value, 1) if isinstance(value, list) else [(0, value)]:
        if _twice(row):
            where = f"row {at} " if at else ""
            raise Torn(line, f"{where}has a key twice, of which one would be lost: leave one out")


def _twice(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value, _Twice) or any(_twice(v) for v in value.values() if isinstance(v, dict | list))
    return isinstance(value, list) and any(_twice(v) for v in value if isinstance(v, dict | list))


def _check_names(row: Any, line: int) -> None:
    """Make sure that names of columns can be written out.

    Raises:
        Torn: one cannot.
    """
    for one in row if isinstance(row, list) else [row]:
        if isinstance(one, dict) and any(map(halved, one)):
            raise Torn(line, "the name of a column holds half of a character: write a whole one")


def _blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _columns(told: Mapping[str, Any], suffix: str) -> dict[str, list[Any]] | None:
    """The columns of an object as pandas writes it, {column: {row: cell}} or {column: [cell, ...]}."""
    if (
        suffix != ".json"
        or len({len(held) if isinstance(held, dict | list) else -1 for held in told.values()}) != 1
    ):
        return None
    kinds = {type(held) for held in told.values()}
    if kinds == {dict} and len({tuple(held) for held in told.values()}) == 1:
        return {name: [*held.values()] for name, held in told.items()}
    if kinds == {list} and (len(told) > 1 or _inner(told) is None):
        return {name: [*held] for name, held in told.items()}
    return None


def _inner(told: Mapping[str, Any]) -> list[Any] | None:
    """The rows of an object that holds one list of them, and words beside it, such as {"data": [...]}."""
    lists = [held for held in told.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
    others = [held for held in told.values() if isinstance(held, list | dict)]
    return lists[0] if len(lists) == 1 == len(others) else None
