"""Shrinkage of a noised mean: the shrinker by hand, its error on a planted signal, and what it leaves alone."""

import numpy as np
import pytest

from fedlora.adapter import Slot
from fedlora.errors import SettingError
from fedlora.rounds.shrink import Shrinker, eta, shrunk

LAYOUT = {
    "b": Slot("b", (100, 40), "B", "m"),
    "still": Slot("still", (40, 30), "A", "m", trainable=False),
    "values": Slot("values", (40,), "values", "m"),
    "head": Slot("head", (3, 40), "head", "head"),
}


@pytest.mark.parametrize(
    "y, b, said",
    [
        (3.0, 1.0, 5**0.5),  # sqrt((9 - 2)^2 - 4) / 3 = sqrt(45) / 3
        (2.0, 1.0, 0.0),  # as long as noise alone gets
        (2.0, 0.25, 6.5625**0.5 / 2),  # sqrt((4 - 1.25)^2 - 1) / 2
        (1.5, 0.25, 0.0),
        (1e6, 0.5, 1e6),
        (0.0, 0.5, 0.0),
    ],
)
def test_the_shrinker_by_hand(y, b, said):
    assert eta(np.array([y]), b)[0] == pytest.approx(said, rel=1e-9)


def test_sizes_are_those_of_the_noise():
    """A change of one direction of length 6 under noise of 0.5 on 4 x 4 numbers: y = 6 / (0.5 * 2) = 6, and
    eta = sqrt(34^2 - 4) / 6, times 0.5 * 2."""
    change = np.zeros((4, 4))
    change[1, 2] = 6.0
    made, left = shrunk(change, 0.5)
    change[1, 2] = (34**2 - 4) ** 0.5 / 6
    np.testing.assert_allclose(made, change, atol=1e-12)
    assert left == 1


def planted(seed, size=0.1, rank=3):
    """A signal of few directions, and the same under noise of a known size."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(100, rank)) @ rng.normal(size=(rank, 40)) * 0.1
    return signal, signal + size * rng.normal(size=signal.shape)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turned", [False, True])
def test_the_error_of_a_planted_signal_falls(seed, turned):
    signal, noised = (m.T if turned else m for m in planted(seed))
    made, left = shrunk(noised, 0.1)
    assert left == 3 and np.linalg.norm(made - signal) < 0.45 * np.linalg.norm(noised - signal)
    others = [np.linalg.norm(shrunk(noised, 0.1 * s)[0] - signal) for s in (0.5, 0.8, 1.6)]
    assert np.linalg.norm(made - signal) < min(others)


def test_noise_alone_becomes_nothing():
    noise = 0.1 * np.random.default_rng(1).normal(size=(400, 100))
    made, left = shrunk(noise, 0.105)
    assert left == 0 and not made.any()


def tensors(rng):
    return {name: rng.normal(size=slot.shape).astype(np.float32) for name, slot in LAYOUT.items()}


def test_without_noise_it_is_the_identity_bit_for_bit():
    rng = np.random.default_rng(3)
    before, mean = tensors(rng), tensors(rng)
    after, left = Shrinker(strength=1.0, layout=LAYOUT).step(before, mean, dict.fromkeys(LAYOUT, 0.0))
    assert left is None and all(np.array_equal(after[name], mean[name]) for name in LAYOUT)


def test_only_factors_that_train_are_shrunk_and_around_what_was_held():
    rng = np.random.default_rng(3)
    before, mean = tensors(rng), tensors(rng)
    signal, mean["b"] = planted(0)
    mean["b"] = before["b"] + mean["b"].astype(np.float32)
    after, left = Shrinker(strength=2.0, layout=LAYOUT).step(before, mean, dict.fromkeys(LAYOUT, 0.05))
    assert left == 3 / 40
    assert np.linalg.norm(after["b"] - before["b"] - signal) < np.linalg.norm(mean["b"] - before["b"] - signal)
    assert all(np.array_equal(after[name], mean[name]) for name in LAYOUT if name != "b")


def test_a_kind_without_matrices_is_refused():
    with pytest.raises(SettingError, match=r"strategy.shrink: no factor .* is a matrix"):
        Shrinker(strength=1.0, layout={name: LAYOUT[name] for name in ("values", "head", "still")})
