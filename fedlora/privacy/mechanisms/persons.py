"""DP-SGD for each person: all rows of a person together have the place of an example.

Each step takes each of a client's n persons by a coin (`fedlora.privacy.mechanisms.dp_sgd`, where `total` and
`batch_size` then count persons), and of each person p that it takes m_p rows, all or at most k. With g_i the
gradient of row i, the sum that is noised is

    sum_p c( (1 / m_p) sum_(i of p) g_i )        with ||c(.)|| <= C

So without all rows of one person a sum lacks one vector of norm C at most, whatever the rows are and however many:
events and epsilon are those of n examples (user-level sampling: Charles et al., 2024,
https://arxiv.org/abs/2406.14322). Neighbours are those of zero-out: n is public, since it sets the sampling rate,
and how many rows a person has is not. What that takes:

- Whom a step takes, and which of a person's rows, does not depend on the rows of others: each person has a coin,
  and in each step a stream of its own, of which the first k of a permutation are its rows.
- The mean is clipped, and not its parts: where rows of a person are in two micro-batches, the sum so far is kept
  until the last of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora.privacy.noise import Stream
from fedlora.tasks.windows import pieces

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A micro-batch of persons' rows, those of one person next to each other.

    Attributes:
        rows: their numbers, (rows,).
        shares: of each row its weight in its person's mean, (rows,).
        counts: how many rows of each person are in it, (persons,).
        begun: whether the first person has rows in the part before.
        goes_on: whether the last person has rows in the next.
    """

    rows: Rows
    shares: NDArray[np.float64]
    counts: Rows
    begun: bool
    goes_on: bool

    @property
    def whole(self) -> int:
        """Persons of whom all rows have passed by then, and not before."""
        return len(self.counts) - self.goes_on

    def join(self, parameters: "Sequence[torch.Tensor]", sums: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        """Make the gradients of rows those of whole persons: weighted sums.

        Args:
            parameters: with gradients of rows, `grad_sample` of (rows, *shape); they are given (whole, *shape).
            sums: of each parameter that of the person who began in the part before; none where nobody did.

        Returns:
            The sums of the person who goes on.
        """
        import torch

        left = []
        for i, parameter in enumerate(parameters):
            sample: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            if len(self.counts) < len(self.rows) or self.begun or self.goes_on:
                shares = torch.as_tensor(self.shares, dtype=sample.dtype, device=sample.device)
                weighted = sample * shares.view(-1, *[1] * (sample.dim() - 1))
                counts = torch.as_tensor(self.counts, device=sample.device)
                sample = torch.segment_reduce(weighted.flatten(1), "sum", lengths=counts, axis=0)
                sample = sample.view(len(self.counts), *parameter.shape)
            if self.begun:
                sample[0] += sums[i]
            if self.goes_on:
                left.append(sample[-1].clone())
            parameter.grad_sample = sample[: self.whole]  # type: ignore[attr-defined]
        return left


class Persons:
    """The persons of a client, by number, and their rows."""

    def __init__(self, rows: Rows, persons: Rows) -> None:
        """From the person of each row.

        Args:
            rows: of the client, (rows,).
            persons: of each row the number of its person.
        """
        order = np.argsort(persons, kind="stable")
        _, first = np.unique(persons[order], return_index=True)
        self.of = np.split(rows[order], first[1:])

    def __len__(self) -> int:
        return len(self.of)

    def drawn(
        self, taken: NDArray[np.bool_], most: int | None, draws: Callable[[str], Stream], step: int
    ) -> list[Rows]:
        """The rows of each person whom a step takes.

        Args:
            taken: whom, (persons,).
            most: rows of each; None: all.
            draws: gives the stream of a purpose.
            step: of the round.
        """
        found = []
        for person in np.flatnonzero(taken):
            rows = self.of[person]
            if most is not None and len(rows) > most:
                rows = np.sort(draws(f"rows of person {person} in step {step}").permutation(rows)[:most])
            found.append(rows)
        return found


def cut(
    drawn: Sequence[Rows], lengths: Callable[[Rows], Rows], sequences: Callable[[Rows], Rows], size: int
) -> list[Part]:
    """Micro-batches of about `size` rows, persons whose longest rows are alike together.

    Where each person has one row they are those of `Task.micro_batches`.

    Args:
        drawn: the rows of each person.
        lengths: gives the tokens of rows.
        sequences: gives how many sequences the model sees of each.
        size: rows of each part.
    """
    if not drawn:
        return []
    order = np.argsort([int(lengths(rows).max()) for rows in drawn], kind="stable")
    counts = np.array([len(drawn[p]) for p in order])
    rows = np.concatenate([drawn[p] for p in order])
    whose, shares = np.repeat(np.arange(len(order)), counts), np.repeat(1 / counts, counts)
    parts = []
    for here in pieces(sequences(rows), size):
        first, last = here[0], here[-1]
        parts.append(
            Part(
                rows=rows[here],
                shares=shares[here],
                counts=np.unique(whose[here], return_counts=True)[1],
                begun=bool(first > 0 and whose[first - 1] == whose[first]),
                goes_on=bool(last + 1 < len(rows) and whose[last + 1] == whose[last]),
            )
        )
    return parts
