"""LOST (Li et al., 2025, https://arxiv.org/abs/2508.02668): thin factors, and columns for a few inputs.

    W' = W + alpha / r * (B A + C S),   B (out x r) and C (out x k) train, zero at first

A (r x in) is drawn as LoRA's. S (k x in) picks k = r inputs: those where the weight's tail beyond rank r, which
thin factors cannot reach, has the most energy `sum_i (W - W_r)_ij^2`. A comes from the seed and S from the base;
neither trains or travels. The paper trains such a sum from scratch; here it is a change of a frozen weight.

C and B are one tensor (out x 2 r), C first, over S and A in one (2 r x in): so all that is quick for LoRA is quick
here, and a client of a lower rank holds C and the first columns of B. The change is linear in it, at the bytes of
FFA-LoRA of rank 2 r. Noise reaches the weight as `s sqrt(out (r + r / 3))`: a row of S is longer than one of A.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Slot, Tensor
from fedlora.factors import Matrix
from fedlora.kinds import frames
from fedlora.kinds.contract import Facts, Part, Weights


@dataclass(frozen=True)
class Channel(frames.Still):
    """A weight's change is `alpha / r * (B @ A + C @ S)`, where S picks the inputs that thin factors miss most."""

    parts: ClassVar[Mapping[str, Part]] = {"A": Part("seeded", False, weighs=True), "B": Part("zero", True)}
    ordinary: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts("C, B", "s sqrt(4 out r / 3)")

    @property
    def width(self) -> int:
        """S and A."""
        return 2 * self.r

    def most(self, out: int, into: int) -> int | None:
        """One less than the smaller side: beyond that there is no tail."""
        return min(out, into) - 1

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(out (r + r / 3))`."""
        return self.scaling() * math.sqrt(out * self.r * 4 / 3)

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """All of C and S, and of B and A what the rank holds."""
        return super().shape(slot, self.r + rank)

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """S over A, and zeros."""
        tensor = super().initial(slot, rng, weights)
        if slot.role != "A":
            return tensor
        tensor[: self.r] = 0.0
        inputs = np.arange(self.r) if weights is None else self.inputs(frames.dense(slot, weights))
        tensor[np.arange(self.r), inputs] = 1.0
        return tensor

    def inputs(self, weight: Matrix) -> NDArray[np.int64]:
        """The r inputs where a weight (out x in) has the most energy beyond rank r, ascending."""
        u, _ = frames.singular(weight, self.r)
        tail = weight - u @ (u.T @ weight)
        return np.sort(frames.largest(np.square(tail).sum(0), self.r, float(np.square(weight).sum())))
