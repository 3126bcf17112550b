"""Tables whose cells are parted by a sign, as csv and tsv: separators told apart, quotes read as they are meant.

A spreadsheet quotes a cell that holds the separator, a quote or a line break, and doubles its quotes. Files such
as GLUE's quote nothing, and a quote in them is a sign like any other. A row of another number of cells than the
header is refused by its line: nothing is padded, cut or joined.
"""

import csv
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}
"""What may stand between cells by a file's suffix, the likeliest first."""

_NAME = re.compile(r"[^\W\d][\w.\-#]{0,29}")  # of a column, rather than a text
_SAID = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # a first line that spreadsheets write and read

logger = logging.getLogger(__name__)


class Torn(Exception):
    """A line that is no row; `line` counts from 1. Its words hold none of the file's."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def read(text: str, suffix: str, columns: Sequence[str] | None, source: str) -> dict[str, list[str]]:
    """The cells of a table by column.

    Args:
        text: of the file.
        suffix: of its name.
        columns: names for a file without a header.
        source: the file, for what is logged.

    Raises:
        Torn: a line is no row.
    """
    skipped = 0
    if said := _SAID.match(text):
        text, skipped, separators = text[said.end() :], 1, said[1]
    else:
        separators = SEPARATORS[suffix]
    try:
        rows = _rows(text, separators, len(columns) if columns else None, source)
    except Torn as torn:
        raise Torn(torn.line + skipped, str(torn)) from None
    if columns is None:
        if not rows:
            raise Torn(1 + skipped, "holds no header: write the names of the columns")
        names = [name.strip() or f"column {at}" for at, name in enumerate(rows[0], 1)]
        rows = rows[1:]
        if twice := next((name for name in names if names.count(name) > 1), None):
            at = names.index(twice) + 1
            raise Torn(1 + skipped, f"the name of column {at} stands there twice: give columns names of their own")
    else:
        names = [*columns]
        if rows and [cell.strip() for cell in rows[0]] == names:
            raise Torn(1 + skipped, "is a header already: leave data.files.columns out")
    if not text.endswith(("\n", "\r")):
        _tell_cut(rows, source)
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _tell_cut(rows: Sequence[Sequence[str]], source: str) -> None:
    """Say where a last line without an end may be half of one: its last cell is new in a column of few values."""
    *before, last = [row[-1] for row in rows] or [""]
    if 0 < 2 * len({*before}) <= len(before) and last not in before:
        logger.warning(
            "%s: its last line has no end, and the last cell of it is like no other of its column: if the file "
            "was cut there, leave the row out; if not, end the line",
            source,
        )


def looks_named(cells: dict[str, list[str]]) -> bool:
    """Whether the first line of a table reads as names of columns, and not as a row: then it may be shown.

    Names are single words that do not stand in their column again, as a label of a row would.
    """
    plain = all(_NAME.fullmatch(name) or not name.strip() for name in cells)
    return plain and not any(name in column for name, column in cells.items())


def _rows(text: str, separators: str, width: int | None, source: str) -> list[list[str]]:
    """Every row, the header among them, by the first separator that fits all of them.

    Raises:
        Torn: none does; what is wrong is by the likeliest.
    """
    wrong: Torn | None = None
    for separator in _likely(text, separators, width):
        try:
            return _parted(text, separator, width, source)
        except Torn as torn:
            wrong = wrong or torn
    assert wrong is not None
    raise wrong


def _likely(text: str, separators: str, width: int | None) -> list[str]:
    """The separators that part the first line; where none does it has one cell."""
    found = []
    for separator in separators:
        first: list[str] = next(islice((r for r in _Reader(text, separator, csv.QUOTE_NONE) if any(r)), 1), [])
        if len(first) == width or (width is None and len(first) > 1):
            found.append(separator)
    return found or [separators[0]]


def _parted(text: str, separator: str, width: int | None, source: str) -> list[list[str]]:
    """Rows by a separator, with quotes as a spreadsheet writes them or, in a table of tabs, as any sign.

    Raises:
        Torn: a row has another number of cells than the first.
    """
    plain: list[list[str]] | None = None
    if separator == "\t" or '"' in text:
        try:
            plain = _read(text, separator, csv.QUOTE_NONE, width)
        except Torn:
            plain = None
    if '"' not in text and plain is not None:
        return plain
    try:
        quoted = _read(text, separator, csv.QUOTE_MINIMAL, width)
    except Torn:
        if separator == "\t" and plain is not None:
            return plain
        raise
    if plain is None or len(plain) == len(quoted):
        return quoted
    if separator == "\t":  # each line is a row: quotes that would join some are words of theirs
        return plain
    logger.warning(
        "%s: read as %d rows, some with line breaks between quotes; were the quotes a part of the texts, it would "
        "be %d: look at the count",
        *(source, len(quoted), len(plain)),
    )
    return quoted


class _Reader:
    """Rows with the number of the last line that was read."""

    def __init__(self, text: str, separator: str, quoting: int) -> None:
        csv.field_size_limit(sys.maxsize)
        lines = io.StringIO(text, newline="")
        if quoting == csv.QUOTE_NONE:
            self.rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
        else:
            self.rows = csv.reader(lines, delimiter=separator, strict=True)

    def __iter__(self) -> Iterator[list[str]]:
        return self.rows

    @property
    def line(self) -> int:
        return self.rows.line_num


def _read(text: str, separator: str, quoting: int, width: int | None) -> list[list[str]]:
    found: list[list[str]] = []
    reader, began = _Reader(text, separator, quoting), 1
    named = width is None
    try:
        for row in reader:
            if not row or (len(row) == 1 and row[0] and not row[0].strip()):
                began = reader.line + 1
                continue  # a blank line, and no empty text between quotes
            width = len(row) if width is None else width
            while len(row) > width and not row[-1]:
                row.pop()  # separators at the end of a line
            if len(row) != width:
                there = "the header has" if named else "data.files.columns names"
                cells = f"{len(row)} cell{'' if len(row) == 1 else 's'}"
                hint = f"; quote a text that holds {separator!r}" if len(row) > width else ""
                raise Torn(began, f"has {cells}, and {there} {width}{hint}")
            found.append(row)
            began = reader.line + 1
    except csv.Error:
        what = "a quote opens in this row that is not closed, or not doubled within a text"
        raise Torn(began, what) from None
    return found
