"""LoRA-XS (Balazy et al., 2024, https://arxiv.org/abs/2405.17604): only an r x r core trains.

    W' = W + alpha / r * B R A,   B (out x r) and A (r x in) the first singular vectors of W, R zero at first

B and A come from the base model, so that only r^2 numbers a layer train and travel, and the change is linear in
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapter import Slot, Tensor
from fedlora.kinds import frames
from fedlora.kinds.contract import Facts, Part, Weights


@dataclass(frozen=True)
class LoraXS(frames.Framed):
    """A weight's change is `alpha / r * B @ R @ A`, with frozen singular vectors B and A of the weight itself."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("derived", False),
        "B": Part("derived", False),
        "core": Part("zero", True),
    }
    facts: ClassVar[Facts] = Facts("R (r x r)", "s r")

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights) -> Tensor:
        """Singular vectors."""
        return frames.of_weight(slot, weights, self.r)
