"""A shared adapter and an own one, side by side: FedDPA (Yang et al., NeurIPS 2024, https://arxiv.org/abs/2403.19211).

The change of each client's weights is a sum. One term is averaged, the other stays with the client:

    W_k = W + s (B A + B'_k A'),    B_hat = sum_k p_k B_k

Clients train B and B'_k together, and send B and the head. A and A' are drawn from the seed and frozen, so that
what is averaged is linear in B (`fedlora.kinds.dual`). The paper trains them, one adapter after the other, and
weighs the two for each example that it answers; here they are added.

Under privacy each example is clipped over B and B'_k together, and **both are noised**. SDFLoRA
(https://arxiv.org/abs/2601.11219) noises the shared one alone. But gradients of B depend on B'_k. If a row moved
B'_k without noise, it would change the gradients of all other rows with it: by more than one row's bound.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class DualLoRA(Strategy):
    """B and the head federate; a second adapter stays with each client."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="B", exact=False)
    personal: ClassVar[bool] = True
    builds: ClassVar[str] = "dual"
    moves: ClassVar[tuple[str, ...]] = ("B", "own_B")

    own_head: bool = False  # whether the head stays with each client too

    def federates(self, layout: Layout) -> Collection[str]:
        """What is not a client's own."""
        kept = set(self.keeps(layout))
        return [name for name in layout if name not in kept]

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """All."""
        return layout

    def keeps(self, layout: Layout) -> Collection[str]:
        """B', and the head where it is a client's own."""
        own = {"own_B", "head"} if self.own_head else {"own_B"}
        return [name for name, slot in layout.items() if slot.role in own]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`B_hat = sum_k p_k B_k`."""
        return weighted_mean(updates)
