"""What the best of a random number of runs costs, where nothing else leaves."""

import math

import numpy as np
import pytest

from fedlora.privacy.accounting import Event, epsilon_of_runs
from fedlora.privacy.selection import epsilon_of_best, number
from fedlora.seeding import stream


def run(noise=1.0):
    return [[Event(noise_multiplier=noise, sample_rate=0.05, steps=60, clip_norm=1.0)]]


@pytest.mark.parametrize("mean", [1.0, 4.0, 30.0])
def test_it_is_what_dp_accounting_says_of_repeat_and_select(mean):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    one = SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), 60)
    counted = RdpAccountant()
    counted.compose(RepeatAndSelectDpEvent(one, mean, 1.0))
    assert epsilon_of_best([run()], mean, 1e-5) == pytest.approx(counted.get_epsilon(1e-5), rel=0.03)


def test_it_is_less_than_the_sum_of_many_runs_and_more_than_one():
    one, best = epsilon_of_runs([run()], 1e-5), epsilon_of_best([run()], 20.0, 1e-5)
    assert one < best < epsilon_of_runs([run()] * 20, 1e-5)


def test_a_grid_costs_as_its_dearest_setting():
    assert epsilon_of_best([run(2.0), run(1.0)], 8.0, 1e-5) == epsilon_of_best([run(1.0)], 8.0, 1e-5)


def test_how_many_runs_there_are_is_geometric():
    """Of mean 4: one run with probability 1/4, two with 3/16; 20,000 draws, to five standard errors."""
    coins = stream(1, "test")
    drawn = np.array([number(4.0, coins) for _ in range(20_000)])
    for value, share in ((1, 1 / 4), (2, 3 / 16), (3, 9 / 64)):
        assert abs(np.mean(drawn == value) - share) < 5 * math.sqrt(share * (1 - share) / 20_000)
    assert abs(drawn.mean() - 4) < 5 * math.sqrt(12 / 20_000) and drawn.min() == 1
    assert number(1.0, coins) == 1
