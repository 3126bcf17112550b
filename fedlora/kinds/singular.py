"""SVFit (Sun et al., 2024, https://arxiv.org/abs/2409.05926): only the first r singular values of a weight train.

    W' = W + alpha / r * U_r diag(d) V_r^T,   U_r and V_r the first singular vectors of W, d zero at first

d is how far each singular value has moved, so that the values themselves need not be held. r numbers a layer train
and travel; the vectors come from the base and never travel. The change is linear in d:

    sum_k p_k U diag(d_k) V^T = U diag(sum_k p_k d_k) V^T

Noise on d reaches the weight as `s sqrt(r)`, the least of all kinds: take a large r. The vectors are settled where
an SVD leaves them open (`fedlora.kinds.frames.singular`), and a site whose own differ refuses.
"""

from dataclasses import dataclass

import numpy as np

from fedlora.adapter import Slot, Tensor
from fedlora.kinds import frames
from fedlora.kinds.contract import Weights


@dataclass(frozen=True)
class Singular(frames.Diagonal):
    """A weight's change is `alpha / r * U @ diag(d) @ V^T`, with frozen singular vectors of the weight itself."""

    def where(self) -> str:
        """A diagonal between singular vectors."""
        return f"a diagonal between the first {self.r} singular vectors of this base's weight"

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights) -> Tensor:
        """Singular vectors."""
        return frames.of_weight(slot, weights, self.r)
