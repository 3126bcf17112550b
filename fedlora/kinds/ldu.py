"""LoLDU (Shi et al., 2024, https://arxiv.org/abs/2410.13618): only r diagonal numbers of an LDU train.

    W = P L D U                             with P a permutation, L and U triangles with a diagonal of ones
    W' = W + alpha / r * sum_i d_i l_i u_i  over the first r columns of P L and rows of U; d zero at first

Each l_i and u_i is divided by its length: the changes that can be written are the same, and noise on a d_i is as
loud whatever the pivot was. The paper has no such lengths, and trains a scale as well; here the scale is
`alpha / r` and frozen, because with it the change is linear in d:

    sum_k p_k P L diag(d_k) U = P L diag(sum_k p_k d_k) U

r numbers a layer train and travel, as with `singular`; noise on d reaches the weight as `s sqrt(r)`. The factors
come from the base by a rule with one result, but for pivots of one size; a site whose own differ refuses.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Slot, Tensor
from fedlora.kinds import frames
from fedlora.kinds.contract import Weights


@dataclass(frozen=True)
class LDU(frames.Diagonal):
    """A weight's change is `alpha / r * L @ diag(d) @ U`, with frozen triangular factors of the weight itself."""

    def where(self) -> str:
        """A diagonal between triangles."""
        return f"a diagonal between the first {self.r} triangular factors of this base's weight"

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights) -> Tensor:
        """Columns of P L, or rows of U, of length 1."""
        import torch

        with frames.on_one_thread():
            packed, swaps, _ = torch.linalg.lu_factor_ex(torch.from_numpy(frames.dense(slot, weights)))
        whole = packed.numpy()  # below the diagonal the numbers of L, the rest is U
        row = _swapped(len(whole), swaps.numpy() - 1)  # of the weight, that the factors' rows are of
        sizes, least = np.abs(np.diag(whole))[: self.r], min(whole.shape)
        none = np.flatnonzero(sizes <= frames.ALIKE * np.abs(np.triu(whole[:least])).max())  # pivots by rounding
        if slot.role == "B":
            left = np.zeros((len(whole), self.r))
            left[row] = np.tril(whole[:, : self.r], -1) + np.eye(len(whole), self.r)
            free = np.setdiff1d(np.arange(len(whole)), row[np.setdiff1d(np.arange(self.r), none)])
            left[:, none] = 0.0
            left[free[: len(none)], none] = 1.0
            return frames.rounded(left / np.linalg.norm(left, axis=0))
        right = np.triu(whole[: self.r])
        right[none] = np.eye(right.shape[1])[none]
        right *= np.where(np.diag(right) < 0, -1.0, 1.0)[:, None]  # as over a diagonal of ones
        return frames.rounded(right / np.linalg.norm(right, axis=1, keepdims=True))


def _swapped(rows: int, swaps: NDArray[np.int32]) -> NDArray[np.int64]:
    """The rows of a matrix as they stand after swaps, the i-th of row i with row `swaps[i]`."""
    order = np.arange(rows)
    for i, other in enumerate(swaps):
        order[[i, other]] = order[[other, i]]
    return order
