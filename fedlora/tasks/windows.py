"""Texts that are longer than a sequence may be, cut into windows that stay one example.

A text of more than `max_length` tokens becomes several sequences, each framed as a text of its own and all but
the last as long as it may be. They overlap by a quarter. The first piece of a word is looked up in one window: in
the first half of an overlap in the window before, in the other half in the one after, so that what is judged has
an eighth of a window around it. Windows do not see each other; what their words add to the loss, and so to the
gradient, is the example's.

On disk the windows of an example stand one after another, and the types of its tokens are 0 and 1 by turns. In a
batch all examples have as many sequences: those with fewer windows get sequences of one token by which nothing is
judged.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.data import tagged
from fedlora.errors import SettingError

_OVERLAP = 4  # windows overlap by one in so many of their tokens


class Window(NamedTuple):
    """A sequence of tokens, and where each lies in the text; nowhere those that frame it."""

    ids: list[int]
    lie: list[tagged.Place]

    @property
    def held(self) -> list[int]:
        """The numbers of the tokens that lie in the text."""
        return [at for at, (start, end) in enumerate(self.lie) if start < end]


def cut(reader: Any, texts: list[str], max_length: int) -> list[list[Window]]:
    """The windows of each text, in order; at least one.

    Raises:
        SettingError: the tokenizer does not say where its pieces lie.
    """
    if not getattr(reader, "is_fast", False):
        raise SettingError(
            "model.base",
            "its tokenizer does not say where its pieces lie in a text: take a model with a tokenizer.json",
        )
    room = max_length - reader.num_special_tokens_to_add()
    told = {"stride": room // _OVERLAP, "return_overflowing_tokens": True} if room > 0 else {}
    made = reader(texts, truncation=True, max_length=max_length, return_offsets_mapping=True, **told)
    whose = made.get("overflow_to_sample_mapping", range(len(texts)))
    found: list[list[Window]] = [[] for _ in texts]
    for text, ids, lie in zip(whose, made["input_ids"], made["offset_mapping"], strict=True):
        found[text].append(Window(ids, lie))
    return [
        sorted(windows, key=_begins) for windows in found
    ]  # a tokenizer that cuts on the left begins at the end


def _begins(window: Window) -> int:
    return window.lie[window.held[0]][0] if window.held else 0


def first_pieces(
    text: str, words: Sequence[tagged.Place], windows: Sequence[Window]
) -> list[tuple[int, int] | None]:
    """Of each word the window and the number in it of its first piece; None where no window has any."""
    found: list[tuple[int, int] | None] = [None] * len(words)
    ends = 0  # of the window before, in characters of the text
    for number, window in enumerate(windows):
        held = window.held
        shared = sum(window.lie[at][0] < ends for at in held)
        mine = max(shared - shared // 2, 1)  # a window may begin within a word, whose first piece is not there
        rank = {at: i for i, at in enumerate(held)}
        for word, at in enumerate(tagged.first_pieces(text, words, window.lie)):
            if at is not None and (found[word] is None or rank[at] >= mine):
                found[word] = (number, at)
        ends = window.lie[held[-1]][1] if held else ends
    return found


def parted(tokens: NDArray[Any], types: NDArray[Any]) -> list[NDArray[Any]]:
    """What stands at the tokens of an example, window by window."""
    return np.split(tokens, np.flatnonzero(np.diff(types)) + 1)


def pieces(sequences: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The numbers of examples in order, in equal parts of about `size`, or less where sequences are many.

    All examples of a batch have as many sequences as the one with the most. So a long text is passed with few
    others, or alone: a part has at most `1.5 size` sequences, or one example.

    Args:
        sequences: of each example, (examples,).
        size: examples in memory at once.
    """
    parts = np.array_split(np.arange(len(sequences)), max(1, round(len(sequences) / size)))
    fitting = []
    while parts:
        part = parts.pop(0)
        if len(part) < 2 or 2 * len(part) * sequences[part].max() <= 3 * size:
            fitting.append(part)
        else:
            parts[:0] = np.array_split(part, 2)
    return [part for part in fitting if len(part)]


def grown(rows: Any, examples: int, most: int, filler: int, first: int) -> Any:
    """Rows of a batch with more sequences for each example: (examples x fewer, longest) to (examples x most, ...).

    Args:
        rows: a tensor.
        examples: of the batch.
        most: sequences of an example, afterwards.
        filler: what stands in the sequences that come to them.
        first: what stands at the first place of these.
    """
    made = rows.new_full((examples, most, rows.shape[1]), filler)
    before = rows.view(examples, -1, rows.shape[1])
    made[:, before.shape[1] :, 0] = first
    made[:, : before.shape[1]] = before
    return made.view(-1, rows.shape[1])
