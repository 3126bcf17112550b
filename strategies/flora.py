"""FLoRA (Wang et al., NeurIPS 2024, https://arxiv.org/abs/2409.05976): stack the factors, merge, start afresh.

The stack of all clients' factors is the average change itself, whatever their ranks:

    [p_1 s_1 B_1 ... p_K s_K B_K] [A_1; ...; A_K] = sum_k p_k s_k B_k A_k

It is folded into the base of every client, and the next round begins from a new random A and B = 0. What
travels down grows with the sum of the ranks; a client that missed rounds is sent their merges too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora import factors
from fedlora.adapter import Adapter, Layout, Update, mean_head
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Merged, Strategy


@dataclass(kw_only=True)
class FLoRA(Strategy):
    """Clients send A and B of their own ranks; the server merges the stack into the base, and A is drawn again."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=True)
    unequal_ranks: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    def federates(self, layout: Layout) -> Collection[str]:
        """The head; the factors begin from the seed in each round."""
        return [name for name, slot in layout.items() if slot.role == "head"]

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """All."""
        return layout

    def sends(self, round: int, layout: Layout) -> Collection[str]:
        """All."""
        return layout

    def draw(self, round: int) -> int:
        """A new A for each round."""
        return round - 1

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Merged:
        """The mean of the head, and the stack as a merge."""
        parts = shares(self.kind, self.layout, self.initial, updates)
        merge = {module: factors.compact(*factors.stack(part)) for module, part in parts.items()}
        return Merged(mean_head(self.layout, updates), merge)
