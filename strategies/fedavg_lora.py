"""FedAvg on LoRA factors, FedIT (Zhang et al., 2023, https://arxiv.org/abs/2305.05644).

A and B are averaged by themselves, which is not the average of the changes they stand for:

    B_hat A_hat = (sum_k p_k B_k) (sum_k p_k A_k)  !=  sum_k p_k B_k A_k

How far apart the two are is logged each round as `aggregation_error`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Update, aggregation_error, weighted_mean
from fedlora.strategy import Strategy


@dataclass(kw_only=True)
class FedAvgLoRA(Strategy):
    """A, B and the head federate, each averaged by itself: not exact, linear."""

    linear: ClassVar[bool] = True

    measure_error: bool = True  # needs each client's factors; false lets workers sum them on the way

    @property
    def partial_sums(self) -> bool:
        """Not while the error is measured."""
        return not self.measure_error

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`B_hat = sum_k p_k B_k`, `A_hat = sum_k p_k A_k`."""
        return weighted_mean(updates)

    def diagnose(self, before: Adapter, updates: Sequence[Update], after: Adapter) -> Mapping[str, float]:
        """The round's aggregation error."""
        if not self.measure_error:
            return {}
        return {"aggregation_error": aggregation_error(self.layout, before, updates, after)}
