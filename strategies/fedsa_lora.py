"""FedSA-LoRA (Guo et al., ICLR 2025, https://arxiv.org/abs/2410.01463): share A, keep B.

Clients train both factors. A, which is found to learn what is common, is averaged; B and the head stay
with each client from one of its rounds to the next and never travel:

    A_hat = sum_k p_k A_k

So every client ends with a model of its own, judged by the examples that it holds out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FedSALoRA(Strategy):
    """A federates; B and the head stay with each client."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="A", exact=False)
    personal: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    def federates(self, layout: Layout) -> Collection[str]:
        """A."""
        return [name for name, slot in layout.items() if slot.role == "A"]

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """All."""
        return layout

    def keeps(self, layout: Layout) -> Collection[str]:
        """B and the head."""
        return [name for name, slot in layout.items() if slot.role != "A"]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`A_hat = sum_k p_k A_k`."""
        return weighted_mean(updates)
