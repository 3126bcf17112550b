"""Very sparse random projections (Li et al., 2006; FastRP, Chen et al., 2019, https://arxiv.org/abs/1908.11512).

    W' = W + alpha / r * B A,   each row of A has k = round(sqrt(in)) numbers that are not zero, +-1 / sqrt(3 k)

FFA-LoRA with another A: drawn from the seed, frozen and never sent, B (out x r) trains. A share of 1 / sqrt(in) of
A's numbers is not zero, so that what it keeps of an input is a signed sum of few coordinates. `E || A x ||^2` is
that of LoRA's own A, `r || x ||^2 / (3 in)`, and so is the noise that B brings into the weight. The paper draws
each number apart; here each row has exactly k, so that none is empty.

The product is still a dense one: on the sizes of one layer that is quicker than a gather.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapter import Slot, Tensor
from fedlora.kinds.contract import Facts, Weights
from fedlora.kinds.frames import Still


@dataclass(frozen=True)
class VerySparse(Still):
    """A weight's change is `alpha / r * B @ A`, with a frozen A of few numbers, all of one size."""

    facts: ClassVar[Facts] = Facts("B", "s sqrt(out r / 3)")

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Signs at sqrt(in) places of each row of A; the rest as LoRA's."""
        if slot.role != "A":
            return super().initial(slot, rng, weights)
        into = slot.shape[1]
        count = max(1, round(into**0.5))
        a = np.zeros(slot.shape, np.float32)
        for row in a:
            row[rng.choice(into, count, replace=False)] = rng.choice((-1.0, 1.0), count) / (3 * count) ** 0.5
        return a
