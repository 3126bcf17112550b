"""Theorem 5.2 of Steinke, Nasr and Jagielski (2023), against numbers had in other ways."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedlora.audit.bound import lower_bound, p_value


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
