"""Records whose lines follow from one another, so that one that was edited, moved, taken out or cut off shows.

Each line of JSON ends in `chain`, a hash over the line and the chain of the line before it. A file beside the
record, with the ending `.head`, has how many lines there are and the chain of the last. What an interruption
leaves is no damage: a last line that is cut short, and whole lines that the head does not count yet. Whoever can
write to the disk can rebuild both files: this finds accidents and careless edits, not a forger.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import UserError


def read(file: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The lines of a record.

    Args:
        file: the record.
        torn: whether a last line that was cut short is passed over.

    Raises:
        UserError: a line is not whole, or the file cannot be read.
    """
    try:
        texts = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    lines = []
    if texts[-1] and not torn:
        raise UserError(f"{file}:{len(texts)}: the last line is cut short; the record is damaged")
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not a line of JSON; the record is damaged") from error
        if not isinstance(line, dict):
            raise UserError(f"{file}:{number}: not a JSON object; the record is damaged")
        lines.append(line)
    return lines


def verified(
    file: Path, checked: Callable[[str, Mapping[str, Any]], object], headless: bool = False
) -> list[dict[str, Any]]:
    """The whole lines of a record, each checked by itself, against those before it and by the head.

    Args:
        file: the record, or a copy.
        checked: is told where a line stands and what it is, and raises where it is none of this record.
        headless: whether it may be a copy without its head.

    Raises:
        UserError: it is not as it was written.
    """
    head = read_head(file)
    lines = [] if head is not None and not file.exists() else read(file, torn=True)
    chain, number = "", 0
    for number, line in enumerate(lines, 1):
        checked(f"{file}:{number}", line)
        if "chain" not in line:
            raise UserError(f"{file}:{number}: lacks or garbles 'chain'; the record is damaged")
        chain = link(chain, {k: v for k, v in line.items() if k != "chain"})
        if line["chain"] != chain:
            raise UserError(
                f"{file}:{number}: does not follow from the lines before it: it was edited, or a line was moved "
                "or taken out; restore the file, or start again in another folder"
            )
        if head is not None and number == head[0] and chain != head[1]:
            raise UserError(
                f"{file}:{number}: is not the line that {head_of(file).name} counts: another run's ledger"
            )
    if head is None and lines and not headless:
        raise UserError(f"{head_of(file)}: is missing; without it nobody can say whether {file.name} was cut")
    if head is not None and number < head[0]:
        raise UserError(
            f"{file}:{number + 1}: was cut: {number} lines are left of {head[0]}; restore the file, or start "
            "again in another folder"
        )
    return lines


def link(chain: str, line: Mapping[str, Any]) -> str:
    """The chain of a line that follows a line of a chain; that of the first follows nothing."""
    return hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()[:32]


def head_of(file: Path) -> Path:
    """The file that counts a record's lines."""
    return file.with_suffix(".head")


def read_head(file: Path) -> tuple[int, str] | None:
    """How many lines a record has and the chain of the last; None where it has no head.

    Raises:
        UserError: the head is damaged.
    """
    try:
        lines, chain = head_of(file).read_text(encoding="ascii").split(" ")
        return int(lines), chain.strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{head_of(file)}: cannot be read: {error}") from error


def write_head(file: Path, lines: int, chain: str) -> None:
    """Write a record's head, and wait until it is on disk."""
    part = file.with_suffix(".head.part")
    with part.open("w", encoding="ascii") as stream:
        stream.write(f"{lines} {chain}\n")
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(head_of(file))
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a new file's name is on disk only then
    finally:
        os.close(folder)
