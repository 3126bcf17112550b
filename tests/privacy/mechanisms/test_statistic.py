import numpy as np
import pytest

from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.mechanisms.statistic import StatisticGaussian, drawn
from fedlora.seeding import stream

MADE = StatisticGaussian(noise_multiplier=2.0, sample_rate=0.5, total=10)


def test_noise_of_a_gram_is_symmetric_and_halved_beside_its_diagonal():
    many = np.stack([drawn((6, 6), stream(0, k)) for k in range(2000)])
    assert np.array_equal(many, many.transpose(0, 2, 1))
    spread = many.std(0)
    assert np.diag(spread) == pytest.approx(np.ones(6), rel=0.08)
    assert spread[np.triu_indices(6, 1)] == pytest.approx(np.full(15, 0.5**0.5), rel=0.08)


def test_noise_is_alike_in_every_direction_of_symmetric_matrices():
    """The inner product with any symmetric matrix of length 1 is a standard normal."""
    rng = np.random.default_rng(0)
    many = np.stack([drawn((6, 6), stream(1, k)) for k in range(2000)])
    for _ in range(5):
        a = rng.standard_normal((6, 6))
        a = (a + a.T) / np.linalg.norm(a + a.T)
        assert (many * a).sum((1, 2)).std() == pytest.approx(1.0, rel=0.06)


def test_a_vector_has_noise_of_the_multiplier():
    sums = {"b": np.zeros(4000), "a": np.full((3, 3), 7.0)}
    made = MADE.noised(sums, stream(0, "x"))
    assert made["b"].std() == pytest.approx(2.0, rel=0.05) and made["a"].shape == (3, 3)
    again = MADE.noised(dict(reversed(sums.items())), stream(0, "x"))
    assert all(np.array_equal(made[n], again[n]) for n in sums)  # in the order of names
    assert (sums["b"] == 0).all()


def test_it_costs_one_step():
    assert MADE.event() == Event(noise_multiplier=2.0, sample_rate=0.5, steps=1, clip_norm=1.0)
    assert MADE.expected == 5.0
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0)))
    assert epsilon([MADE.event()], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)
