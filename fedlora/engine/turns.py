"""Replies in the order of clients, in whatever order they come.

A sum of floats depends on the order of its terms, and a run at sites gives the same bits as its simulation. So a
reply waits for those of the clients before it, as bytes in a file that no folder shows; in memory up to `SPOOL`.
A linear aggregate of any number of sites then takes the memory of one adapter.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from flwr.app import Message, RecordDict

from fedlora import wire

SPOOL = 2**26  # bytes that wait in memory; more wait on disk


@dataclass(frozen=True)
class Reply:
    """What a client answered.

    Attributes:
        content: of its message; None where it failed.
        seconds: that it took.
        error: how it failed.
    """

    content: RecordDict | None
    seconds: float
    error: str = ""

    @classmethod
    def of(cls, message: Message, seconds: float) -> "Reply":
        """From a message."""
        if message.has_error():
            return cls(None, seconds, message.error.reason or "failed without a word")
        return cls(message.content, seconds)


def in_turn(
    cohort: Sequence[int], answers: Iterable[tuple[int, Reply]], folder: Path | None = None
) -> Iterator[Reply | None]:
    """The reply of each client of a cohort, one after another; None of those that did not answer.

    Args:
        cohort: client ids.
        answers: as they come; of each client the first counts.
        folder: where replies wait; None: where temporary files are.
    """
    order = {client: turn for turn, client in enumerate(cohort)}
    turn = 0
    with tempfile.SpooledTemporaryFile(SPOOL, dir=None if folder is None else str(folder)) as file:
        early = _Early(file)
        for client, reply in answers:
            if order[client] < turn or order[client] in early.places:
                continue  # it has answered
            if order[client] > turn:
                early.put(order[client], reply)
                continue
            yield reply
            turn += 1
            while turn in early.places:
                yield early.take(turn)
                turn += 1
        for late in range(turn, len(cohort)):
            yield early.take(late) if late in early.places else None


class _Early:
    """Replies that wait, by turn."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.places: dict[int, tuple[Reply, int, int | None]] = {}  # without content, its place, its length if any

    def put(self, turn: int, reply: Reply) -> None:
        text = None if reply.content is None else wire.to_bytes(reply.content)
        length = None if text is None else len(text)
        self.places[turn] = replace(reply, content=None), self.file.seek(0, io.SEEK_END), length
        self.file.write(text or b"")

    def take(self, turn: int) -> Reply:
        reply, begins, length = self.places.pop(turn)
        if length is None:
            return reply
        self.file.seek(begins)
        return replace(reply, content=wire.from_bytes(self.file.read(length)))
