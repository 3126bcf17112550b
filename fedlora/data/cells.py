"""Cells of label columns: the labels of a row, or its scores; errors name the row, and never the text."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from fedlora import plugins
from fedlora import scenario as settings
from fedlora.errors import SettingError

Label = str | tuple[str, ...] | tuple[float, ...]
"""What a row is taught by: a class or a completion, a set of labels, scores from 0 to 1, or two completions."""

NO_SCALE = "say from where to where scores go, as {low: 0, high: 5}: clients' rows are not looked at for it"

OWNED = ("data.partition.column", "privacy.person")
"""Keys of columns of names: whose a row is, and which person it is of."""

SEPARATORS = ("|", ";", ",")
"""What may stand between labels where nobody says."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A column of labels, and how messages name it.

    Attributes:
        setting: the key that names it.
        source: the file, or the dataset.
        name: its own.
    """

    setting: str
    source: str
    name: str

    def wrong(self, row: int, what: str) -> SettingError:
        """What is wrong with a cell; `row` counts from 1."""
        return SettingError(self.setting, f"{self.source}: row {row}: {self.name!r} {what}")


@dataclass(frozen=True)
class Taught:
    """How a task has the cells of its columns of labels read.

    Attributes:
        target: as `Task.target` says.
        score: the scale of scores; None where there are none.
        labels: that there may be; None: any.
        usual: names of columns where nobody names them.
        messages: the column of chats; None where rows have a prompt or a text.
        scored: which turns of the assistant are judged.
        prompt: the template of prompts; None where a column has them.
        encoding: of files; None: UTF-8, or what their marks say.
        person: the column that says which person a row is of; None where nobody asks.
    """

    target: str
    score: settings.Score | None
    labels: tuple[str, ...] | None = None
    usual: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    messages: str | None = None
    scored: Literal["all", "last"] = "all"
    prompt: str | None = None
    encoding: str | None = None
    person: str | None = None

    @classmethod
    def of(cls, data: settings.Data, task: str, person: str | None = None) -> Self:
        """By a scenario, and the column of the persons whom it protects."""
        told = (plugins.find("tasks", task).target, data.score, data.labels, settings.COLUMNS_OF.get(task, {}))
        return cls(*told, data.messages, data.scored, data.prompt, data.encoding, person)

    def read(
        self,
        named: settings.Hub | settings.Files,
        source: str,
        plain: Callable[[str], list[str]],
        cells: Callable[[str], list[Any]],
    ) -> Sequence[Label] | None:
        """The labels of rows, or their scores.

        Args:
            named: the columns.
            source: the file or the dataset, for errors.
            plain: gives a column as text, of which no cell may be empty.
            cells: gives a column as it is.

        Raises:
            SettingError: a cell is not what the task reads.
        """
        if named.label is None:
            return None
        names = (named.label,) if isinstance(named.label, str) else named.label
        key = f"data.{'files' if isinstance(named, settings.Files) else 'hub'}.label"
        if self.target == "many":
            held, told_of = cells(names[0]), Column(key, source, names[0])
            return label_sets(held, named.separator or separator(held, self.labels or ()), told_of)
        if self.target == "score":
            if self.score is None:
                raise SettingError("data.score", NO_SCALE)
            told = [Column(key, source, name) for name in names]
            return scores([cells(name) for name in names], self.score.low, self.score.high, told)
        if self.target == "pair":
            if len(names) != 2:
                raise SettingError(key, "should be two columns, of completions that were chosen and rejected")
            columns = [Column(key.replace("label", "text"), source, str(named.text))]
            columns += [Column(key, source, name) for name in names]
            return completions([cells(column.name) for column in columns], columns)
        return plain(names[0])


def separator(cells: Sequence[Any], labels: Sequence[str]) -> str | None:
    """What stands between the labels of cells, where nobody says; None where no cell is text.

    The first of `SEPARATORS` that occurs and that no label has; where none does the first of all, so that other
    marks in other files are taken for parts of labels.

    Args:
        cells: lists of labels, or labels as text.
        labels: that are known.
    """
    texts = [cell for cell in cells if isinstance(cell, str)]
    free = [mark for mark in SEPARATORS if not any(mark in label for label in labels)]
    found = next((mark for mark in free if any(mark in text for text in texts)), None)
    return found or (SEPARATORS[0] if texts and SEPARATORS[0] in free else None)


def label_sets(cells: Sequence[Any], separator: str | None, column: Column) -> list[tuple[str, ...]]:
    """The labels of each row, each once, in their order; of an empty cell or list none.

    Args:
        cells: lists of labels, or labels as text with a separator between them.
        separator: None: texts are one label each.
        column: that they are of.

    Raises:
        SettingError: a cell is no list of labels, has an empty label, or no cell has any.
    """
    made: list[tuple[str, ...]] = []
    for row, cell in enumerate(cells, 1):
        if missing(cell):
            made.append(())
            continue
        if isinstance(cell, str):
            parts: list[Any] = cell.split(separator) if separator else [cell]
        elif hasattr(cell, "tolist") or isinstance(cell, list | tuple):  # of a parquet file an array
            parts = list(cell)
        else:
            parts = [cell]
        if any(not isinstance(part, str) and (missing(part) or hasattr(part, "__len__")) for part in parts):
            raise column.wrong(row, "is no list of labels")
        names = [str(part).strip() for part in parts]
        if not all(names):
            raise column.wrong(row, "has an empty label")
        made.append(tuple(dict.fromkeys(names)))
    if made and not any(made):
        raise SettingError(column.setting, f"{column.source}: no row has a label in {column.name!r}")
    if empty := made.count(()):
        logger.warning("%s: %d of %d rows have no label: none is what they teach", column.source, empty, len(made))
    return made


def scores(
    columns: Sequence[Sequence[Any]], low: float, high: float, told: Sequence[Column]
) -> list[tuple[float, ...]]:
    """The scores of each row, from 0 at `low` to 1 at `high`.

    Raises:
        SettingError: a cell is empty, no number, not finite, or outside of the scale.
    """
    return [*zip(*(_scaled(cells, low, high, of) for cells, of in zip(columns, told, strict=True)), strict=True)]


def _scaled(cells: Sequence[Any], low: float, high: float, column: Column) -> list[float]:
    made = []
    for row, cell in enumerate(cells, 1):
        if missing(cell):
            raise column.wrong(row, "is empty, and should be a number")
        try:
            value = math.nan if isinstance(cell, bool) else float(cell)
        except (TypeError, ValueError, OverflowError):
            raise column.wrong(row, "is no number") from None
        if not math.isfinite(value):
            raise column.wrong(row, "is no finite number")
        if not low <= value <= high:
            raise column.wrong(row, f"is outside of {low:g} to {high:g} (data.score)")
        made.append((value - low) / (high - low))
    return made


def completions(cells: Sequence[Sequence[Any]], columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """The chosen and the rejected completion of each row.

    Args:
        cells: of the prompts, of the chosen and of the rejected completions.
        columns: that they are of.

    Raises:
        SettingError: one is empty or no text, or both completions of a row are the same.
    """
    made: list[tuple[str, ...]] = []
    for number, row in enumerate(zip(*cells, strict=True), 1):
        for cell, column in zip(row, columns, strict=True):
            if missing(cell):
                raise column.wrong(number, "is empty")
            if not isinstance(cell, str):
                raise column.wrong(number, "is no text")
        _, chosen, rejected = row
        if chosen == rejected:
            raise columns[2].wrong(number, f"is the same as {columns[1].name!r}: leave the row out")
        made.append((chosen, rejected))
    return made


def words(cells: Sequence[Any], column: Column, whole: bool = False) -> list[str]:
    """Cells as text: texts and numbers, and of labels truth values; a float that is a whole number is one.

    Args:
        cells: of which none is empty.
        column: that they are of.
        whole: whether they are names, of labels or owners: where all are written as whole numbers, `1.0` is `1`.

    Raises:
        SettingError: a cell is a list, a mapping or anything else that is no text.
    """
    made = []
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, str):
            made.append(cell)
        elif isinstance(cell, bool | np.bool_):
            if not whole:
                raise column.wrong(row, "is no text")
            made.append(str(bool(cell)))
        elif isinstance(cell, int | np.integer):
            made.append(str(int(cell)))
        elif isinstance(cell, float | np.floating):
            value = float(cell)
            made.append(str(int(value)) if value.is_integer() and abs(value) < _WHOLE else repr(value))
        elif whole and hasattr(cell, "isoformat"):
            made.append(str(cell))  # a day
        else:
            kind = "a list" if hasattr(cell, "__len__") and not isinstance(cell, Mapping | bytes) else "no text"
            kind = "an object of keys" if isinstance(cell, Mapping) else kind
            raise column.wrong(row, f"is {kind}, and should be text: name another column, or write it out")
    if whole and all(map(_NUMBER.fullmatch, made)):
        return [cell.partition(".")[0] for cell in made]
    return made


def check_whole(cells: Sequence[Any], column: Column) -> None:
    """Make sure that every text in a column can be written out, in lists and objects too.

    Raises:
        SettingError: one holds half of a pair of UTF-16, as JSON may spell it.
    """
    for row, cell in enumerate(cells, 1):
        if halved(cell):
            raise column.wrong(row, "holds half of a character, from \\ud800 to \\udfff: write a whole one")


def halved(cell: Any) -> bool:
    """Whether a text, or one in a list or an object, holds half of a pair of UTF-16."""
    if isinstance(cell, str):
        return not cell.isascii() and _HALF.search(cell) is not None
    if isinstance(cell, Mapping):
        return any(halved(key) or halved(value) for key, value in cell.items())
    if isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.dtype == object):
        return any(map(halved, cell))
    return False


_HALF = re.compile("[\ud800-\udfff]")
_NONE = ("NAType", "NaTType")  # of pandas
_WHOLE = 2**53  # below it floats have every whole number
_NUMBER = re.compile(r"-?\d+(\.0*)?")


def missing(cell: Any) -> bool:
    """Whether a cell is empty, as files have it; an empty list is not."""
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or type(cell).__name__ in _NONE or (isinstance(cell, float) and math.isnan(cell))
