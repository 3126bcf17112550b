"""A statistic under masks: what comes out is the plain sum to the grid, with the noise that was paid for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.engine import summed
from fedlora.engine.replies import Report
from fedlora.engine.secure import played
from fedlora.engine.statistic import mechanism
from fedlora.errors import RoundError, SettingError
from fedlora.privacy import grid
from fedlora.privacy.accounting import Event
from fedlora.privacy.graph import sharers
from fedlora.scenario import SecureAggregation
from fedlora.seeding import stream

SHAPES = {"b": (5,), "a": (3, 3)}
ASKED = SecureAggregation(survivors=0.66)


def event(noise, shares=1.0):
    return Event(noise_multiplier=noise, sample_rate=1.0, steps=1, clip_norm=1.0, sharers=shares)


def drawn(client, shapes=SHAPES, scale=1.0):
    """Sums as a client may have them."""
    rng = np.random.default_rng(client)
    half = {name: rng.uniform(-scale, scale, shape) for name, shape in shapes.items()}
    return {name: (t + t.T) / 2 if t.ndim == 2 else t for name, t in half.items()}


def carried_out(span, vectors, there=None, units=10):
    """What the server is told of clients that send such vectors."""
    many = len(vectors)
    paid = {c: Report(client=c, num_examples=units + c, event=span.event) for c in range(many)}
    there = range(many) if there is None else there
    exchange = played(paid, lambda client, among: vectors[client], there, ASKED, many)
    return summed.said(exchange, paid, ASKED, stream(1, "names"), lambda members: span)


@pytest.mark.parametrize("gone", [(), (0, 2)], ids=["all", "two dropped out"])
def test_the_masked_sum_is_the_plain_one_to_the_grid(gone):
    span = summed.Span(16, SHAPES, None)  # numbers up to 16 / sqrt(2)
    sums = [drawn(c, scale=11.0) for c in range(7)]
    vectors = [span.vector(s, stream(c, "rounding")) for c, s in enumerate(sums)]
    left = [c for c in range(7) if c not in gone]
    said = list(carried_out(span, vectors, left))

    assert [one.client for one in said] == list(range(7)) and all(one.bytes_up > 0 for one in said)
    (whole,) = [one for one in said if one.sums is not None]
    assert whole.client == left[0] and whole.clients == len(left) and whole.deviation == 0
    assert whole.units == sum(10 + c for c in left)
    step = span.largest / 2**19
    for name, shape in SHAPES.items():
        plain = sum(sums[c][name] for c in left)
        assert whole.sums[name].shape == shape
        np.testing.assert_allclose(whole.sums[name], plain, rtol=0, atol=len(left) * step)


def test_too_few_end_it_after_what_they_paid_is_told():
    span = summed.Span(16, SHAPES, event(2.0))
    vectors = [span.vector(drawn(c), stream(c, "rounding")) for c in range(5)]
    said = []
    with pytest.raises(RoundError, match="too many dropped out"):
        for one in carried_out(span, vectors, [0, 1]):
            said.append(one)
    assert [one.client for one in said] == [0, 1, 2, 3, 4]
    assert all(one.event == event(2.0) and one.sums is None for one in said)


def test_a_sum_that_no_clients_could_have_is_none():
    span = summed.Span(16, SHAPES, None)
    wrong = np.full(summed.size(SHAPES), 4 * 2**19 + 9, np.uint32)
    with pytest.raises(RoundError, match="the masks did not come off"):
        span.sums(wrong, 4)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_the_noise_in_the_sum_is_what_was_paid_for(shared):
    """Of 6 clients 5 send at the least, of whom one may look: K = 4. Each adds sigma, or sigma / 2."""
    parts = sharers(6, ASKED.survivors, 1.0) if shared else 1.0
    assert parts == (4.0 if shared else 1.0)
    shapes, sigma = {"a": (150, 150), "b": (9000,)}, 3.0
    span = summed.Span(64, shapes, event(sigma / math.sqrt(parts), parts))
    span.check_grid()
    sums = [drawn(c, shapes, 20.0) for c in range(6)]
    vectors = []
    for client, own in enumerate(sums):
        noised = mechanism(1.0, 40, span.noise).noised(span.cut(own), stream(client, "noise"))
        vectors.append(span.vector(noised, stream(client, "rounding")))
    (whole,) = [one for one in carried_out(span, vectors) if one.sums is not None]
    expected = sigma * math.sqrt(6 / parts)
    assert whole.deviation == pytest.approx(expected)
    apart = {name: whole.sums[name] - sum(own[name] for own in sums) for name in shapes}
    beside = apart["a"][np.triu_indices(150, 1)]
    for values, deviation in (
        (apart["b"], expected),
        (np.diag(apart["a"]), expected),
        (beside, expected / 2**0.5),
    ):
        assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(values)))
        assert abs(values.mean()) < 4 * deviation / math.sqrt(len(values))
    assert np.array_equal(apart["a"], apart["a"].T)


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=9, max_size=9),
    st.lists(st.floats(-1.0, 1.0), min_size=9, max_size=9),
    st.integers(1, 2**20),
)
def test_cutting_brings_no_two_sums_further_apart(values, moved, units):
    span = summed.Span(units, {"a": (9,)}, event(1.0))
    one, other = np.array(values), np.array(values) + np.array(moved)
    cut = [span.cut({"a": x})["a"] for x in (one, other)]
    assert np.linalg.norm(cut[0] - cut[1]) <= np.linalg.norm(one - other) + 1e-9
    assert all(np.abs(x).max() <= span.bound for x in cut)


@given(st.integers(1, 2**30))
def test_the_most_that_a_client_holds_is_said_as_a_power_of_two(units):
    said = summed.no_fewer(units)
    assert units <= said < 2 * units and said & (said - 1) == 0


def test_a_part_of_the_noise_takes_eight_steps_of_the_grid():
    """One matrix, parts of deviation 1: a step is (U + 10) / 2^19, and of 1 / sqrt(2) eight take U <= 46,330."""
    summed.Span(46_330, {"a": (3, 3)}, event(1.0, 4.0)).check_grid()
    with pytest.raises(SettingError, match=r"take noise: server"):
        summed.Span(46_340, {"a": (3, 3)}, event(1.0, 4.0)).check_grid()
    summed.Span(2**20, {"a": (3, 3)}, event(1.0)).check_grid()  # whole noise is there before anything is rounded
    assert (grid.BITS, grid.FINE) == (20, 8.0)


def test_what_noise_makes_larger_than_the_grid_is_cut_and_no_client_fails():
    span = summed.Span(1, {"a": (3,)}, event(0.1))  # numbers up to 1 + 10 * 0.1
    made = span.vector({"a": np.array([5.0, -5.0, 0.5])}, stream(0, "rounding"))
    assert grid.dequantise(made, span.largest) == pytest.approx([2.0, -2.0, 0.5], abs=2 / 2**19)
