"""Fed-SB (Singhal et al., 2025, https://arxiv.org/abs/2502.15436): train an r x r core between frozen factors.

With orthonormal B and A the same everywhere and for good, a layer's change is linear in the core R, so
that averaging is exact, and r^2 numbers a layer travel, however wide it is:

    sum_k p_k B R_k A = B (sum_k p_k R_k) A

The paper takes B and A from the SVD of the first full gradient. Under privacy that gradient would have to
be paid for, so here they are the first singular vectors of the frozen weight, as in LoRA-XS: free, and the
same wherever the base is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Layout, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FedSB(Strategy):
    """The r x r core R of B R A and the head federate; B and A come from the base's SVD."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="R", exact=True)
    builds: ClassVar[str] = "lora_xs"
    moves: ClassVar[tuple[str, ...]] = ("core",)

    def federates(self, layout: Layout) -> Collection[str]:
        """The cores and the head."""
        return [name for name, slot in layout.items() if slot.role in ("core", "head")]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`R_hat = sum_k p_k R_k`."""
        return weighted_mean(updates)
