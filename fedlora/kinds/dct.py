"""SVD-free subspaces (Modoranu et al., 2025, https://arxiv.org/abs/2505.17967): A is r rows of a cosine transform.

    W' = W + alpha / r * B A,   A = C_K / sqrt(3),   B (out x r) trains, zero at first

C (in x in) is the orthonormal DCT-II of the inputs,

    C_kj = c_k cos(pi (2 j + 1) k / (2 in)),   c_0 = sqrt(1 / in), c_k = sqrt(2 / in)

and K are the r rows along which the frozen weight has the most energy, `|| W C_k^T ||^2`: no SVD is needed, and
neither A nor K travels, as the base gives them. The paper picks by the gradient, again and again. Here rows are
picked once, by the weight, which is public. Beside FFA-LoRA only A differs: its rows are as long as LoRA's are on
average, so that noise reaches the weight as `s sqrt(out r / 3)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapter import Slot, Tensor
from fedlora.factors import Matrix
from fedlora.kinds import frames
from fedlora.kinds.contract import Facts, Part, Weights


@dataclass(frozen=True)
class DCT(frames.Still):
    """A weight's change is `alpha / r * B @ A`, with the rows of a cosine transform that fit it best as A."""

    parts: ClassVar[Mapping[str, Part]] = {"A": Part("derived", False), "B": Part("zero", True)}
    facts: ClassVar[Facts] = Facts("B", "s sqrt(out r / 3)")

    def most(self, out: int, into: int) -> int | None:
        """As many rows as there are inputs."""
        return into

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Rows of the transform, of falling energy; the rest as LoRA's."""
        if slot.role != "A" or weights is None:
            return super().initial(slot, rng, weights)
        weight = frames.dense(slot, weights)
        rows = transform(weight.shape[1])
        energy = np.square(weight @ rows.T).sum(0)  # (in,)
        return frames.rounded(rows[frames.largest(energy, self.r, float(energy.sum()))] / np.sqrt(3))


def transform(size: int) -> Matrix:
    """The orthonormal DCT-II, (size x size); row k has frequency k."""
    k, j = np.arange(size)[:, None], np.arange(size)
    made: Matrix = np.cos(np.pi * ((2 * j + 1) * k % (4 * size)) / (2 * size)) * np.sqrt(2 / size)
    made[0] = np.sqrt(1 / size)
    return made
