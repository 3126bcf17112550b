"""The grid of secure aggregation: numbers, and their noise, as integers modulo 2^32."""

import math

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError
from fedlora.privacy.cohorts import MOST
from fedlora.privacy.noise import Stream

Vector = NDArray[np.uint32]  # modulo 2^32

BITS = 20  # of a number in the sum
FINE = 8.0  # steps of the grid in the standard deviation of noise, at least


def quantise(values: NDArray[np.floating], largest: float, rng: Stream) -> Vector:
    """Numbers in [-largest, largest] as integers, rounded up or down at random so that the mean is right.

    Raises:
        ContractError: a number is larger.
    """
    steps = values.astype(np.float64) * (2 ** (BITS - 1) / largest)
    if not (np.abs(values) <= largest).all():
        raise ContractError(f"a number changed by more than secure_aggregation.range, {largest:g}")
    down = np.floor(steps)
    rounded: Vector = (down + (rng.random(len(steps)) < steps - down)).astype(np.int64).astype(np.uint32)
    return rounded


def noise(stds: NDArray[np.float64], largest: float, rng: Stream) -> Vector:
    """Gaussian noise in whole steps of the grid, to be added to what was rounded before.

    The sum of several such is taken for a Gaussian of their joint variance in whole steps. With eight steps to a
    standard deviation the two differ by less than e^-600 (Kairouz et al., 2021, Theorem 1,
    https://arxiv.org/abs/2102.06387, has it for the discrete Gaussian).

    Args:
        stds: the standard deviation of each number.
        largest: the range of the grid.
        rng: to draw from.
    """
    steps = stds * (2 ** (BITS - 1) / largest)
    drawn: Vector = np.rint(rng.normal(0.0, steps, len(steps))).astype(np.int64).astype(np.uint32)
    return drawn


def check_grid(stds: NDArray[np.float64], largest: float, members: int) -> None:
    """Make sure that a sum and its noise fit on the grid, and that its steps are fine enough for each share.

    Args:
        stds: the standard deviation of the noise on each number of the sum; 0 where there is none.
        largest: the range of the grid.
        members: clients of the largest sum, not of this one: one more or less must not decide.

    Raises:
        ContractError: they do not, or are not.
    """
    if members + 8 * stds.max(initial=0.0) / largest > MOST:
        raise ContractError(
            f"a sum of {members} clients and their noise does not fit: raise secure_aggregation.range"
        )
    least = float(stds[stds > 0].min(initial=math.inf)) / math.sqrt(members) * 2 ** (BITS - 1) / largest
    if least < FINE:
        raise ContractError(
            f"noise of {least:.2g} steps is too little for the grid: lower secure_aggregation.range, or add more"
        )


def rounding(size: int, largest: float) -> float:
    """How much longer a vector of `size` numbers may get, in L2 norm, when it is rounded to the grid."""
    return math.sqrt(size) * largest / float(2 ** (BITS - 1))


def dequantise(total: Vector, largest: float) -> NDArray[np.float64]:
    """The sum that a sum of quantised numbers stands for."""
    meant: NDArray[np.float64] = total.view(np.int32).astype(np.float64) * (largest / 2 ** (BITS - 1))
    return meant
