"""HetLoRA (Cho et al., EMNLP 2024, https://arxiv.org/abs/2401.06432): pad with zeros, weigh by how much changed.

Clients have ranks of their own. The server pads their factors to its rank and averages them with weights
by the size of each client's change, so that clients of a low rank do not dilute the others:

    p_k = || s_k B_k A_k ||_F / sum_j || s_j B_j A_j ||_F
    B_hat = sum_k p_k (s_k / s) pad(B_k),   A_hat = sum_k p_k pad(A_k)

Down goes the first part of B and A that a client's rank holds. Not exact: the factors are averaged by
themselves. The paper's self-pruning of ranks during local training is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedlora import factors
from fedlora.adapter import Adapter, Tensor, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class HetLoRA(Strategy):
    """A and B of each client's rank federate, padded with zeros and weighted by the size of the change."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    unequal_ranks: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The mean of the padded factors."""
        sizes = [self.size(adapter, update) for update in updates]
        if not any(sizes):
            sizes = [update.weight for update in updates]
        total = sum(sizes)
        return weighted_mean(
            replace(
                update, weight=size / total, adapter={n: self.pad(n, t, update) for n, t in update.adapter.items()}
            )
            for update, size in zip(updates, sizes, strict=True)
        )

    def size(self, adapter: Adapter, update: Update) -> float:
        """`|| s_k B_k A_k ||_F` over all layers together."""
        change = self.kind.change(self.layout, {**adapter, **update.adapter})
        return update.scaling * float(np.sqrt(sum(factors.norm(b, a) ** 2 for b, a in change.values())))

    def pad(self, name: str, tensor: Tensor, update: Update) -> Tensor:
        """A tensor at the server's rank and scaling."""
        slot = self.layout[name]
        wider = np.pad(tensor, [(0, size - has) for size, has in zip(slot.shape, tensor.shape, strict=True)])
        return wider * np.float32(update.scaling / self.kind.scaling()) if slot.role == "B" else wider
