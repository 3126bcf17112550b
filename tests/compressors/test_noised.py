import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.compressors.contract import Statistic, compress, load
from fedlora.compressors.noised import spread, symmetric


def noise(rng, d, deviation):
    """Symmetric, of that deviation on the diagonal and 1/sqrt(2) of it beside."""
    drawn = rng.standard_normal((d, d)) * deviation
    return (drawn + drawn.T) / 2


@given(seed=st.integers(0, 2**16), deviation=st.sampled_from([0.0, 0.1, 10.0]))
def test_what_comes_out_is_positive_and_symmetric(seed, deviation):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 8))
    values, turn = symmetric(x.T @ x + noise(rng, 8, deviation), deviation)
    assert (values > 0).all() and np.allclose(turn @ turn.T, np.eye(8))


def test_without_noise_a_gram_is_itself():
    x = np.random.default_rng(0).standard_normal((50, 8))
    values, turn = symmetric(x.T @ x, 0.0)
    assert np.allclose(turn * values @ turn.T, x.T @ x) and (np.diff(values) <= 0).all()


def test_noise_alone_becomes_the_identity():
    values, _ = symmetric(noise(np.random.default_rng(1), 200, 1.0) * 0.99, 1.0)
    assert values.max() / values.min() < 1 + 1e-6


def test_a_direction_above_the_noise_comes_back_at_its_own_size():
    d, deviation, size = 200, 1.0, 60.0  # the edge is sqrt(400) = 20
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        v = rng.standard_normal(d)
        v /= np.linalg.norm(v)
        values, turn = symmetric(size * np.outer(v, v) + noise(rng, d, deviation), deviation)
        assert abs(turn[:, 0] @ v) > 0.95
        found.append(values[0])
    assert np.mean(found) == pytest.approx(size, abs=1.0)  # 61.7 before: the noise adds 100 / 60


def test_the_rest_has_what_the_trace_leaves():
    values, _ = symmetric(np.diag([100.0, 3.0, 2.0, 1.0]), 2.0)  # the edge is 2 sqrt(8)
    top = (100 + np.sqrt(100**2 - 32)) / 2
    assert values == pytest.approx([top, *[(106 - top) / 3] * 3])


def test_numbers_that_noise_explains_become_one():
    assert spread(np.array([1.0, 2.0, 3.0]), 5.0) == pytest.approx([2, 2, 2])
    assert spread(np.array([1.0, 2.0, 3.0]), 0.0) == pytest.approx([1, 2, 3])
    # variance 2/3, of which the noise is half
    assert spread(np.array([1.0, 2.0, 3.0]), np.sqrt(1 / 3)) == pytest.approx([1.5, 2, 2.5])
    assert (spread(np.array([-1.0, -2.0]), 0.0) == 1).all()


def test_a_drowned_statistic_gives_the_plain_svd():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((40, 60)).astype(np.float32)
    plain = compress(load("lord", {}), {"a": weight}, {})["a"]
    drowned = Statistic("gram", noise(rng, 60, 1.0) * 0.9, 1.0)
    cut = compress(load("lord", {}), {"a": weight}, {"a": drowned})["a"]
    assert np.allclose(cut.left @ cut.right, plain.left @ plain.right, atol=1e-4)
