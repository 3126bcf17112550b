"""Shrinkage of a noised mean change: singular values by the known size of the noise.

Let a change (m x n, m <= n) be a matrix of low rank plus independent noise of standard deviation t in each number,
y one of its singular values over `t sqrt(n)`, and b = m / n. The shrinker with the least squared error, as m and n
grow, keeps the singular vectors and makes of y (Gavish and Donoho, 2017, https://arxiv.org/abs/1405.7511)

    eta(y) = sqrt((y^2 - b - 1)^2 - 4 b) / y   where y > 1 + sqrt(b),   else 0

since noise alone reaches `1 + sqrt(b)` and lengthens what is above it. At t = 0 it is the identity. It is a
function of what was released and of public numbers, so it costs no epsilon (`fedlora.rounds.known_noise` has t).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Layout, Tensor
from fedlora.errors import SettingError
from fedlora.factors import single

Matrix = NDArray[np.float64]


def eta(y: Matrix, b: float) -> Matrix:
    """What becomes of singular values y over `t sqrt(n)`, of a matrix whose sides have the ratio b <= 1."""
    inside = np.maximum((y**2 - b - 1) ** 2 - 4 * b, 0.0)
    return np.where(y > 1 + np.sqrt(b), np.sqrt(inside) / np.maximum(y, 1.0), 0.0)


def shrunk(change: NDArray[np.floating], noise: float) -> tuple[Matrix, int]:
    """A change (out x in) with its singular values shrunk, and how many of them are left.

    Args:
        change: signal and noise.
        noise: standard deviation of the noise in each number.
    """
    wide = change.astype(np.float64)
    if not noise > 0:
        return wide, min(wide.shape)
    u, s, vt = np.linalg.svd(wide, full_matrices=False)
    m, n = sorted(wide.shape)
    size = noise * n**0.5
    new = size * eta(s / size, m / n)
    return u * new @ vt, int((new > 0).sum())


@dataclass(frozen=True, kw_only=True)
class Shrinker:
    """The stage between a strategy's aggregate and the server's optimiser.

    Attributes:
        strength: what the known size of the noise is multiplied by.
        layout: of the adapter.
    """

    strength: float
    layout: Layout

    def __post_init__(self) -> None:
        if not any(self.shrinks(name) for name in self.layout):
            raise SettingError(
                "strategy.shrink", "no factor of this adapter that trains is a matrix: leave it out"
            )

    def shrinks(self, name: str) -> bool:
        """Whether a tensor is a factor, and a matrix. A head is none: what it learns is of no low rank."""
        slot = self.layout[name]
        return slot.role != "head" and slot.trainable and len(slot.shape) == 2

    def step(
        self, before: Mapping[str, Tensor], mean: Mapping[str, Tensor], noise: Mapping[str, float]
    ) -> tuple[Adapter, float | None]:
        """The mean with each factor's change shrunk, and the share of singular values that are left.

        Args:
            before: what the clients started from.
            mean: what the strategy made of their updates.
            noise: standard deviation in each number, by tensor. A tensor without any stays as it is, bit for bit.
        """
        after, left, all_ = dict(mean), 0, 0
        for name in sorted(mean):
            size = self.strength * noise.get(name, 0.0)
            if not (size > 0 and self.shrinks(name)):
                continue
            start = before[name].astype(np.float64)
            change, kept = shrunk(mean[name] - start, size)
            after[name] = single(start + change)
            left, all_ = left + kept, all_ + min(start.shape)
        return after, left / all_ if all_ else None
