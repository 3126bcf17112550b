"""FedSVD (Lee et al., NeurIPS 2025, https://arxiv.org/abs/2505.12805): train B, let the server turn A.

Clients train B with A fixed, as in FFA-LoRA, and the server averages B. Then it writes the same product
with another A, whose rows are orthonormal and span the directions that B came to use:

    B_hat A = (B_hat L) Q        with A = L Q and the rows of Q orthonormal
    B_hat L = U S V^T            the thin SVD of an out x r matrix
    B <- U S,  A <- V^T Q        so that B A is what it was

The cost is O((out + in) r^2). A changes, so it travels down; it never travels up.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapter import Adapter, Layout, Tensor, Update, pairs, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FedSVD(Strategy):
    """B and the head train and are sent; the server re-factors, and A travels down."""

    facts: ClassVar[Facts] = Facts(sends="B", exact=True)
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    @property
    def partial_sums(self) -> bool:
        """All that it needs of the updates is their mean."""
        return not self.measure_error

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """All but A."""
        return [name for name, slot in layout.items() if slot.role != "A"]

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The mean of B and the head, each pair re-factored."""
        after = {**adapter, **weighted_mean(updates)}
        for name_b, name_a in pairs(self.layout):
            after[name_b], after[name_a] = refactor(after[name_b], after[name_a])
        return after


def refactor(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B (out x r) and A (r x in) with the same product, and the rows of A orthonormal.

    Where B A is zero there are no directions to turn to, and A stays as it is.
    """
    if not b.any():
        return b, a
    q, l_transposed = np.linalg.qr(a.T.astype(np.float64))  # A^T = Q^T L^T: (in, r), (r, r)
    u, s, vt = np.linalg.svd(b.astype(np.float64) @ l_transposed.T, full_matrices=False)  # (out, r), (r,), (r, r)
    return (u * s).astype(np.float32), (vt @ q.T).astype(np.float32)
