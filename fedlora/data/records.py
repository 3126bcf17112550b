"""Rows of JSON: an array of objects, objects one after another, or one object of columns."""

import json
import re
from collections.abc import Mapping
from typing import Any

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
                found.append((line, json.loads(words)))
            except (ValueError, RecursionError) as error:
                what = (
                    f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
                )
                wrong = Torn(line, f"is no JSON: {what}")
                break
    if wrong is None:
        return found
    found, at, decoder = [], 0, json.JSONDecoder()
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
