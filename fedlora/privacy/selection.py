"""Private selection: what it costs to give out the best of several private runs, and nothing of the others.

Papernot and Steinke (2022, https://arxiv.org/abs/2110.03620): if the number of runs N is random and independent of
the data, each run is drawn and made anew, and only the best by a score leaves, that costs less than the sum of all
runs. Here N is geometric of mean m, P[N = n] = (1 - 1/m)^(n - 1) / m (their truncated negative binomial with
eta = 1). Theorem 2: if one run has Renyi DP e(a) at order a, what leaves has

    e(a) + log(m) / (a - 1) + 2 min_b ((1 - 1/b) e(b) + log(m) / b)

dp-accounting has it as `RepeatAndSelectDpEvent`. A run draws its setting from a grid, each alike, and tells it:
so e(a) is at most the largest over the grid, at each order.

What it takes: a score that costs nothing (of public rows), or is private in itself; fresh randomness for N, the
settings and the noise of each run; and that nobody learns of the runs that were not chosen, nor of how many.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedlora.privacy.accounting import Event, of_renyi, orders, renyi
from fedlora.privacy.noise import Stream


def number(mean: float, coins: Stream) -> int:
    """How many runs, geometric of a mean: tosses until the first that has probability 1 / mean.

    Args:
        mean: 1 at least.
        coins: to toss.
    """
    if mean <= 1:
        return 1
    return 1 + math.floor(math.log(1.0 - coins.random()) / math.log1p(-1.0 / mean))


def epsilon_of_best(points: Iterable[Sequence[Sequence[Event]]], mean: float, delta: float) -> float:
    """Epsilon at `delta` of giving out the best of a geometric number of runs, and nothing else.

    Args:
        points: of each setting that a run may have, the events of every holder of a budget.
        mean: number of runs.
        delta: of the whole.
    """
    one = np.max([renyi(point) for point in points], axis=0)  # (orders,)
    at = np.asarray(orders(), float)
    more = 2 * np.min((1 - 1 / at) * one + math.log(mean) / at)
    return of_renyi(one + math.log(mean) / (at - 1) + more, delta)
