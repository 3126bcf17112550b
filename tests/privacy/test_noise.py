import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.privacy.noise import Stream, fresh_key

KEY = bytes(range(32))


def flipped(key: bytes, bits: int) -> bytes:
    return (int.from_bytes(key, "big") ^ bits).to_bytes(32, "big")


def test_a_stream_is_the_keystream_of_its_key():
    made = Stream(KEY)
    for call in range(2):
        nonce = bytes(4) + call.to_bytes(12, "little")
        assert made.bytes(100) == Cipher(algorithms.ChaCha20(KEY, nonce), None).encryptor().update(bytes(100))
    assert Stream(KEY).words(2).tolist() == [
        int.from_bytes(Stream(KEY).bytes(16)[i : i + 8], "little") for i in (0, 8)
    ]


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32 bytes, not 8"):
        Stream(bytes(8))


@settings(max_examples=30, deadline=None)
@given(kept=st.integers(0, 128))
def test_two_keys_that_agree_in_any_128_bits_give_unrelated_noise(kept):
    """The other 128 bits differ: a search through them all has nothing to hold on to. Five standard errors."""
    other = flipped(KEY, (2**256 - 1) ^ (2**128 - 1) << kept)
    count = 4000
    one, two = Stream(KEY).standard_normal(count), Stream(other).standard_normal(count)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(count)


@settings(max_examples=50, deadline=None)
@given(bit=st.integers(0, 255))
def test_one_bit_of_the_key_changes_all_of_the_noise(bit):
    one, two = (Stream(key).standard_normal(4000) for key in (KEY, flipped(KEY, 1 << bit)))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(4000)
    assert not np.isin(one, two).any()


def test_fresh_streams_are_never_drawn_again():
    assert len({fresh_key() for _ in range(100)}) == 100
    assert Stream.fresh().bytes(16) != Stream.fresh().bytes(16)


def test_normals_are_normal_into_the_tails():
    drawn = Stream(KEY).normal(3.0, 2.0, 400_000)
    assert stats.kstest((drawn - 3.0) / 2.0, "norm").pvalue > 1e-3
    for z in (2.0, 3.0, 4.0):  # the share beyond, within five standard errors
        share, expected = np.mean(np.abs(drawn - 3.0) > 2.0 * z), 2 * stats.norm.sf(z)
        assert abs(share - expected) < 5 * math.sqrt(expected / len(drawn))


def test_a_normal_is_half_the_sum_of_four_by_box_and_muller():
    words = Stream(KEY)
    total = np.zeros(2)
    for _ in range(4):
        u, v = ((float(words.words(1)[0]) + 1) * 2.0**-64 for _ in range(2))
        radius = math.sqrt(-2 * math.log(u))
        total += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    np.testing.assert_allclose(Stream(KEY).standard_normal(2), total / 2, rtol=1e-12)


def test_scales_are_one_for_all_or_one_for_each():
    plain = Stream(KEY).standard_normal(3)
    np.testing.assert_array_equal(Stream(KEY).normal(0.0, np.array([1.0, 2.0, 0.0]), 3), plain * [1, 2, 0])
    assert Stream(KEY).normal(size=(2, 3)).shape == (2, 3)


def test_neighbouring_numbers_are_not_correlated():
    drawn = Stream(KEY).standard_normal((2, 100_000))  # cosines and sines of the same pairs
    assert abs(np.corrcoef(drawn)[0, 1]) < 5 / math.sqrt(100_000)
    assert abs(np.corrcoef(drawn[0][1:], drawn[0][:-1])[0, 1]) < 5 / math.sqrt(100_000)


def test_uniform_numbers_are_uniform_and_coins_fall_as_often_as_told():
    drawn = Stream(KEY).random(100_000)
    assert 0 <= drawn.min() and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert abs(np.mean(drawn < 0.01) - 0.01) < 5 * math.sqrt(0.01 / 100_000)
    assert isinstance(Stream(KEY).random(), float)
    assert Stream(KEY).random((2, 2)).shape == (2, 2)


def test_a_permutation_keeps_its_items_and_every_order_comes_as_often():
    made = Stream(KEY)
    rows = np.array([3, 5, 9])
    orders = [tuple(made.permutation(rows)) for _ in range(6000)]
    assert set(map(frozenset, orders)) == {frozenset(rows)}
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


def test_whole_numbers_lie_in_their_range():
    drawn = Stream(KEY).integers(-2, 3, (50, 100))
    assert set(np.unique(drawn)) == {-2, -1, 0, 1, 2}
    assert stats.chisquare(np.unique(drawn, return_counts=True)[1]).pvalue > 1e-3
