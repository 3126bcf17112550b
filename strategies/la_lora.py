"""LA-LoRA (Liu et al., ICLR 2026, https://arxiv.org/abs/2602.19926): B and A take turns within the local steps.

In its odd local steps a client moves B, in its even ones A, so that the noise on one is not multiplied
with the noise on the other within a step; the head moves in each. Under privacy the noised gradient is
smoothed before it is used, A along the layer's inputs and B along its outputs, which is post-processing:

    g <- g * [1, 4, 6, 4, 1] / 16

Each example is clipped by itself over all that moves in the step; the released code clips the gradient of
the batch. The server averages A and B as FedAvg does, so the aggregate is not exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora.adapter import Adapter, Update, weighted_mean
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class LALoRA(Strategy):
    """A, B and the head federate; clients move B and A in turn, and smooth noised gradients."""

    linear: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    measure_error: bool = True  # needs each client's factors; false lets workers sum them on the way
    low_pass: bool = True  # smooth gradients that were noised

    def config(self, round: int) -> Mapping[str, Any]:
        """Turns of a step each, and the filter where there is noise."""
        return {"turns": "B,A", **({"low-pass": 1} if self.private and self.low_pass else {})}

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """`B_hat = sum_k p_k B_k`, `A_hat = sum_k p_k A_k`."""
        return weighted_mean(updates)
