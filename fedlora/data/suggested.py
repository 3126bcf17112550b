"""Columns whose values look like persons of several rows each: `privacy.person` may be meant, and nobody said it.

Whoever holds the rows is told, and nobody else.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.data.cells import missing
from fedlora.data.names import folded
from fedlora.data.tables import read_table
from fedlora.errors import SettingError, cut
from fedlora.scenario import Files, Natural, Scenario, templates

LEAST = 20  # values: fewer are groups, such as wards
FEW, MANY = 1.2, 50.0  # rows of a value on average, between which it may be a person

_WHO = (
    "patient|person|people|user|author|customer|subject|participant|student|pupil|employee|member|speaker|writer|"
    "reviewer|sender|respondent|individual|citizen|client|insured|borrower|applicant|account|owner|holder|worker"
)
_NAMED = re.compile(rf"(.*_)?(({_WHO})(_?(id|key|no|nr|num|number|name|code|hash|uuid|guid))?|mrn|ssn)")
_BARE = ("id", "uid", "pid", "uuid", "guid")  # of a row, where they do not repeat


def persons(columns: Mapping[str, Sequence[Any]], used: Iterable[str]) -> list[str]:
    """Columns that are called as persons are, and have few rows of each value, as people have them.

    Args:
        columns: of the training rows.
        used: columns that are learnt, or say which client holds a row.
    """
    left = [name for name in columns if name not in {*used} and _tells(name)]
    return [name for name in left if _repeats(columns[name])]


def sentence(name: str, values: int, rows: int) -> str:
    """What to say of such a column."""
    return (
        f"column {cut(name)!r} has {values:,} values in {rows:,} rows: if each value is a person, epsilon covers "
        f"one row of theirs and not all; write privacy.person: {cut(name)} to protect persons"
    )


def of_scenario(scenario: Scenario) -> list[str]:
    """What is to be said of a scenario's training file, where examples are protected and persons are not."""
    held, asked = scenario.data, scenario.example_privacy
    if held.files is None or asked is None or asked.person is not None:
        return []
    by = held.partition.column if isinstance(held.partition, Natural) else None
    return of_file(held.files, held.encoding, (by, held.messages, *templates.columns(held.prompt or "")))


def of_file(files: Files, encoding: str | None, used: Iterable[str | None]) -> list[str]:
    """What is to be said of a training file.

    Args:
        files: that name it, and its columns.
        encoding: of its text.
        used: further columns that are learnt, or say which client holds a row.
    """
    if files.train is None:
        return []
    try:
        table = read_table("data.files.train", Path(files.train), files.columns, encoding)
    except SettingError:
        return []  # who reads the rows says what is wrong
    if table.attrs.get("private"):
        return []
    learnt = [files.text, files.label, *used]
    names = [n for one in learnt if one is not None for n in ([one] if isinstance(one, str) else one)]
    columns = {str(name): table[name].tolist() for name in table.columns if _tells(str(name))}
    return [said(name, columns[name]) for name in persons(columns, names)]


def said(name: str, cells: Sequence[Any]) -> str:
    """`sentence`, with the counts of a column."""
    return sentence(name, *_counts(cells))


def _tells(name: str) -> bool:
    """Whether a column is called as persons are: `patient_id`, `UserId`, `author`, and no `user_age`."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    plain = re.sub(r"\W+", "_", plain).strip("_")
    return plain in _BARE or _NAMED.fullmatch(plain) is not None


def _counts(cells: Sequence[Any]) -> tuple[int, int]:
    """How many values there are, and how many rows have one."""
    plain = [str(cell) for cell in cells if not missing(cell)]
    return len({folded(one) for one in set(plain)}), len(plain)


def _repeats(cells: Sequence[Any]) -> bool:
    if any(isinstance(cell, list | tuple | dict) for cell in cells[:1]):
        return False
    values, rows = _counts(cells)
    return values >= LEAST and FEW <= rows / values <= MANY
