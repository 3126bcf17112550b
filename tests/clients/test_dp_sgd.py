"""The mechanism, against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.client import Rng, Settings
from fedlora.clients.dp_sgd import DPSGD, _backward, _hook, _make_safe, noise_stream
from fedlora.errors import ContractError, SettingError

CLIP, SIGMA, LR, BATCH = 0.05, 0.5, 1.0, 8


# The tests run plain backward passes through a hooked model.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(scope="module")
def world(build):
    worker = build()
    names = tuple(sorted(worker.task.layout))
    rng = np.random.default_rng(0)  # away from B = 0, so that A has a gradient too
    adapter = {n: (0.3 * rng.normal(size=worker.task.layout[n].shape)).astype(np.float32) for n in names}
    return worker.task, worker.dataset.partition(0), names, adapter


def told(names, **changes):
    base = {"local_steps": 1, "noise_multiplier": SIGMA, "clip_norm": CLIP, "micro_batch_size": 4}
    return Settings(round=1, train=names, send=names, batch_size=BATCH, lr=LR, **{**base, **changes})


def single_gradients(task, part, names, adapter, rows):
    """The gradient of each example by itself, (rows, all parameters)."""
    flat = []
    for row in rows:
        parameters = task.begin(adapter, names)
        task.losses(task.batch(part.examples, np.array([row]))).sum().backward()
        flat.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(flat) if flat else torch.zeros((0, sum(p.numel() for p in task.begin(adapter, names))))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 40), min_size=1, max_size=9))
def test_per_example_gradients_are_those_of_single_examples(world, chosen):
    task, part, names, adapter = world
    rows = part.rows[sorted(chosen)]
    expected = single_gradients(task, part, names, adapter, rows)
    parameters = task.begin(adapter, names)
    _hook(task, names)
    _backward(task, task.batch(part.examples, rows))
    _make_safe(parameters)
    got = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-5


def test_a_step_is_the_clipped_sum_over_the_expected_batch_plus_noise(world):
    task, part, names, adapter = world
    update = DPSGD().fit(task, adapter, part, told(names), Rng(3, 1, 0))

    drawn = Rng(3, 1, 0)("batches").random(len(part)) < BATCH / len(part)
    gradients = single_gradients(task, part, names, adapter, part.rows[drawn])
    norms = gradients.norm(dim=1, keepdim=True)
    assert (norms > CLIP).any()
    clipped = (gradients * torch.clamp(CLIP / (norms + 1e-6), max=1.0)).sum(0)
    noise_of = Rng(3, 1, 0).torch(noise_stream(DPSGD().spends(len(part), told(names))))
    noise = torch.cat(
        [torch.normal(0.0, SIGMA * CLIP, adapter[n].shape, generator=noise_of).flatten() for n in names]
    )
    start = torch.cat([torch.from_numpy(adapter[n]).flatten() for n in names])
    expected = start - LR * (clipped + noise) / BATCH
    got = torch.cat([torch.from_numpy(update.adapter[n]).flatten() for n in names])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_is_noise_alone(world):
    task, part, names, adapter = world
    seed = next(s for s in range(10_000) if not (Rng(s, 1, 0)("batches").random(len(part)) < 1 / len(part)).any())
    settings = Settings(
        round=1, train=names, send=names, local_steps=1, batch_size=1, lr=1.0, noise_multiplier=2.0, clip_norm=1.0
    )
    update = DPSGD().fit(task, adapter, part, settings, Rng(seed, 1, 0))
    moved = np.concatenate([(update.adapter[n] - adapter[n]).ravel() for n in names])
    assert 1.8 < moved.std() < 2.2


def test_noise_has_the_stated_standard_deviation(world):
    """Chi-square at a false-alarm rate of one in a million, over 20,000 draws or more."""
    from scipy.stats import chi2

    task, part, names, adapter = world
    draws = []
    size = sum(adapter[n].size for n in names)
    for seed in range(-(-20_000 // size)):
        noised, quiet = (
            DPSGD().fit(task, adapter, part, told(names, noise_multiplier=s), Rng(seed, 1, 0)) for s in (3.0, 1e-9)
        )
        draws += [((noised.adapter[n] - quiet.adapter[n]) * BATCH / (3.0 * CLIP)).ravel() for n in names]
    sample = np.concatenate(draws)
    statistic = float((sample**2).sum())
    low, high = chi2.ppf([5e-7, 1 - 5e-7], len(sample))
    assert len(sample) >= 20_000 and low < statistic < high
    assert abs(sample.mean()) < 5 / len(sample) ** 0.5


def test_batches_are_poisson(world, monkeypatch):
    """Each example enters each step by a coin of its own: sizes vary as a binomial, and no two steps agree."""
    task, part, names, adapter = world
    seen = []
    original = task.micro_batches
    monkeypatch.setattr(task, "micro_batches", lambda e, rows, k: seen.append(rows) or original(e, rows, k))
    DPSGD().fit(task, adapter, part, told(names, local_steps=150), Rng(3, 1, 0))
    sizes = np.array([len(rows) for rows in seen])
    n, q = len(part), BATCH / len(part)
    assert abs(sizes.mean() - BATCH) < 5 * (n * q * (1 - q) / 150) ** 0.5
    assert 0.5 < sizes.var() / (n * q * (1 - q)) < 1.7
    counts = np.bincount(np.concatenate(seen), minlength=part.rows.max() + 1)[part.rows]
    assert abs(counts - 150 * q).max() < 6 * (150 * q * (1 - q)) ** 0.5
    assert len({tuple(rows) for rows in seen}) > 140


def test_other_noise_is_another_draw_and_not_the_same_one_scaled(world):
    """A round that ran again under other noise would else show its sum: two equations, two unknowns."""
    task, part, names, adapter = world

    def noise(scale):
        runs = (
            DPSGD().fit(task, adapter, part, told(names, noise_multiplier=s), Rng(3, 1, 0))
            for s in (scale, scale * 1e-9)
        )
        one, quiet = ([u.adapter[n].ravel() for n in names] for u in runs)
        return np.concatenate(one) - np.concatenate(quiet)

    one, other = noise(1.0), noise(2.0)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(one) ** 0.5
    assert np.array_equal(noise(1.0), one)


def test_an_example_that_overflows_is_left_out_and_the_noise_is_not(world, monkeypatch, caplog):
    task, part, names, adapter = world
    original = task.losses
    poisoned = []

    def losses(batch):
        values = original(batch)
        if not poisoned:
            poisoned.append(True)
            values = values * torch.tensor([float("inf")] + [1.0] * (len(values) - 1))
        return values

    monkeypatch.setattr(task, "losses", losses)
    update = DPSGD().fit(task, adapter, part, told(names, share_metrics=True), Rng(3, 1, 0))
    assert update.metrics["not_finite"] == 1 and "client 0: left out 1 gradients" in caplog.text
    assert all(np.isfinite(t).all() and (t != adapter[n]).any() for n, t in update.adapter.items())


def test_clipping_in_half_precision_keeps_to_the_bound(build):
    worker = build("engine.precision=bf16")
    task, part, names = worker.task, worker.dataset.partition(0), tuple(sorted(worker.task.layout))
    parameters = task.begin({}, names)
    _hook(task, names)
    _backward(task, task.batch(part.examples, part.rows[:8]))
    _make_safe(parameters)
    assert all(p.grad_sample.dtype == torch.float32 for p in parameters)


def test_a_tensor_outside_the_loss_is_noticed(world):
    stray = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ContractError, match="no per-example gradient"):
        _make_safe([stray])


def test_batch_normalisation_is_refused(world):
    task, _, names, _ = world
    task.model.add_module("stray", torch.nn.BatchNorm1d(3))
    try:
        with pytest.raises(SettingError, match="normalises over the batch"):
            vars(task.model).pop("fedlora_hooked", None)
            _hook(task, names)
    finally:
        del task.model.stray


def test_no_noise_multiplier_is_no_privacy(world):
    _, part, names, _ = world
    with pytest.raises(ContractError, match="no noise multiplier"):
        DPSGD().spends(len(part), told(names, noise_multiplier=None))


def test_a_client_that_fails_in_mid_pass_spoils_nothing(world, monkeypatch):
    task, part, names, adapter = world
    expected = DPSGD().fit(task, adapter, part, told(names), Rng(3, 1, 0))
    with monkeypatch.context() as patch:
        original = task.losses

        def losses(batch):
            original(batch)
            raise MemoryError("in mid-pass")

        patch.setattr(task, "losses", losses)
        with pytest.raises(MemoryError):
            DPSGD().fit(task, adapter, part, told(names), Rng(4, 1, 0))
    again = DPSGD().fit(task, adapter, part, told(names), Rng(3, 1, 0))
    assert all(np.array_equal(again.adapter[n], expected.adapter[n]) for n in names)
