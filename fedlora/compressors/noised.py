"""What is left of a statistic once its noise is taken out, where the size of the noise is known.

Of a symmetric matrix G (d x d) whose noise has the deviation `sigma` on the diagonal and `sigma / sqrt(2)` beside
it (the symmetric Gaussian: all directions in the space of symmetric matrices alike), eigenvalues of noise alone
fill `[-e, e]` with `e = sigma sqrt(2 d)`. So with the eigenvalues l of what came:

    l > e     stays, as (l + sqrt(l^2 - e^2)) / 2, which is what noise makes an l of (Benaych-Georges and
              Nadakuditi, 2011, https://arxiv.org/abs/0910.2120)
    the rest  is told apart by nothing, and each gets an equal part of what the trace leaves, at least 0

The trace adds d noises up, so that the equal part has only `sigma / sqrt(d)` of noise: this is the ridge. With all
eigenvalues below e what comes out is the identity, up to a factor: then a compressor goes by the weights alone.
The result is positive semidefinite. Without noise it is G, with eigenvalues below 0 set to 0.
"""

import numpy as np

from fedlora.factors import Matrix

_LEAST = 1e-12  # of the largest: where nothing is left of a direction its weight still has a tie to break


def symmetric(gram: Matrix, deviation: float) -> tuple[Matrix, Matrix]:
    """Eigenvalues (d,), descending and at least 0, and eigenvectors in columns (d x d), without the noise.

    Args:
        gram: symmetric, (d x d).
        deviation: sigma, of the noise on its diagonal.
    """
    values, turn = np.linalg.eigh((gram + gram.T) / 2)
    values, turn = values[::-1], turn[:, ::-1]
    if deviation:
        edge = deviation * np.sqrt(2 * len(values))
        above = values > edge
        kept = (values + np.sqrt(np.clip(values**2 - edge**2, 0, None))) / 2
        rest = (values.sum() - kept[above].sum()) / max(int((~above).sum()), 1)
        values = np.where(above, kept, rest)
    return np.clip(values, max(_LEAST * values.max(), np.finfo(float).tiny), None), turn


def spread(values: Matrix, deviation: float) -> Matrix:
    """Numbers that are at least 0, (d,), drawn to their mean as far as noise made them differ.

    `mean + (1 - sigma^2 / variance)_+ (v - mean)`, with the variance of what came: what the noise alone explains
    becomes the same number everywhere, at which a compressor goes by the weights alone.

    Args:
        values: (d,).
        deviation: sigma, of the noise in each.
    """
    if deviation:
        middle, variance = values.mean(), values.var()
        share = max(1 - deviation**2 / variance, 0.0) if variance else 0.0
        values = middle + share * (values - middle)
    most = values.max(initial=0.0)
    if most <= 0:
        return np.ones_like(values)
    return np.clip(values, _LEAST * most, None)
