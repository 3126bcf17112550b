"""FlexLoRA (Bai et al., NeurIPS 2024, https://arxiv.org/abs/2402.11505): average the changes, cut them by SVD.

The average change is decomposed, and every client is sent as much of it as its rank holds:

    sum_k p_k s_k B_k A_k = U S V^T
    client k gets  B = U[:, :r_k] S[:r_k] / s_k,  A = V^T[:r_k]

The decomposition goes through the stacked thin factors; the layer's full matrix is never made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora import factors
from fedlora.adapter import Adapter, Update, mean_head, names
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FlexLoRA(Strategy):
    """A and B of each client's rank federate; the server takes the SVD of the average change."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    unequal_ranks: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The best change of the server's rank."""
        after = mean_head(self.layout, updates)
        for module, parts in shares(self.kind, self.layout, adapter, updates).items():
            b, a = names(self.layout, module)
            u, s, vt = factors.svd(*factors.stack(parts))
            after[b], after[a] = factors.split(u, s / self.kind.scaling(), vt, adapter[a])
        return after
