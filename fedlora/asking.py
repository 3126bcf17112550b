"""`fedlora predict` and `fedlora generate`: words of the command line, or a file of them, and what is answered."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedlora.data import chats, reading
from fedlora.data.cells import Column, check_whole, missing
from fedlora.data.tables import read_table
from fedlora.errors import SettingError, UserError, counted, suggestion
from fedlora.evaluating import columns
from fedlora.exporting import About, Answer, adapter_of, generate, predict
from fedlora.record import Record
from fedlora.tasks.contract import Prompt

_KINDS = (".jsonl", ".csv", ".tsv")  # of files of answers


def ask(
    use: Literal["predict", "generate"],
    run: Record | str | Path,
    texts: Sequence[Prompt],
    data: str | Path | None = None,
    text: Sequence[str] | None = None,
    out: str | Path | None = None,
    **how: Any,
) -> list[str]:
    """Have a run's model answer; gives what a terminal shows.

    Args:
        use: what answers, `fedlora.predict` or `fedlora.generate`.
        run: that has ended, its folder, or the folder of an exported adapter.
        texts: to answer.
        data: a file of texts, instead of these.
        text: the column of texts in it, or two for pairs, where it is another than the run's own.
        out: a file to write answers to: `text`, `answer` and `probability`.
        how: further options.

    Raises:
        UserError: there is no text, or a file cannot be read or written.
    """
    file = _to_write(out)
    if bool(texts) is (data is not None):
        raise UserError(f"{use}: give texts, or a file of them by {'--data' if use == 'predict' else '--prompts'}")
    asked = texts if data is None else read(run, data, text)
    answers = (generate if use == "generate" else predict)(run, asked, **how)
    if file is None:
        return [_line(answer) for answer in answers]
    write(file, answers)
    return [f"{file}: {counted(len(answers), 'answer')}"]


def ask_pairs(
    run: Record | str | Path,
    data: str | Path,
    all_pairs: str | Path,
    text: Sequence[str] | None = None,
    out: str | Path | None = None,
    **how: Any,
) -> tuple[list[str], str]:
    """Have a run's model of pairs find the best texts of a file for each of another.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        data: the file of left texts.
        all_pairs: the file of right texts.
        text: the columns of both, where they are others than the run's own.
        out: a file to write pairs to: `left`, `right` and `score`.
        how: further options of `fedlora.pairing.all_pairs`.

    Returns:
        What a terminal shows, and a sentence on what was scored and found.

    Raises:
        UserError: a file cannot be read or written, or the model judges no pairs.
    """
    from fedlora.pairing import all_pairs as search

    file, folder = _to_write(out), adapter_of(run)
    if not About.read(folder).pairs:
        raise UserError(f"{folder}: its model judges single texts: --all-pairs is for models of pairs")
    named = columns(folder, str(data), text, None).text
    both = (named, named) if isinstance(named, str) else named
    left, right = ([str(one) for one in read(run, f, [c])] for f, c in zip((data, all_pairs), both, strict=True))
    found = search(run, left, right, **how)
    rows = [
        {"left": left[i], "right": right[int(j)], "score": float(s)}
        for i, (best, scores) in enumerate(zip(found.best, found.scores, strict=True))
        for j, s in zip(best, scores, strict=True)
    ]
    said = f"the model scored {found.scored:,} of {found.pairs:,} pairs ({found.scored / found.pairs:.0%})"
    if found.recall is not None:
        said += f"; of the true best of {counted(found.checked, 'text')} {found.recall:.0%} were found"
    if file is None:
        return [f"{row['score']:.3f}  {row['left']}  |  {row['right']}" for row in rows], said
    _write(file, rows)
    return [f"{file}: {counted(len(rows), 'pair')}"], said


def _to_write(out: str | Path | None) -> Path | None:
    """A file to write answers to, if that can be.

    Raises:
        UserError: it cannot.
    """
    file = Path(out) if out is not None else None
    if file is not None and file.suffix.lower() not in _KINDS:
        raise UserError(f"{file}: {file.suffix or 'no suffix'} is not one of {', '.join(_KINDS)}")
    if file is not None and not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder")
    return file


def _line(told: Answer) -> str:
    sure = "" if told.probability is None else f"  {told.probability:.3f}"
    return f"{told.answer}{sure}  {told.text}"


def read(run: Record | str | Path, data: str | Path, text: Sequence[str] | None = None) -> list[Prompt]:
    """The texts of a file: its lines, or the rows of a table as the run's own rows are made of their columns.

    Args:
        run: whose model is to answer.
        data: a txt with a text in each line, or a csv, tsv, json, jsonl or parquet.
        text: the column, or two for pairs, where it is another.

    Raises:
        UserError: it cannot be read, has no such column, or a row has nothing there.
    """
    path, about = Path(data), About.read(folder := adapter_of(run))
    try:
        if path.suffix.lower() == ".txt":
            found: list[Prompt] = [line for line in _lines(path) if line.strip()]
        else:
            found = _rows(path, about, folder, text)
    except SettingError as error:
        raise UserError(f"{error.message}{' (--text)' if error.key == 'data.files.text' else ''}") from error
    if not found:
        raise UserError(f"{path}: holds no text")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _rows(path: Path, about: About, folder: Path, text: Sequence[str] | None) -> list[Prompt]:
    named = columns(folder, str(path), text, None)
    table = read_table("data", path, named.columns)

    def cells(key: str, name: str) -> list[Any]:
        if name not in table.columns:
            known = [str(column) for column in table.columns]
            raise SettingError(key, f"{path} has no column {name!r}: {suggestion(name, known)}")
        check_whole(table[name].tolist(), Column("data", str(path), name))
        return list(table[name])

    if text is None and about.messages is not None:
        held, column = cells("data.messages", about.messages), Column("data", str(path), about.messages)
        return [chats.asked(cell, row, column) for row, cell in enumerate(held, 1)]
    if text is None and about.prompt is not None:
        return [*reading.prompts_of(about.prompt, cells, str(path))]
    names = (named.text,) if isinstance(named.text, str) else named.text
    every = [[*enumerate(cells("data.files.text", name), 1)] for name in names]
    parts = [
        [_text(cell, row, Column("data", str(path), name)) for row, cell in told]
        for name, told in zip(names, every, strict=True)
    ]
    if len(parts) == 1:
        return [*parts[0]]
    return ["\t".join(part.replace("\t", " ") for part in row) for row in zip(*parts, strict=True)]


def _text(cell: Any, row: int, column: Column) -> str:
    """A cell as a text; of a list of words these with spaces between them."""
    if not isinstance(cell, str) and hasattr(cell, "__len__"):
        return " ".join(map(str, cell))
    if missing(cell):
        raise column.wrong(row, "is empty")
    return str(cell)


def write(file: Path, answers: Sequence[Answer]) -> None:
    """Write answers, a row each, as the file's suffix says: jsonl, csv or tsv."""
    _write(file, [asdict(answer) for answer in answers])


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        if file.suffix.lower() == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        made = csv.DictWriter(stream, list(rows[0]), delimiter="," if file.suffix.lower() == ".csv" else "\t")
        made.writeheader()
        made.writerows(rows)
