"""What each way to clip makes of gradients that one can work out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ContractError
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
