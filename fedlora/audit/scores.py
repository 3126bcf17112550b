"""How likely each canary is to be in the data: generalised least squares over tensors and rounds.

Along a canary with the share a_t of its squared length in tensor t a client's update of round u shows
`p_tu = a_t b_u + n_tu`, where b_u is how often the round drew it. The noise is as measured: `a_t V_t` over the
rounds, V_t the covariance of the numbers of tensor t between them. So with `L = sum_t a_t V_t^-1`

    b = L^-1 sum_t V_t^-1 p_t,    cov(b) = L^-1

is the best linear estimate: a tensor without noise weighs most, and of noise that repeats the difference remains.
The score is the log-likelihood ratio of b between a canary that is in, whose draws are taken as Gaussian with the
moments of a binomial, and one that is out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLOOR = 1e-4  # least variance, over the square of one draw


def covariance(numbers: NDArray[np.float32]) -> Array:
    """The measured covariance between rounds, (rounds, rounds), of a tensor's numbers, (rounds, numbers).

    Shrunk towards the mean variance as if as many more numbers as there are rounds had shown that, so that a few
    numbers do not pass for certainty.
    """
    rounds, count = numbers.shape
    wide = numbers.astype(np.float64)
    total = wide @ wide.T  # (rounds, rounds)
    shrunk: Array = (total + np.trace(total) / count * np.eye(rounds)) / (count + rounds)
    return shrunk + FLOOR * np.eye(rounds)


def scores(
    parts: Array, shares: Array, covariances: Sequence[Array], mean: float | Array, variance: float | Array
) -> Array:
    """The log-likelihood ratio of each of some canaries of one group, (canaries,).

    Args:
        parts: along the canaries, of each tensor in each round, (rounds, tensors, canaries).
        shares: of each tensor in the canaries' squared length, (tensors,).
        covariances: of each tensor, (rounds, rounds).
        mean: of how often a round draws a canary that is in, for all rounds or (rounds,).
        variance: of the same.
    """
    weights = [np.linalg.inv(v) if share else None for v, share in zip(covariances, shares, strict=True)]
    chosen = [(t, w) for t, w in enumerate(weights) if w is not None]
    spread = np.linalg.inv(np.sum([shares[t] * w for t, w in chosen], axis=0))  # cov(b)
    drawn = spread @ np.sum([w @ parts[:, t] for t, w in chosen], axis=0)  # b, (rounds, canaries)
    wider = spread + np.diag(np.broadcast_to(variance, len(spread)))
    within, without = _square(drawn - np.broadcast_to(mean, len(spread))[:, None], wider), _square(drawn, spread)
    size = np.linalg.slogdet(wider)[1] - np.linalg.slogdet(spread)[1]
    ratio: Array = (without - within - size) / 2
    return ratio


def _square(columns: Array, spread: Array) -> Array:
    """`x^T spread^-1 x` of each column x."""
    made: Array = (columns * np.linalg.solve(spread, columns)).sum(0)
    return made
