"""FedEx-LoRA (Singhal et al., ACL 2025, https://arxiv.org/abs/2410.09432): average, and merge the rest.

A and B are averaged as in FedAvg. What that misses of the average change is folded into the frozen weight
of every client, so that each round is exact:

    B_hat = sum_k p_k B_k,   A_hat = sum_k p_k A_k
    W <- W + s (sum_k p_k B_k A_k - B_hat A_hat)

The correction travels down as thin factors, of rank (clients + 1) r, or the layer's own if that is less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora import factors
from fedlora.adapter import Adapter, Update, weighted_mean
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Merged, Strategy


@dataclass(kw_only=True)
class FedExLoRA(Strategy):
    """A, B and the head federate; what their averages miss is merged into the base."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=True)
    merges: ClassVar[bool] = True

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Merged:
        """The means, and the residual as a merge."""
        mean = weighted_mean(updates)
        parts = shares(self.kind, self.layout, {**self.initial, **adapter}, updates)
        for module, pair in self.kind.change(self.layout, {**self.initial, **adapter, **mean}).items():
            parts[module].append((-self.kind.scaling(), *pair))
        return Merged(mean, {module: factors.compact(*factors.stack(part)) for module, part in parts.items()})
