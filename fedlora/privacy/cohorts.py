"""How many clients a sum takes, and how often coins draw more or fewer.

Where clients are protected whole, each is drawn by a coin of its own. Fewer than `LEAST` are no sum, and noise
alone is released; more than `most` are too many for one. So a client that comes may decide over the changes of
others. But let N be how many others are drawn, in each round. While LEAST <= N < `most` neither rule bites, with
the client or without it. For all coins of the others, under this condition, a release is the Poisson-subsampled
Gaussian mechanism that is accounted for, (epsilon, delta)-private; and N has the same chances with the client and
without. So the whole is (epsilon, delta + p)-private, p = rounds * P[N < LEAST or N >= most]. A scenario where p
may be above a hundredth of delta is refused. Whether enough stay to the end, once drawn, is not covered: a round
that fails so ends the run.
"""

import math

LEAST = 3  # clients of a sum: one alone would show itself, two would show each other
MOST = 2**12  # clients whose numbers fit into a sum
RARE = 0.01  # of delta: the chance of a cohort too small or too large for a sum, over all rounds


def fewer(total: int, rate: float) -> float:
    """The chance that coins draw fewer than LEAST of all clients but one."""
    others = total - 1
    return sum(math.comb(others, k) * rate**k * (1 - rate) ** (others - k) for k in range(min(LEAST, total)))


def most(total: int, rate: float, chance: float) -> int:
    """How many clients a cohort that coins draw may have: all but one are fewer than that, but for a chance.

    By Bernstein's inequality: of variance v, a sum is above its mean by t with probability
    exp(-t^2 / (2 v + 2 t / 3)) at most.
    """
    mean, losses = (total - 1) * rate, -math.log(chance)
    beyond = losses / 3 + math.sqrt(losses**2 / 9 + 2 * mean * (1 - rate) * losses)
    return min(total, math.ceil(mean + beyond))
