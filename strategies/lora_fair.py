"""LoRA-FAIR (Bian et al., ICCV 2025, https://arxiv.org/abs/2411.14961): correct B for what averaging lost.

A and B are averaged, and B is moved a little, so that the product comes nearer to the average change:

    dB = argmin || sum_k p_k B_k A_k - (B_hat + dB) A_hat ||_F^2 + lambda || dB ||_F^2
    sent: B_hat + dB, A_hat

The paper leaves the measure of mismatch open, and takes gradient steps on a cosine; the squared norm has
the same aim and a solution in closed form, `dB = E A_hat^T (A_hat A_hat^T + lambda I)^-1` with E the mismatch
of the plain means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora import factors
from fedlora.adapter import Adapter, Update, names, weighted_mean
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class LoRAFair(Strategy):
    """A, B and the head federate; the server corrects the mean B towards the average change."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    penalty: float = 0.01  # lambda, against large corrections; above 0

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise ValueError(f"penalty is above 0, not {self.penalty}")

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The means, with B corrected."""
        after = weighted_mean(updates)
        for module, parts in shares(self.kind, self.layout, adapter, updates).items():
            b, a = names(self.layout, module)
            mean_b, mean_a = after[b].astype(np.float64), after[a].astype(np.float64)
            left, right = factors.stack([*parts, (-self.kind.scaling(), mean_b, mean_a)])
            missed = left @ (right @ mean_a.T) / self.kind.scaling()  # E A_hat^T, (out, r)
            gram = mean_a @ mean_a.T + self.penalty * np.eye(len(mean_a))
            after[b] = factors.single(mean_b + np.linalg.solve(gram, missed.T).T)
        return after
