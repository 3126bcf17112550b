"""FedMomentum (Yan et al., 2026, https://arxiv.org/abs/2603.08014): go on from the main directions, merge others.

The average change is decomposed. Its first r directions are the next adapter, with their values shared by both
factors, so that training goes on in the directions that it has found; there is no term of momentum. The others, up
to the share tau of the energy, are folded into the base of every client:

    sum_k p_k s_k B_k A_k = U S V^T
    B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T,  over the scaling
    W <- W + U_(r..m) S_(r..m) V_(r..m)^T,     m the least with  S_1^2 + ... + S_m^2 >= tau (S_1^2 + S_2^2 + ...)

The decomposition goes through the stacked thin factors, and is exact; the paper's is a randomised one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora import factors
from fedlora.adapter import Adapter, Update, mean_head, names
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Merged, Strategy


@dataclass(kw_only=True)
class FedMomentum(Strategy):
    """A, B and the head federate; the average's first directions go on, the others are merged into the base."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    merges: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    tau: float = 0.9999  # share of the energy that adapter and merge hold together, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a share in (0, 1], not {self.tau}")

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Merged:
        """The first directions, and the others as a merge."""
        after, r = mean_head(self.layout, updates), self.kind.r
        base: dict[str, factors.Factors] = {}
        for module, parts in shares(self.kind, self.layout, adapter, updates).items():
            b, a = names(self.layout, module)
            u, s, vt = factors.svd(*factors.stack(parts))
            after[b], after[a] = factors.split(u, s / self.kind.scaling(), vt, adapter[a], shared=True)
            if (kept := factors.energy_rank(s, self.tau)) > r:
                base[module] = (u[:, r:kept] * s[r:kept], vt[r:kept])
        return Merged(after, base)
