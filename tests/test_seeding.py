import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.seeding import derive, generator

PARTS = st.lists(st.integers(-5, 10**6) | st.text("/is01a", max_size=4), max_size=4)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((0,), 5940445630358017772),
        ((7, 1, 2, "noise"), 3100126717456852059),
        ((7, 1, 2, "batches"), 3608215948094728117),
        ((7, "1", 2, "noise"), 8248955851225461059),
        ((2**63 - 1, "partition"), 98855128426053072),
    ],
)
def test_seeds_are_what_they_were_in_every_release(path, expected):
    assert derive(*path) == expected


def test_a_seed_is_the_head_of_a_hash_of_the_path():
    head = hashlib.sha256(b"i7/i1/i2/snoise").digest()[:8]
    assert derive(7, 1, 2, "noise") == int.from_bytes(head, "big") >> 1


@given(PARTS, PARTS)
def test_seeds_are_equal_only_for_equal_paths(one, other):
    same = [(type(p), p) for p in one] == [(type(p), p) for p in other]
    assert (derive(3, *one) == derive(3, *other)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1), (0, "1")),  # a number and its text
        ((0, 1, "noise"), (0, 1, "batches")),
        ((0, 1, 2), (0, 2, 1)),
        ((0, 12), (0, 1, 2)),
        ((0, "a/sb"), (0, "a", "b")),  # a separator within a part
        ((0,), (1,)),
    ],
)
def test_different_paths_give_different_streams(one, other):
    assert derive(*one) != derive(*other)
    assert not np.isclose(generator(*one).random(), generator(*other).random())


def test_numpy_integers_count_as_integers():
    assert derive(np.int64(7), np.int64(1)) == derive(7, 1)


def test_a_seed_fits_63_bits_and_its_stream_repeats():
    assert all(0 <= derive(0, i) < 2**63 for i in range(1000))
    np.testing.assert_array_equal(generator(5, "x").random(4), generator(5, "x").random(4))


def test_streams_of_neighbouring_paths_are_not_correlated():
    draws = np.stack([generator(0, client, "noise").standard_normal(2000) for client in range(5)])
    away = np.corrcoef(draws) - np.eye(5)
    assert np.abs(away).max() < 5 / np.sqrt(2000)  # five standard errors
