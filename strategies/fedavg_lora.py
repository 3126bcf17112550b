"""FedAvg on LoRA factors, FedIT (Zhang et al., 2023, https://arxiv.org/abs/2305.05644).

A and B are averaged by themselves, which is not the average of the changes they stand for:

    B_hat A_hat = (sum_k p_k B_k) (sum_k p_k A_k)  !=  sum_k p_k B_k A_k

How far apart the two are is logged each round as `aggregation_error`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapter import Adapter, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FedAvgLoRA(Strategy):
    """A, B and the head federate, each averaged by itself."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)

    measure_error: bool = True  # needs each client's factors; false lets workers sum them on the way

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`B_hat = sum_k p_k B_k`, `A_hat = sum_k p_k A_k`."""
        return weighted_mean(updates)
