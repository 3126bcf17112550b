"""RoLoRA (Chen et al., 2025, https://arxiv.org/abs/2502.01755): train B and A in turn.

In odd rounds B moves and A stands still, in even rounds the other way round. With one factor shared by
all, the change of the weights is linear in the other, so that each round's average is exact:

    odd   B_hat = sum_k p_k B_k,   B_hat A = sum_k p_k B_k A
    even  A_hat = sum_k p_k A_k,   B A_hat = sum_k p_k B A_k

B goes first, because A has no gradient while B is zero. The head trains in every round.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class RoLoRA(Strategy):
    """A, B and the head federate; clients train and send B in odd rounds, A in even ones."""

    linear: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")
    facts: ClassVar[Facts] = Facts(sends="B, then A", exact=True)

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """All but the factor that stands still."""
        still = "A" if round % 2 else "B"
        return [name for name, slot in layout.items() if slot.role != still]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The mean of what moved."""
        return weighted_mean(updates)
