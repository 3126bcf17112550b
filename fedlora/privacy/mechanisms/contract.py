"""The Mechanism contract: whom a side takes, how it bounds what each adds, how it noises the sum, what that costs.

One frozen object says all four, so that they cannot disagree. What is public is a field of it; what may be
private, such as gradients, is an argument of a method. So what it costs cannot depend on an example: `event` has
no such argument.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.privacy.accounting import Event
from fedlora.privacy.noise import Stream


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A clipping bound that moves towards a quantile of the norms (Andrew et al., 2021, arXiv 1905.03871).

    Each that is clipped also counts +1/2 if its norm was within the bound C, and -1/2 if not. With noise of
    standard deviation sigma_b = n / 20 on that count, `C <- C exp(-0.2 (count / n + 1/2 - quantile))`. Sum and
    count together cost what one release under `noise_multiplier` does: `z_sum^-2 + (2 sigma_b)^-2 = z^-2`.

    Attributes:
        quantile: to move towards.
        expected: n, how many are clipped on average; never how many were.
        noise_multiplier: z.
    """

    quantile: float
    expected: float
    noise_multiplier: float

    @property
    def enough(self) -> bool:
        """Whether there are so many that the count leaves noise for the sum: more than 10 z."""
        return 2 * self.count_noise > self.noise_multiplier

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count."""
        return self.expected / 20

    @property
    def sum_noise(self) -> float:
        """Standard deviation of the noise on the sum over C."""
        return float((self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    def moved(self, bound: float, count: float) -> float:
        """The next bound after a noised count."""
        return bound * math.exp(-0.2 * (count / self.expected + 0.5 - self.quantile))


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """The Poisson-subsampled Gaussian mechanism, over examples at a client or over clients at the server.

    Each of `total` is taken by a coin of its own with probability `sample_rate`; what each adds is clipped to an
    L2 norm C; the sum carries N(0, (sum_noise C)^2 I) and is divided by `expected`, never by how many came.

    Attributes:
        noise_multiplier: z, standard deviation of the noise over C; where C adapts, of sum and count together.
        sample_rate: with which each is taken, in (0, 1].
        total: how many there are; it is public.
        quantile: of the norms, which C adapts to; None: C is fixed.
    """

    noise_multiplier: float
    sample_rate: float
    total: int
    quantile: float | None = None

    @property
    @abstractmethod
    def expected(self) -> float:
        """How many are taken on average, which sums are divided by."""

    @abstractmethod
    def event(self, clip_norm: float) -> Event:
        """What it costs, at a bound C."""

    @property
    def adapts(self) -> Quantile | None:
        """How C moves; None where it is fixed."""
        if self.quantile is None:
            return None
        return Quantile(quantile=self.quantile, expected=self.expected, noise_multiplier=self.noise_multiplier)

    @property
    def sum_noise(self) -> float:
        """Standard deviation of the noise on the sum over C."""
        return self.adapts.sum_noise if self.adapts else self.noise_multiplier

    def taken(self, coins: Stream, step: int = 0) -> NDArray[np.bool_]:
        """Whom a draw takes, (total,); the arguments are those of `tossed`."""
        return self.tossed(coins, step)

    def tossed(self, coins: Stream, step: int) -> NDArray[np.bool_]:
        """Whom the coins take, (total,).

        Args:
            coins: to toss.
            step: counted over the run; it matters where they take turns.
        """
        drawn: NDArray[np.bool_] = coins.random(self.total) < self.sample_rate
        return drawn
