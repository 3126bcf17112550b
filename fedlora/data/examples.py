"""Encoded examples: of all clients, and which of them are one client's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.data.reading import Rows

Targets = NDArray[np.int64] | NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, in the order of the rows.

    Attributes:
        tokens: of each row its tokens, or the pixels of an image, channels first.
        targets: of each row the number of its class, or for causal_lm how many leading tokens are not scored; or
            an array of 0 and 1, (rows, labels), uint8, or of scores from 0 to 1, (rows, scores), float32, or of
            where parts of a row lie, (rows, places), int64.
        types: of each token which text of a pair it is of; None where there are no pairs.
        marks: of each token the number of what it is judged by, 0 in a task without labels, -100 where it is not
            scored; None: a row is judged as a whole, or from its target on.
        cut: how many rows lost something that is judged, or what goes before it, to `max_length`.
        empty: of how many the tokenizer made nothing, so that they are a token that stands for no text.
    """

    tokens: Sequence[Sequence[int] | NDArray[np.uint8]]
    targets: list[int] | Targets
    types: Sequence[Sequence[int]] | None = None
    marks: Sequence[Sequence[int]] | None = None
    cut: int = 0
    empty: int = 0

    @property
    def held(self) -> Targets:
        """The targets as they are kept."""
        return self.targets if isinstance(self.targets, np.ndarray) else np.asarray(self.targets, np.int64)


Encode = Callable[[Rows], Encoded]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, memory-mapped. Row i holds `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: of all rows one after another, (total tokens,), or all pixels.
        offsets: where each row begins, (rows + 1,).
        targets: of each row, (rows,); of those with several labels, scores or places (rows, of each).
        types: which text of a pair each token is of, (total tokens,); None where there are no pairs.
        marks: what each token is judged by, (total tokens,), -100 where it is not scored; None: whole rows are, or
            what follows their targets.
    """

    tokens: NDArray[np.int32 | np.uint8]  # (total tokens,), or all pixels
    offsets: NDArray[np.int64]  # (rows + 1,)
    targets: Targets  # (rows,) or (rows, labels, scores or places)
    types: NDArray[np.uint8] | None = None  # which text of a pair each token is of, (total tokens,)
    marks: NDArray[np.int32] | None = None  # what each token is judged by, (total tokens,)

    def __len__(self) -> int:
        return len(self.targets)

    def row(self, index: int) -> NDArray[np.int32 | np.uint8]:
        """The tokens, or the pixels, of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def types_of(self, index: int) -> NDArray[np.uint8]:
        """Of each token of one example, which text of the pair it is of; zeros where there are no pairs."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return np.zeros(here.stop - here.start, np.uint8) if self.types is None else self.types[here]

    def marks_of(self, index: int) -> NDArray[np.int32]:
        """Of each token of one example, what it is judged by; none where examples are judged as wholes."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return np.zeros(0, np.int32) if self.marks is None else self.marks[here]

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens in each of the rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @property
    def majority(self) -> float | None:
        """Of examples, or of scored tokens, as the function of that name has it."""
        return majority(self.targets if self.marks is None else self.marks[self.marks >= 0])


@dataclass(frozen=True)
class Partition:
    """One client's examples: rows of the shared training set.

    Attributes:
        client: its id.
        examples: of all clients.
        rows: the numbers of its own, (num_examples,).
        persons: of each of them the number of its person; None where each stands for itself.
    """

    client: int
    examples: Examples
    rows: NDArray[np.int64]  # (num_examples,)
    persons: NDArray[np.int64] | None = None  # (num_examples,)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def units(self) -> int:
        """How many are protected here, which is public: persons, or examples."""
        return len(self.rows) if self.persons is None else len(np.unique(self.persons))


def label_counts(targets: Targets | NDArray[np.int32]) -> NDArray[np.int64]:
    """How many rows have each label, up to the last that any has; a row may have several."""
    return targets.sum(axis=0, dtype=np.int64) if targets.ndim == 2 else np.bincount(targets)


def majority(targets: Targets | NDArray[np.int32]) -> float | None:
    """What always saying the commonest label comes to, in [0, 1]; None of scores, and of no rows.

    That is its share of the rows. Where rows have several labels it is the micro F1, 2 c / (n + p), of c rows with
    that label among n rows that have p labels together.
    """
    if not len(targets) or targets.dtype == np.float32:
        return None
    counts = label_counts(targets)
    return float(2 * counts.max() / (len(targets) + counts.sum()))
