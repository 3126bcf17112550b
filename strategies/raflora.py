"""raFLoRA (Wu et al., 2026, https://arxiv.org/abs/2602.13486): average each rank over those who hold it.

Under unequal ranks a mean over all clients counts those of a low rank as zero in the directions that they do not
have. These shrink from round to round, until the lowest rank is left. So each direction j is averaged over
H_j, the clients of the round whose rank is above j, before the SVD (Algorithm 1, equation 8):

    sum_j sum_(k in H_j) p_k / p(H_j) s_k B_k[:, j] A_k[j] = U S V^T,      p(H) = sum_(k in H) p_k
    client k gets  B = U[:, :r_k] S[:r_k]^(1/2),  A = S[:r_k]^(1/2) V^T[:r_k],  over the scaling

At equal ranks that is FlexLoRA with the values shared by both factors. A direction that nobody in the round holds
is taken as the clients received it; the paper does not say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora import factors
from fedlora.adapter import Adapter, Update, mean_head, names
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class RaFLoRA(Strategy):
    """A and B of each client's rank federate; each direction is averaged over the clients who hold it."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    unequal_ranks: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The best change of the server's rank."""
        after = mean_head(self.layout, updates)
        total, scaling = sum(update.weight for update in updates), self.kind.scaling()
        for module, parts in shares(self.kind, self.layout, adapter, updates).items():
            b, a = names(self.layout, module)
            holders = np.zeros(self.kind.r)
            for update in updates:
                holders[: len(update.adapter[a])] += update.weight / total
            held = [(w, left / holders[: left.shape[1]], right) for w, left, right in parts]
            nobody = holders == 0
            stays = (scaling, adapter[b][:, nobody], adapter[a][nobody])
            u, s, vt = factors.svd(*factors.stack([*held, stays]))
            after[b], after[a] = factors.split(u, s / scaling, vt, adapter[a], shared=True)
        return after
