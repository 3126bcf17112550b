"""A spectral filter: clients that stick out along the direction in which updates differ most weigh nothing.

With u_k what client k changed, c the mean of the n clients that are left, v the top right singular vector of the
rows `u_k - c`, `x_k = <v, u_k>` and m the median of x, client k is left out where

    |x_k - m| > times median_j |x_j - m|    and    sum_j (x_j - mean(x))^2 > 2 / (n - 1) sum_j || u_j - c ||^2

so that nobody is where no direction holds twice its even share of the differences. This is repeated with those
that are left until nobody sticks out, and never leaves out half of the clients. The others have the weighted mean

    B_hat = sum_k p_k B_k

v takes one pass over the updates and O(d) memory, after Kacham and Woodruff (NeurIPS 2024,
https://arxiv.org/abs/2412.11963). They step by powers of blocks of a long stream in random order, and keep its
heavy rows. A round is a short stream in which any row may be the heavy one, so `factors.top_direction` has a small
sketch, whose bound holds in every order. A second pass has the x_k. Filtering by v is Divide-and-Conquer's
(Shejwalkar and Houmansadr, NDSS 2021), which leaves out as many as it is told; here the spread of the majority
decides.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora import factors
from fedlora.adapter import Adapter, Change, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy

EVEN = 2.0  # times its even share of the differences: what a direction must hold before anybody is left out


@dataclass(kw_only=True)
class SpectralFilter(Strategy):
    """The mean of the clients that do not stick out; all but A federates.

    Attributes:
        times: how many times the median distance from the median a client may be away; above 1.
        parts: roles of the tensors that federate; None: all but A, as in FFA-LoRA.
    """

    facts: ClassVar[Facts] = Facts(sends="B", exact=False)

    times: float = 4.0
    parts: Sequence[str] | None = None
    _left_out: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.times > 1:
            raise ValueError(f"times is a number above 1, not {self.times}: half of the clients are within 1")

    def federates(self, layout: Layout) -> Collection[str]:
        """The tensors of the roles in `parts`."""
        return [n for n, slot in layout.items() if (slot.role in self.parts if self.parts else slot.role != "A")]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The weighted mean of those that are left."""
        left = sorted(updates, key=lambda update: update.clients)
        most = (len(updates) - 1) // 2
        while far := self.far(adapter, left)[: most - len(updates) + len(left)]:
            left = [update for k, update in enumerate(left) if k not in far]
        self._left_out = len(updates) - len(left)
        return weighted_mean(left)

    def far(self, adapter: Adapter, updates: Sequence[Update]) -> list[int]:
        """The places of the updates that stick out, the farthest first.

        Args:
            adapter: that they started from.
            updates: one for each client.
        """
        v, differences = factors.top_direction(_moves(adapter, updates))
        along = np.array([v @ move for move in _moves(adapter, updates)])
        if not along.var() * len(updates) * (len(updates) - 1) > EVEN * differences:
            return []
        away = np.abs(along - np.median(along))
        farthest = np.argsort(-away, kind="stable")
        return [int(k) for k in farthest if away[k] > self.times * np.median(away)]

    def diagnose(
        self, before: Adapter, updates: Sequence[Update], after: Adapter, merge: Change | None = None
    ) -> Mapping[str, float]:
        """Also how many clients were left out: the server sees the updates, so it is no secret of theirs."""
        return {**super().diagnose(before, updates, after, merge), "left_out": float(self._left_out)}


def _moves(adapter: Adapter, updates: Sequence[Update]) -> Iterator[NDArray[np.float64]]:
    """What each client changed, as one row, (d,)."""
    for update in updates:
        yield np.concatenate(
            [(t.astype(np.float64) - adapter[n]).ravel() for n, t in sorted(update.adapter.items())]
        )
