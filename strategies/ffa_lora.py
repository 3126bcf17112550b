"""FFA-LoRA (Sun et al., ICLR 2024, https://arxiv.org/abs/2403.12313): freeze the random A, train B.

A is drawn once from the seed, is the same everywhere, and never travels. With it fixed, a change of the
weights is linear in B, so that averaging is exact

    mean_k(B_k) A = mean_k(B_k A)

half the bytes travel, and noise on B is not multiplied with noise on A.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FFALoRA(Strategy):
    """B and the head federate, A stays as the seed made it."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="B", exact=True)

    def federates(self, layout: Layout) -> Collection[str]:
        """All but A."""
        return [name for name, slot in layout.items() if slot.role != "A"]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`B_hat = sum_k p_k B_k`."""
        return weighted_mean(updates)
