"""Bounds from one run, against numbers had in other ways."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binomtest

from fedlora.audit.bound import MOST, Curve, lower_bound, p_value, refutes
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event


def exactly(canaries: int, guesses: int, correct: int, odds: Fraction, delta: Fraction) -> Fraction:
    """beta + 2 m delta max_i (f(v - i) - f(v)) / i in whole numbers, with f(v) = P[W >= v]."""
    chance = odds / (1 + odds)

    def f(v: int) -> Fraction:
        return sum(
            (
                math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
                for k in range(max(v, 0), guesses + 1)
            ),
            Fraction(0),
        )

    alpha = max((f(correct - i) - f(correct)) / i for i in range(1, canaries + 1))
    return min(f(correct) + 2 * canaries * delta * alpha, Fraction(1))


@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**4), Fraction(1, 100)])
@pytest.mark.parametrize(
    ("canaries", "guesses", "correct"),
    [(10, 10, 10), (30, 20, 17), (40, 40, 21), (12, 5, 0), (25, 25, 1), (9, 1, 1)],
)
@pytest.mark.parametrize("odds", [Fraction(1), Fraction(3), Fraction(20)])
def test_the_p_value_is_the_theorems(canaries, guesses, correct, odds, delta):
    ours = p_value(canaries, guesses, correct, math.log(odds), float(delta))
    assert ours == pytest.approx(float(exactly(canaries, guesses, correct, odds, delta)), rel=1e-9)


def test_a_figure_to_check_by_hand():
    """All of 1000 guesses right: `p^1000 = 0.05` at p = 0.997009, and log(p / (1 - p)) = 5.809."""
    assert lower_bound(1000, 1000, 1000, 0.0, 0.95) == pytest.approx(5.809, abs=1e-3)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 80), (1000, 600), (64, 64), (500, 499)])
def test_without_delta_it_is_clopper_and_pearson(guesses, correct):
    low = binomtest(correct, guesses, alternative="greater").proportion_ci(0.99, "exact").low
    assert lower_bound(2 * guesses, guesses, correct, 0.0, 0.99) == pytest.approx(
        math.log(low / (1 - low)), abs=2e-4
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_is_accused_no_more_often_than_stated(epsilon):
    """Its guesses are binomial, so how often the bound passes the truth can be summed up."""
    guesses, chance = 60, Fraction(math.exp(epsilon)).limit_denominator(10**6)
    right = chance / (1 + chance)
    wrong = sum(
        math.comb(guesses, v) * right**v * (1 - right) ** (guesses - v)
        for v in range(guesses + 1)
        if lower_bound(guesses, guesses, v, 0.0, 0.95) > epsilon + 1e-3
    )
    assert 0.005 < wrong <= 0.05


def test_a_mechanism_that_gives_one_in_a_hundred_away_is_not_accused_at_its_delta():
    """It publishes each bit with chance delta and else nothing: (0, delta) private, and all its guesses right."""
    canaries, delta = 1000, 0.01
    assert lower_bound(canaries, 10, 10, 0.0, 0.95) > 1
    assert lower_bound(canaries, 10, 10, delta, 0.95) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.data())
def test_more_right_guesses_refute_more_and_a_larger_delta_less(guesses, data):
    correct = data.draw(st.integers(1, guesses))
    more = lower_bound(400, guesses, correct, 1e-6, 0.95)
    assert lower_bound(400, guesses, correct - 1, 1e-6, 0.95) <= more
    assert lower_bound(400, guesses, correct, 1e-3, 0.95) <= more <= lower_bound(400, guesses, correct, 0.0, 0.95)
    assert lower_bound(400, guesses, correct, 1e-6, 0.99) <= more


@pytest.mark.parametrize("numbers", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ValueError, match="canaries"):
        p_value(*numbers, 1.0, 0.0)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 0.0), (0.5, 0.02), (1.0, 0.002)])
def test_what_is_refuted_is_what_a_linear_program_finds_to_be_too_improbable(epsilon, delta):
    """The most probable tail over all distributions of right guesses that keep to the curve, 20 of 30 coins."""
    canaries, guesses = 30, 20
    right = np.arange(guesses + 1)
    least = lambda x: max((x - delta) * math.exp(-epsilon), 1 - delta - (1 - x) * math.exp(epsilon))  # noqa: E731
    for correct in range(8, 20):
        rows = []  # R_v <= delta + e^epsilon H_{v-1}, and R_v <= 1 - e^-epsilon (1 - delta - H_{v-1})
        for v in range(1, guesses + 1):
            r, h = right * (right >= v) / canaries, (guesses - right) * (right >= v - 1) / canaries
            rows.append((r - math.exp(epsilon) * h, delta))
            rows.append((r - math.exp(-epsilon) * h, 1 - math.exp(-epsilon) * (1 - delta)))
        tail = linprog(
            -(right >= correct).astype(float),
            A_ub=[row for row, _ in rows],
            b_ub=[most for _, most in rows],
            A_eq=[np.ones(guesses + 1)],
            b_eq=[1.0],
        )
        if tail.fun < -0.999:
            continue
        refuted = [refutes(least, canaries, guesses, correct, 1 - by * -tail.fun) for by in (0.999, 1.001)]
        assert refuted == [False, True]


def test_a_mechanism_that_gives_all_away_one_time_in_twenty_is_not_accused_at_its_own_delta():
    assert lower_bound(100, 100, 100, 0.05, 0.951) == 0 < lower_bound(100, 100, 100, 0.05, 0.949)


def of(noise, rate=1.0, steps=1):
    return Event(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)


def test_the_bound_of_a_known_mechanism_is_too_large_no_more_often_than_stated():
    """Steps that draw a canary one time in four, told apart as well as they can be: 200 runs of 1,000 canaries."""
    event, canaries = of(2.0, 0.25, 20), 1000
    truth = accounting.epsilon([event], 1e-5)
    claim, rng, found = Curve([[event]], 1e-5, "pld"), np.random.default_rng(0), []
    for _ in range(200):
        included = rng.random(canaries) < 0.5
        drawn = included & (rng.random((20, canaries)) < 0.25)
        seen = drawn + 2.0 * rng.standard_normal((20, canaries))
        order = np.argsort(-np.log(0.75 + 0.25 * np.exp((2 * seen - 1) / 8)).sum(0))
        right = included[order[:80]].sum() + (~included[order[-40:]]).sum()
        found.append(claim.bound(canaries, 120, int(right), 0.95))
    assert np.mean(np.array(found) > truth) <= 0.05
    assert 0.4 * truth < np.mean(found) < 0.7 * truth  # and it sees much of it
    anyway = [lower_bound(canaries, 120, 96, 1e-5, 0.95), claim.bound(canaries, 120, 96, 0.95)]
    assert anyway[1] > 1.3 * anyway[0]


def test_a_history_scaled_to_less_noise_explains_what_more_noise_does_not():
    claim = Curve([[of(4.0)]], 1e-5, "pld")
    bound = claim.bound(1000, 200, 180, 0.95)
    assert accounting.epsilon([of(4.0)], 1e-5) < bound < MOST
    assert bound == pytest.approx(Curve([[of(1.0)]], 1e-5, "pld").bound(1000, 200, 180, 0.95), rel=0.03)


def test_what_sampling_hides_no_noise_explains():
    """A step that draws one in ten may give all away one time in ten, more often than stated; not one in fifty."""
    assert Curve([[of(4.0, 0.1)]], 1e-5, "pld").bound(1000, 1000, 900, 0.95) < MOST
    assert Curve([[of(4.0, 0.02)]], 1e-5, "pld").bound(1000, 1000, 900, 0.95) == MOST


def test_of_many_histories_one_that_loses_as_much_as_each_stands_for_all():
    few = Curve([[of(2.0, 0.2)] * 3], 1e-5, "pld")
    many = Curve([[of(2.0 + i / 10, 0.2 - i / 100)] * 3 for i in range(8)], 1e-5, "pld")
    assert many.bound(1000, 200, 150, 0.95) == few.bound(1000, 200, 150, 0.95)


def test_where_nothing_was_spent_nothing_is_bounded():
    assert Curve([[of(2.0, 0.2, 0)]], 1e-5, "pld").bound(100, 50, 50, 0.95) == 0
    assert Curve([[of(2.0)]], 1e-5, "pld").bound(100, 50, 25, 0.95) == 0
