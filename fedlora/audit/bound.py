"""Lower bounds on epsilon from one run.

Each of m canaries is included by a fair coin. From the output alone the auditor guesses some of the coins, r of
them, a number fixed beforehand; v guesses are right. Two theorems say how probable that is at most.

**Theorem 5.2** of Steinke, Nasr and Jagielski (2023, https://arxiv.org/abs/2305.08846): if the mechanism is
(epsilon, delta)-differentially private, r guesses are right v times or more with probability at most

    beta + 2 m delta alpha,   beta = P[W >= v],   alpha = max_{i >= 1} P[v > W >= v - i] / i

with W binomial, r draws with success `e^epsilon / (e^epsilon + 1)`.

**The recursion** of Mahloujifar, Melis and Chaudhuri (2024, https://arxiv.org/abs/2410.22235) takes the whole
curve of what a mechanism may give away. Where it is (a, delta(a))-differentially private for each a, an event of
probability x without a canary has at most `F(x) = min_a delta(a) + e^a x` with it. With p_j the probability of j
right guesses, the mean of this over the canaries is, for each v,

    R_v <= F(H_{v-1}),   R_v = sum_{j >= v} j p_j / m,   H_v = sum_{j >= v} (r - j) p_j / m

So from a tail `sum_{j >= v} p_j` the least p_j of all smaller j follow one after another; where they come to more
than 1, so large a tail is refuted.

`lower_bound` assumes nothing of the mechanism. Either theorem may refute, at no loss of confidence: each does from
some v on, so that only the smaller v counts. `Curve` takes steps, sampling rates and clients as the ledger has
them, and scales the noise multipliers together: its bound is the epsilon of the least noise that the run refutes.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedlora.privacy import accounting
from fedlora.privacy.accounting import Accountant, Event

MOST = 50.0  # epsilon; what refutes it refutes any
DISTINCT = 4  # histories that are looked at one by one; of more, one that loses as much as each
_FINE = 1.01  # from one noise multiplier that is tried to the next
_EPSILONS = np.concatenate([np.arange(-8, 8, 0.04), np.geomspace(8, 2 * MOST, 60)])
_SHRINK = np.exp(-_EPSILONS)


Least = Callable[[float], float]
"""The least probability without a canary of what has some probability with it: the inverse of F."""


def refutes(least: Least, canaries: int, guesses: int, correct: int, confidence: float) -> bool:
    """Whether so many right guesses or more are less probable than 1 - confidence.

    Args:
        least: of the mechanism.
        canaries: m, whose coins were tossed.
        guesses: r, at most `canaries`; the others were abstained from.
        correct: v, how many of them were right.
        confidence: of the verdict.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries")
    tail = 1 - confidence
    right, wrong = tail * correct / canaries, tail * (guesses - correct) / canaries  # R_v and H_v
    for j in range(correct - 1, -1, -1):
        if (more := least(right) - wrong) <= 0:
            break  # nothing follows for smaller j either
        right, wrong = right + j / (guesses - j) * more, wrong + more
        if right + wrong > guesses / canaries:
            return True
    return right + wrong > guesses / canaries


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most probable that so many right guesses are under (epsilon, delta)-differential privacy.

    Args:
        canaries: m, whose coins were tossed.
        guesses: r, at most `canaries`; the others were abstained from.
        correct: v, how many of them were right.
        epsilon: of the claim.
        delta: of the claim.
    """
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

    def refuted(epsilon: float) -> bool:
        if p_value(canaries, guesses, correct, epsilon, delta) <= 1 - confidence:
            return True
        up, down = math.exp(epsilon), math.exp(-epsilon)

        def least(x: float) -> float:
            return max((x - delta) * down, 1 - delta - (1 - x) * up)

        return refutes(least, canaries, guesses, correct, confidence)

    low, high = 0.0, MOST
    if not refuted(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


class Curve:
    """What clients' steps may give away, under more noise or less."""

    def __init__(self, histories: Collection[Sequence[Event]], delta: float, accountant: Accountant) -> None:
        """The mechanism as a ledger has it.

        Args:
            histories: of each client what it spent.
            delta: at which epsilon is stated.
            accountant: by which.
        """
        spent = ([e for e in events if e.steps] for events in histories)
        self.histories = {_together(events) for events in spent} - {()}
        self.delta, self.accountant = delta, accountant
        self.epsilon = lru_cache(maxsize=None)(self._epsilon)
        self.least = lru_cache(maxsize=None)(self._least)

    def bound(self, canaries: int, guesses: int, correct: int, confidence: float) -> float:
        """The epsilon of the least noise that so many right guesses refute at a confidence, up to `MOST`, or 0."""
        if not self.histories:
            return 0.0

        def refuted(step: int) -> bool:
            return refutes(self.least(step), canaries, guesses, correct, confidence)

        low, high = 0, 64  # refuted is what has more noise
        while not refuted(high):
            low, high = high, 2 * high
            if self.epsilon(low) < 0.01:
                return 0.0
        while refuted(low):
            if self.epsilon(low) >= MOST:
                return MOST
            low, high = low - 64, low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if refuted(middle) else (middle, high)
        return self.epsilon(high)

    def _scaled(self, step: int) -> list[tuple[Event, ...]]:
        """The histories with `_FINE`^step times the noise."""
        scale = _FINE**step
        return [
            tuple(replace(e, noise_multiplier=e.noise_multiplier * scale) for e in h)
            for h in sorted(self.histories, key=repr)
        ]

    def _epsilon(self, step: int) -> float:
        return min(max(accounting.epsilon(h, self.delta, self.accountant) for h in self._scaled(step)), MOST)

    def _least(self, step: int) -> Least:
        """By the largest delta over clients at each of `_EPSILONS`."""
        scaled = self._scaled(step)
        if len(scaled) > DISTINCT:
            every = [event for history in scaled for event in history]
            worst = replace(
                every[0],
                noise_multiplier=min(e.noise_multiplier for e in every),
                sample_rate=max(e.sample_rate for e in every),
                steps=max(sum(e.steps for e in history) for history in scaled),
                bands=min(e.bands for e in every),
            )
            scaled = [(worst,)]
        deltas = np.max([accounting.profile(history, list(_EPSILONS)) for history in scaled], axis=0)
        return lambda x: float(((x - deltas) * _SHRINK).max())


def _together(events: Sequence[Event]) -> tuple[Event, ...]:
    known: tuple[Event, ...] = ()
    for event in events:
        known = accounting.added(known, event)
    return known
