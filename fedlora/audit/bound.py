"""The lower bound of one-run auditing (Steinke, Nasr and Jagielski, 2023, https://arxiv.org/abs/2305.08846).

Each of m canaries is included by a fair coin. From the output alone the auditor guesses some of the coins.
Theorem 5.2: if the mechanism is (epsilon, delta)-differentially private, r guesses are right v times or more
with probability at most

    beta + 2 m delta alpha,   beta = P[W >= v],   alpha = max_{i >= 1} P[v > W >= v - i] / i

with W binomial, r draws with success `e^epsilon / (e^epsilon + 1)`. It holds however the guesses are made,
as long as the number of guesses was fixed beforehand.
"""

import math


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most probable that so many right guesses are under (epsilon, delta)-differential privacy.

    Args:
        canaries: m, whose coins were tossed.
        guesses: r, at most `canaries`; the others were abstained from.
        correct: v, how many of them were right.
        epsilon: of the claim.
        delta: of the claim.
    """
    import numpy as np
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries")
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, chance))
    below = binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance).cumsum()  # P[v > W >= v - i], i from 1
    alpha = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(beta + 2 * canaries * delta * alpha, 1.0)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon, to 1e-4 and at most 50, that so many right guesses refute at a confidence; else 0."""
    low, high = 0.0, 50.0
    if p_value(canaries, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low
