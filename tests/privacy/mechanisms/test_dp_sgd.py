"""What each way to clip makes of gradients that one can work out by hand."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedlora.errors import ContractError, SettingError
from fedlora.privacy.accounting import Event, profile
from fedlora.privacy.mechanisms.bands import banded, coefficients
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.noise import Stream

QUIET = 1e-30  # noise that no float32 shows


def made(clip, bound=0.5, noise=QUIET, **more):
    return ExampleGaussian(
        noise_multiplier=noise,
        sample_rate=0.1,
        total=20,
        batch_size=2,
        steps=1,
        clip_norm=bound,
        clip=clip,
        **more,
    )


def stepped(mechanism, *micro_batches):
    """What a step at rate 1 takes off two tensors, of 2 and 1 numbers, for examples of (2 + 1) numbers each."""
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = mechanism.optimizer(torch.optim.SGD(parameters, lr=1.0), Stream(bytes(32)))
    for i, rows in enumerate(micro_batches):
        optimizer.zero_grad(set_to_none=True)
        rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
        for parameter, part in zip(parameters, (rows[:, :2], rows[:, 2:]), strict=True):
            parameter.grad_sample = part.clone()
        if i < len(micro_batches) - 1:
            optimizer.signal_skip_step()
        optimizer.step()
    return -torch.cat([p.detach() for p in parameters]).double().numpy()


def test_automatic_clipping_by_hand():
    """Norms 5, 0.04 and 0: C g / (||g|| + 0.01) with C = 0.5, over an expected batch of 2."""
    got = stepped(made("automatic"), [[3, 0, 4], [0, 0.04, 0], [0, 0, 0]])
    one, two = 0.5 * np.array([3, 0, 4]) / 5.01, 0.5 * np.array([0, 0.04, 0]) / 0.05
    np.testing.assert_allclose(got, (one + two) / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("clip", ["flat", "automatic"])
def test_micro_batches_and_their_order_change_no_sum(clip):
    rows = [[3, 0, 4], [0, 0.04, 0], [0.3, 0.1, 0], [0, 0, 0]]
    whole = stepped(made(clip), rows)
    np.testing.assert_allclose(stepped(made(clip), rows[:1], rows[1:]), whole, rtol=1e-6)
    np.testing.assert_allclose(stepped(made(clip), rows[3:], rows[:2], rows[2:3]), whole, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["flat", "per_layer", "automatic"]),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=3, max_size=3),
)
def test_no_example_adds_more_than_the_bound(clip, bound, row):
    assert np.linalg.norm(stepped(made(clip, bound), [row]) * 2) <= bound * (1 + 1e-6)


def test_a_gradient_whose_square_overflows_adds_nothing_that_is_not_finite():
    assert np.abs(stepped(made("automatic"), [[3e38, 3e38, 0]])).max() < 1e-25


@pytest.mark.parametrize("clip", ["flat", "per_layer", "automatic"])
def test_an_empty_batch_is_noise_of_the_whole_bound(clip):
    """The same draw for all ways: they differ in what they do to gradients."""
    noise = Stream(bytes(32)).standard_normal(3) * 2.0 * 0.5
    np.testing.assert_allclose(stepped(made(clip, noise=2.0), []), noise / 2, rtol=1e-6)


def test_ways_that_are_none_are_refused():
    with pytest.raises(ContractError, match="no clipping 'round'"):
        stepped(made("round"), [])
    with pytest.raises(ContractError, match="do not go together"):
        made("flat", quantile=0.5)
    with pytest.raises(ContractError, match="do not go together"):
        made("quantile")


# Batches of at most so many.


def laws(total, rate, most):
    """How likely each batch is: drawn again while it is too large, and cut to a random part where it is."""
    every = [S for k in range(total + 1) for S in combinations(range(total), k)]
    plain = {S: rate ** len(S) * (1 - rate) ** (total - len(S)) for S in every}
    fits = sum(p for S, p in plain.items() if len(S) <= most)
    again = {S: p / fits for S, p in plain.items() if len(S) <= most}
    cut: dict[tuple[int, ...], float] = dict.fromkeys(again, 0.0)
    for S, p in plain.items():
        parts = list(combinations(S, min(most, len(S))))
        for part in parts:
            cut[part] += p / len(parts)
    return again, cut


def lost(law, gradients, noise, epsilons):
    """Delta of one step whose first example is real or a blank, both ways, by quadrature."""
    x, width = np.linspace(-25, 25, 20_001, retstep=True)
    real, blank = (
        sum(p * norm.pdf(x, sum(gradients[i] for i in S if i or told), noise) for S, p in law.items())
        for told in (True, False)
    )
    both = ((real, blank), (blank, real))
    return np.array(
        [max((one - np.exp(e) * other).clip(0).sum() * width for one, other in both) for e in epsilons]
    )


@pytest.mark.parametrize("total, rate, most", [(4, 0.5, 2), (6, 0.3, 2), (7, 0.2, 1), (5, 0.9, 4)])
def test_given_the_others_an_example_is_as_likely_as_in_a_batch_of_any_size(total, rate, most):
    """Or never, where there is no room: what the proof takes."""
    law, _ = laws(total, rate, most)
    for others in law:
        if 0 not in others:
            here = law.get((0, *others), 0.0)
            assert here / (here + law[others]) == pytest.approx(rate if len(others) < most else 0.0)


@pytest.mark.parametrize("gradients", [[1] + 7 * [-1], 8 * [1], [1] + 7 * [0], [1, -1, 1, -1, 1, -1, 1, 0]])
def test_batches_that_are_drawn_again_cost_no_more_and_those_that_are_cut_may(gradients):
    """Eight examples at 1/8, one in a batch, sigma 0.7: others that are against it show which ones were cut."""
    told, epsilons = {"noise_multiplier": 0.7, "sample_rate": 1 / 8, "clip_norm": 1.0}, [0.1, 0.3, 0.5, 1.0]
    claim = np.array(profile([Event(steps=1, **told)], epsilons))
    again, cut = laws(8, 1 / 8, 1)
    assert (lost(again, gradients, 0.7, epsilons) <= claim).all()
    if gradients[1:] == 7 * [-1]:
        assert lost(cut, gradients, 0.7, epsilons)[-1] > 1.05 * claim[-1]


def test_no_batch_is_larger_than_is_asked_for_and_all_that_fit_are_as_likely_as_they_were():
    """Four examples at 1/2 and two at most: each of the eleven batches that fit with chance 1/11."""
    told = {"noise_multiplier": 1.0, "sample_rate": 0.5, "total": 4, "batch_size": 2, "steps": 1, "clip_norm": 1.0}
    coins, mechanism = Stream(bytes(32)), ExampleGaussian(**told, most=2)
    drawn = [tuple(np.flatnonzero(mechanism.taken(coins))) for _ in range(2200)]
    counts = Counter(drawn)
    assert len(counts) == 11 and max(map(len, counts)) == 2
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 30  # chi-squared, 10 degrees: a chance of 0.1 %
    assert mechanism.event() == ExampleGaussian(**told).event()


def test_a_limit_below_the_expected_batch_would_draw_for_ever():
    """At the mean about half fit. Half of nine rows are a group of five, all of whom are taken."""
    told = {"noise_multiplier": 1.0, "total": 100, "steps": 1, "clip_norm": 1.0}
    assert ExampleGaussian(**told, sample_rate=0.3, batch_size=30.0, most=30).taken(Stream(bytes(32))).sum() <= 30
    with pytest.raises(SettingError, match=r"fewer than 30% .* write 1 or more") as raised:
        ExampleGaussian(**told, sample_rate=0.3, batch_size=30.0, most=20)
    assert raised.value.key == "clients.batch_limit"
    nine = {"noise_multiplier": 1.0, "sample_rate": 0.5, "total": 9, "steps": 2, "clip_norm": 1.0}
    plain = ExampleGaussian(**nine, batch_size=4.5, most=4)
    with pytest.raises(SettingError, match=r"write 1.12 or more"):
        banded(plain, coefficients(2, 10))  # a group of five, of which each is taken
    assert (
        banded(ExampleGaussian(**nine, batch_size=4.5, most=5), coefficients(2, 10)).taken(Stream(bytes(32))).sum()
        == 5
    )
