"""Tables on disk: csv, tsv, json, jsonl, parquet, and CoNLL files."""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.data import delimited, records, tagged
from fedlora.errors import SettingError, cut, suggestion

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OTHERS = {  # by their first bytes
    b"PK\x03\x04": "a zip archive, as a workbook of a spreadsheet is",
    b"\xd0\xcf\x11\xe0": "a workbook of a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"%PDF": "a PDF",
    b"PAR1": "a parquet file",
    b"SQLite format 3": "a database",
}
_PLAIN = (".csv", ".tsv", ".json", ".jsonl", *tagged.SUFFIXES)


def read_table(key: str, path: Path, columns: Sequence[str] | None, encoding: str | None = None) -> Any:
    """A file as a data frame whose cells are as the file has them; those of a csv or tsv are text.

    Args:
        key: of the scenario, that names the file.
        path: of the file.
        columns: names for a file without a header.
        encoding: of its text, as Python calls it; None: UTF-8, or what its mark says.

    Raises:
        SettingError: it cannot be read; a line that is torn is named by its number.
    """
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in (*_PLAIN, ".parquet"):
        kinds = ", ".join((".csv", ".tsv", ".json", ".jsonl", ".parquet", *tagged.SUFFIXES))
        raise SettingError(key, f"{path}: {suffix or 'no suffix'} is not one of {kinds}")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        content = path.read_bytes()
        if other := next((what for begin, what in _OTHERS.items() if content.startswith(begin)), None):
            raise SettingError(key, f"{path}: is {other}, whatever its name says: save its rows as {suffix[1:]}")
        text = decoded(path, content, encoding)
        if not text.strip():
            raise SettingError(key, f"{path}: is empty")
        held: Mapping[str, Sequence[Any]]
        plain = False  # whether the first line may be a row
        if suffix in tagged.SUFFIXES:
            held = tagged.read_conll(key, path, text, columns)
        elif suffix in (".json", ".jsonl"):
            held = records.read(text, suffix)
        else:
            held = cells = delimited.read(text, suffix, columns, str(path))
            plain = columns is None and not delimited.looks_named(cells)
        table = pd.DataFrame({name: pd.Series([*column], dtype=object) for name, column in held.items()})
        table.attrs["private"] = plain
        return table
    except SettingError:
        raise
    except delimited.Torn as torn:
        raise SettingError(key, f"{path}:{torn.line}: {torn}") from None
    except FileNotFoundError as error:
        raise SettingError(key, f"no such file: {path}{_read_from(path)}") from error
    except OSError as error:
        raise SettingError(key, f"{path} is not readable as {suffix[1:]}: {error.strerror or error}") from error
    except Exception as error:  # a reader has errors of its own, whose words may hold cells
        raise SettingError(key, f"{path} is not readable as {suffix[1:]}: {type(error).__name__}") from error


def _read_from(path: Path) -> str:
    """From where a relative path was read."""
    return "" if path.is_absolute() else f" (read from the folder {Path.cwd()})"


def decoded(path: Path, held: bytes, encoding: str | None) -> str:
    """The text of a file without its mark.

    Raises:
        SettingError: of `data.encoding`; the file is not written so.
    """
    mark, name = next(((m, n) for m, n in _MARKS if held.startswith(m)), (b"", encoding or "utf-8"))
    try:
        text = held[len(mark) :].decode(name)
    except UnicodeError as error:
        at = getattr(error, "start", None)
        where = "" if at is None else f" (line {held.count(bytes([10]), 0, at) + 1})"
        asked = f"{path} is not written in {name}{where}: "
        if encoding is None or mark:
            asked += "say how it is, such as data.encoding: cp1252, or save it as UTF-8"
        else:
            asked += "name another data.encoding, or save it as UTF-8 and leave that out"
        raise SettingError("data.encoding", asked) from None
    if (at := text.find("\0")) < 0:
        return text
    head = text[:1000]
    if 4 * head.count("\0") >= len(head):
        order = "be" if head[::2].count("\0") > head[1::2].count("\0") else "le"
        asked = f"{path} holds NUL characters, as UTF-16 without a mark does: write data.encoding: utf-16-{order}"
    else:
        line = text.count("\n", 0, at) + 1
        asked = f"{path}:{line}: holds a NUL character, which is no part of a text: take it out"
    raise SettingError("data.encoding", asked)


def no_column(key: str, path: object, name: str, table: Any) -> SettingError:
    """That a table has no column of a name; which it has is not shown where its first line may be a row."""
    missing = f"{path} has no column {cut(name)!r}"
    if table.attrs.get("private"):
        return SettingError(
            key,
            f"{missing}, and its first line does not read as names of columns: if it is a row, name the columns "
            f"by data.files.columns, in order, {len(table.columns)} of them",
        )
    return SettingError(key, f"{missing}: {suggestion(name, [str(c) for c in table.columns])}")
