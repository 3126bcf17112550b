"""One sum of a client's examples before training, by which the base is made smaller.

Each example, or person, is taken by a coin; what it adds to all matrices of the sum together is at most 1 long
(`fedlora.passes.statistic`), and the sum gets Gaussian noise once:

    vectors             s + N(0, sigma^2 I)
    symmetric matrices  S + N,  N_ij = N_ji,  N_ii ~ N(0, sigma^2),  N_ij ~ N(0, sigma^2 / 2)

The latter is the Gaussian mechanism on symmetric matrices: with `sqrt(2) S_ij` for i < j as coordinates the length
of a vector is the Frobenius norm of its matrix, and the noise is N(0, sigma^2 I) there. It has half the variance
of noise on all entries at the same cost, and keeps the sum symmetric.

Where clients share the noise out, each has this with a part of it, and masks what it sends: the sum of those who
send has the whole (`fedlora.privacy.mechanisms.shared`, `fedlora.engine.summed`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.contract import Mechanism
from fedlora.privacy.noise import Stream


@dataclass(frozen=True, kw_only=True)
class StatisticGaussian(Mechanism):
    """The one sum of a client.

    Attributes:
        sharers: K, of whom each adds such noise to a sum that alone is seen; 1: the noise is all there is.
    """

    sharers: float = 1.0

    def __post_init__(self) -> None:
        if self.quantile is not None:
            raise ContractError("a statistic has a bound that is fixed")

    @property
    def expected(self) -> float:
        """How many are taken on average."""
        return self.sample_rate * self.total

    def event(self, clip_norm: float = 1.0) -> Event:
        """One step."""
        return Event(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=1,
            clip_norm=clip_norm,
            sharers=self.sharers,
        )

    def noised(self, sums: Mapping[str, NDArray[np.float64]], noise: Stream) -> dict[str, NDArray[np.float64]]:
        """Sums with noise.

        Args:
            sums: by name, (in,) or symmetric (in x in); one example moves all of them together by at most 1.
            noise: to draw from, in the order of names.
        """
        return {name: sums[name] + self.noise_multiplier * drawn(sums[name].shape, noise) for name in sorted(sums)}


def drawn(shape: tuple[int, ...], noise: Stream) -> NDArray[np.float64]:
    """Standard normals, (in,); or a symmetric matrix (in x in) that has a variance of 1/2 beside its diagonal."""
    if len(shape) == 1:
        return noise.standard_normal(shape)
    rows, columns = np.triu_indices(shape[0])
    made = np.zeros(shape)
    made[rows, columns] = noise.standard_normal(len(rows)) * np.where(rows == columns, 1.0, math.sqrt(0.5))
    whole: NDArray[np.float64] = made + np.triu(made, 1).T
    return whole


def numbers(shape: tuple[int, ...]) -> int:
    """How many a sum is as it is sent: of a symmetric matrix half of them, with the diagonal."""
    return shape[0] if len(shape) == 1 else shape[0] * (shape[0] + 1) // 2


def flat(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A sum as it is sent: of a symmetric matrix the upper half, row by row."""
    return values if values.ndim == 1 else values[np.triu_indices(len(values))]


def unflat(sent: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The sum of a shape that `flat` made this of.

    Raises:
        ContractError: it has another size, or a number that is none.
    """
    if sent.shape != (numbers(shape),) or not np.isfinite(sent).all():
        raise ContractError(f"a statistic in a message has shape {sent.shape}, or numbers that are not finite")
    if len(shape) == 1:
        return sent.astype(np.float64)
    made = np.zeros(shape)
    made[np.triu_indices(shape[0])] = sent
    return made + np.triu(made, 1).T
