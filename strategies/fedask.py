"""FedASK (Wen et al., 2025, https://arxiv.org/abs/2507.09990): average the change itself, through two sketches.

A randomised SVD of the average change, in which the server only ever sees sums. In a first trip clients
send a sketch of the range of their change, in a second its projection on the common range:

    Y = sum_k p_k B_k (A_k Omega),   Q = qr(Y)             Omega (in x w) random, the same everywhere
    P = sum_k p_k A_k^T (B_k^T Q),   Q P^T = U S V^T       then B_hat = U S^1/2, A_hat = S^1/2 V^T

Exact while the average change has a rank of at most w = r + oversampling, before it is cut to r. Under
differential privacy only B trains: then all A are one, the rank is r, the aggregate is exact, and both
factors still move.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedlora import factors
from fedlora.adapter import Adapter, Instruction, Layout, Update, mean_head, names, weighted_mean
from fedlora.seeding import generator
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FedASK(Strategy):
    """Clients send two sketches of their change; from their sums the server takes an SVD."""

    facts: ClassVar[Facts] = Facts(sends="sketches Y, P", exact=False)
    moves: ClassVar[tuple[str, ...]] = ("A", "B")
    trips: ClassVar[int] = 2

    oversampling: int = 4  # columns of a sketch beyond the rank
    _bases: Adapter = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def partial_sums(self) -> bool:
        """The server only needs sums."""
        return True

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """B and the head; A too where nothing is noised."""
        return [name for name, slot in layout.items() if slot.role != "A" or not self.private]

    def reply(self, instruction: Instruction, trained: Adapter) -> Adapter:
        """Y of each layer; then P, and the head."""
        answer: Adapter = {}
        for module, (b, a) in self.kind.change(self.layout, trained).items():
            if instruction.trip == 1:
                width = min(len(a) + self.oversampling, *b.shape[:1], *a.shape[1:])
                omega = generator(instruction.round, "sketch", module).standard_normal((a.shape[1], width))
                answer[f"{module}/Y"] = factors.single(b @ (a @ omega))
            else:
                answer[f"{module}/P"] = factors.single(
                    a.T @ (b.T @ instruction.adapter[f"{module}/Q"].astype(np.float64))
                )
        if instruction.trip > 1:
            answer |= {n: trained[n] for n in instruction.send if self.layout[n].role == "head"}
        return answer

    def relay(self, trip: int, updates: Sequence[Update]) -> Adapter:
        """Q of each layer."""
        mean = weighted_mean(updates)
        self._bases = {
            name.replace("/Y", "/Q"): np.linalg.qr(y.astype(np.float64)).Q.astype(np.float32)
            for name, y in mean.items()
        }
        return self._bases

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The SVD of `Q P^T`, its values shared between both factors."""
        mean = weighted_mean(updates)
        after = mean_head(self.layout, updates)
        for module in self.kind.change(self.layout, adapter):
            b, a = names(self.layout, module)
            u, s, vt = factors.svd(self._bases[f"{module}/Q"], mean[f"{module}/P"].T)
            after[b], after[a] = factors.split(u, s, vt, adapter[a], shared=True)
        return after
