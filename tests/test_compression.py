"""Bytes for tensors: how far off a number may be, that it is right on average, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedlora.compression import BLOCK, LEAST_SHARE, Codec, decode

ROUNDED = ("fp16", "bf16", "int8", "int4")
FALSE_ALARM = 1e-9  # of a test of means, over all the numbers that it looks at

tensors = arrays(
    np.float32, array_shapes(max_dims=3, max_side=20), elements=st.floats(-(2.0**40), 2.0**40, width=32)
)


def there_and_back(codec, tensor, seed=0):
    return decode(codec.kind, codec.encode(tensor, np.random.default_rng(seed)), tensor.shape)


def block_largest(tensor):
    flat = np.abs(np.append(tensor.ravel(), np.zeros(-tensor.size % BLOCK, np.float32))).reshape(-1, BLOCK)
    return np.repeat(flat.max(1), BLOCK)[: tensor.size].reshape(tensor.shape).astype(np.float64)


def bound(kind, tensor):
    """The most that a number can be off, which is the gap between the two values that it may arrive as."""
    x = np.abs(tensor.astype(np.float64))
    return {
        "fp16": 2.0**-10 * x + 2.0**-24,
        "bf16": 2.0**-7 * x + 2.0**-133,
        "int8": block_largest(tensor) / 127 + 1e-34,
        "int4": block_largest(tensor) / 7 + 1e-34,
    }[kind]


@pytest.mark.parametrize("kind", ROUNDED)
@given(tensor=tensors, seed=st.integers(0, 9))
@example(tensor=np.array([2.0**-149, -(2.0**-130), 0.0], np.float32), seed=0)
@example(tensor=np.array([3.3e38, -3.4e38], np.float32), seed=0)
def test_every_number_arrives_within_its_bound(kind, tensor, seed):
    got = there_and_back(Codec(kind), tensor, seed).astype(np.float64)
    sent = np.clip(tensor, -65504, 65504) if kind == "fp16" else tensor
    assert (np.abs(got - sent) <= bound(kind, tensor) * (1 + 1e-5)).all() and np.isfinite(got).all()


@pytest.mark.parametrize("kind", ROUNDED)
def test_a_number_is_right_on_average(kind):
    """By Hoeffding: n draws in a range w have a mean within `w sqrt(ln(2 / p) / 2n)`, but once in 1 / p."""
    rng, draws = np.random.default_rng(3), 4000
    tensor = (rng.normal(size=BLOCK) * 10.0 ** rng.integers(-3, 2, BLOCK)).astype(np.float32)
    seen = [there_and_back(Codec(kind), tensor, seed).astype(np.float64) for seed in range(draws)]
    allowed = bound(kind, tensor) * math.sqrt(math.log(2 * tensor.size / FALSE_ALARM) / (2 * draws))
    assert (np.abs(np.mean(seen, 0) - tensor) <= allowed).all()
    assert (np.std(seen, 0) > 0).mean() > 0.8  # by chance, and not to the nearest


@given(tensor=tensors, share=st.floats(LEAST_SHARE, 1.0))
def test_top_k_sends_the_largest_exactly_and_leaves_out_at_most_its_share(tensor, share):
    got = there_and_back(Codec("top_k", share), tensor)
    sent = got != 0
    assert (got[sent] == tensor[sent]).all() and sent.sum() <= math.ceil(share * tensor.size)
    x = tensor.astype(np.float64)
    assert ((x - got) ** 2).sum() <= (1 - share) * (x**2).sum() * (1 + 1e-9)


@given(tensor=tensors, share=st.floats(LEAST_SHARE, 1.0), seed=st.integers(0, 9))
def test_a_mask_sends_its_share_of_the_numbers_times_one_over_it(tensor, share, seed):
    got, kept = there_and_back(Codec("mask", share), tensor, seed), math.ceil(share * tensor.size)
    sent = got != 0
    assert sent.sum() <= kept
    np.testing.assert_allclose(got[sent], (tensor * np.float32(tensor.size / max(kept, 1)))[sent], rtol=1e-6)


def test_a_mask_is_right_on_average_and_as_far_off_as_it_says():
    """Two of eight numbers, times four: the error has `8 / 2 - 1 = 3` times the length squared of the tensor."""
    tensor = np.arange(1, 9, dtype=np.float32)
    seen = np.array([there_and_back(Codec("mask", 0.25), tensor, seed) for seed in range(4000)], np.float64)
    assert {*map(int, (seen != 0).sum(1))} == {2} and (seen[seen != 0] % 4 == 0).all()
    allowed = 4 * tensor * math.sqrt(math.log(2 * 8 / FALSE_ALARM) / (2 * 4000))  # Hoeffding
    assert (np.abs(seen.mean(0) - tensor) <= allowed).all()
    assert ((seen - tensor) ** 2).sum(1).mean() == pytest.approx(3 * (tensor**2).sum(), rel=0.05)


def test_top_k_by_hand():
    tensor = np.array([[1.0, -5.0], [3.0, 0.5]], np.float32)
    data = Codec("top_k", 0.5).encode(tensor, np.random.default_rng(0))
    assert data == np.array([1, 2], "<u4").tobytes() + np.array([-5.0, 3.0], "<f4").tobytes()


@pytest.mark.parametrize(
    "kind, share, size, bytes_",
    [
        ("fp16", 1, 300, 600),
        ("bf16", 1, 300, 600),
        ("int8", 1, 300, 300 + 3 * 4),  # a scale for each 128
        ("int4", 1, 301, 151 + 3 * 4),
        ("top_k", 0.1, 301, 31 * 8),
        ("mask", 0.1, 301, 31 * 4 + 8),  # and a seed
        ("int8", 1, 0, 0),
    ],
)
def test_sizes_follow_from_the_shape(kind, share, size, bytes_):
    for tensor in (np.zeros(size, np.float32), np.ones(size, np.float32)):
        assert len(Codec(kind, share).encode(tensor, np.random.default_rng(0))) == bytes_


@pytest.mark.parametrize("kind", [*ROUNDED, "top_k", "mask"])
@given(data=st.binary(max_size=600), shape=st.lists(st.integers(0, 10**6), max_size=8))
@example(data=b"\x00\x00\x00~\x08", shape=[])  # a scale near the largest of float32
@example(data=b"\x00\x00\x80\x7f\x00", shape=[])  # infinity times zero
def test_whatever_comes_is_a_tensor_of_that_shape_or_refused(kind, data, shape):
    try:
        got = decode(kind, data, shape)
    except ValueError:
        return
    assert got.shape == tuple(shape) and got.dtype == np.float32 and got.size * LEAST_SHARE <= len(data)


@pytest.mark.parametrize(
    "kind, data, shape",
    [
        ("zip", b"", (0,)),
        ("fp16", bytes(3), (2,)),
        ("top_k", bytes(8), (10**9,)),  # eight bytes that ask for four gigabytes
        ("mask", bytes(12), (10**9,)),
        ("mask", bytes(7), (1,)),
        ("mask", bytes(8 + 4 * 4), (3,)),
        ("top_k", np.array([5], "<u4").tobytes() + bytes(4), (3,)),
        ("top_k", np.array([1, 1], "<u4").tobytes() + bytes(8), (3,)),
    ],
)
def test_what_nobody_wrote_is_refused(kind, data, shape):
    with pytest.raises(ValueError):
        decode(kind, data, shape)
