"""FLoRA's core space (Si et al., 2024, https://arxiv.org/abs/2405.14739): only an r x r core trains.

    W' = W + alpha / r * U G V,   U (out x r) and V (r x in) drawn from the seed, orthonormal; G zero at first

The paper trains U and V too, and has a core with a rank for each dimension of a convolution. Here U and V stay as
the seed draws them, so that r^2 numbers a layer train and travel, and with them the change is linear:

    sum_k p_k U G_k V = U (sum_k p_k G_k) V

Noise on G reaches the weight as it is: `s r` for each unit of it, where FFA-LoRA's is `s sqrt(out r / 3)`. So the
core affords a rank that is a multiple of FFA's, up to the smaller side of a layer. LoRA-XS is the same with frames
from the weight's own singular vectors. Convolutions have no such core here: an adapter's change is a matrix beside
a linear layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapter import Slot, Tensor
from fedlora.kinds import frames
from fedlora.kinds.contract import Facts, Part, Weights


@dataclass(frozen=True)
class Core(frames.Framed):
    """A weight's change is `alpha / r * U @ G @ V`, with U and V orthonormal and drawn from the seed."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("seeded", False),
        "B": Part("seeded", False),
        "core": Part("zero", True),
    }
    facts: ClassVar[Facts] = Facts("G (r x r)", "s r")

    def where(self) -> str:
        """Between the frames of this seed."""
        return "between the frames that this seed draws"

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Frames for U and V, zero for G."""
        return self.frame(slot, rng, weights) if slot.role in "AB" else super().initial(slot, rng, weights)

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Orthonormal, from the seed."""
        if slot.role == "B":
            return frames.drawn(slot.shape[0], slot.shape[1], rng)
        return np.ascontiguousarray(frames.drawn(slot.shape[1], slot.shape[0], rng).T)
