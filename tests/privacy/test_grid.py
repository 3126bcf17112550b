"""Numbers on the grid: what comes out of a sum is what went in, to a step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ContractError
from fedlora.privacy import grid
from fedlora.privacy.noise import Stream


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.integers(1, 8))
def test_sums_of_quantised_numbers_are_off_by_a_step_each_at_most(values, count):
    numbers, rng = np.array(values), np.random.default_rng(0)
    total = sum((grid.quantise(numbers, 3.0, rng) for _ in range(count)), np.zeros(len(numbers), np.uint32))
    assert np.abs(grid.dequantise(total, 3.0) - count * numbers).max() <= count * 3.0 / 2**19 + 1e-12


def test_rounding_is_right_on_average():
    rng = np.random.default_rng(0)
    drawn = grid.dequantise(grid.quantise(np.full(40_000, 0.25 * 2**-19), 1.0, rng), 1.0) * 2**19
    assert set(drawn) == {0.0, 1.0} and abs(drawn.mean() - 0.25) < 5 * (0.1875 / 40_000) ** 0.5


@pytest.mark.parametrize("beyond", [-1.5, np.nan, np.inf])
def test_a_number_beyond_the_range_is_refused_in_words_that_do_not_tell_it(beyond):
    with pytest.raises(ContractError) as told:
        grid.quantise(np.array([0.0, beyond]), 1.0, Stream.fresh())
    assert str(told.value) == "a number changed by more than secure_aggregation.range, 1"
