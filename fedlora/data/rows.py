"""Rows before they are encoded: what a text may be, and what stands beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.data import chats
from fedlora.data.cells import Label

Input = str | tuple[str, ...] | tuple[chats.Turn, ...] | bytes
"""A text, a pair of texts, the words of a text, the turns of a chat, or an image as its file holds it."""


@dataclass(frozen=True)
class Rows:
    """Rows of one split before they are encoded.

    Attributes:
        texts: of each row a text, a pair of texts, its words, a chat's turns, or the bytes of an image's file.
        labels: of each row its class, its completion for causal_lm, of a chat the last turns of the assistant,
            which are learnt, the tags of its words, for multi_label its labels, for regression its scores, from 0
            to 1, of preferences both completions; None where there are none.
        owners: of each row whose it is, by the natural partition's column; None elsewhere.
        persons: of each row which person it is of, by `privacy.person`; None elsewhere.
    """

    texts: Sequence[Input]
    labels: Sequence[Label] | None
    owners: list[str] | None = None
    persons: list[str] | None = None

    @property
    def classes(self) -> set[str]:
        """The labels that occur."""
        parts = ([label] if isinstance(label, str) else label for label in self.labels or ())
        return {name for part in parts for name in part if isinstance(name, str)}


NOTHING = Rows([], [])


def plain(part: Input) -> Input:
    """An input as it is compared with others: its texts without blanks at their ends."""
    if isinstance(part, tuple):
        return tuple(map(plain, part))  # type: ignore[return-value]
    return part.strip() if isinstance(part, str) else part


def as_bytes(part: Input) -> bytes:
    """An input as bytes; no two are alike."""
    if isinstance(part, tuple):
        parts = [as_bytes(one) for one in part]
        return b"".join(len(one).to_bytes(8, "big") + one for one in parts[:-1]) + b"".join(parts[-1:])
    return part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
