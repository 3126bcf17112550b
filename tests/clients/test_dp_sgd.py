"""The mechanism, against its definition."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.client import Rng, Settings
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import ContractError, SettingError
from fedlora.passes.gradients import backward, hook, make_safe
from fedlora.privacy.mechanisms.bands import coefficients

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
    base |= {"batch_size": BATCH, "lr": LR}
    return Settings(round=1, train=names, send=names, **{**base, **changes})


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
    hook(task, names)
    backward(task, task.batch(part.examples, rows))
    make_safe(parameters, len(rows))
    got = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("what", ["bias", "norm", "embeddings"])
def test_parts_of_the_body_would_have_per_example_gradients_too(world, what):
    """No kind of adapter trains these yet; the hooks serve them all the same."""
    task, part, names, adapter = world
    rows = part.rows[[1, 4, 9]]
    bert = task.model.get_base_model().bert
    layer = bert.encoder.layer[0]
    extra = {
        "bias": [layer.intermediate.dense.bias],
        "norm": [*layer.output.LayerNorm.parameters()],
        "embeddings": [bert.embeddings.word_embeddings.weight, *bert.embeddings.LayerNorm.parameters()],
    }[what]
    expected = []
    for row in rows:
        task.begin(adapter, names)
        for parameter in extra:
            parameter.requires_grad_(True).grad = None
        task.losses(task.batch(part.examples, np.array([row]))).sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in extra]))
    try:
        vars(task.model).pop("fedlora_hooked", None)
        hook(task, names)
        backward(task, task.batch(part.examples, rows))
        got = torch.cat([p.grad_sample.flatten(1) for p in extra], 1)
    finally:
        vars(task.model).pop("fedlora_hooked", None)
        for parameter in extra:
            parameter.requires_grad_(False).grad = None
    error = (got - torch.stack(expected)).norm(dim=1) / torch.stack(expected).norm(dim=1)
    assert float(error.max()) < 1e-5


def test_a_step_is_the_clipped_sum_over_the_expected_batch_plus_noise(world):
    task, part, names, adapter = world
    update = DPSGD().fit(task, adapter, part, told(names), Rng(3, 1, 0))

    drawn = Rng(3, 1, 0)("batches").random(len(part)) < BATCH / len(part)
    gradients = single_gradients(task, part, names, adapter, part.rows[drawn])
    norms = gradients.norm(dim=1, keepdim=True)
    assert (norms > CLIP).any()
    clipped = (gradients * torch.clamp(CLIP / (norms + 1e-6), max=1.0)).sum(0)
    noise_of = Rng(3, 1, 0)(DPSGD().mechanism(len(part), told(names)).purpose)
    noise = torch.from_numpy(noise_of.normal(0.0, SIGMA * CLIP, sum(adapter[n].size for n in names))).float()
    start = torch.cat([torch.from_numpy(adapter[n]).flatten() for n in names])
    expected = start - LR * (clipped + noise) / BATCH
    got = torch.cat([torch.from_numpy(update.adapter[n]).flatten() for n in names])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def flat(tensors):
    return torch.cat([torch.as_tensor(t).flatten() for t in tensors]).double()


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from([3, 64]),
    st.floats(0.005, 5.0),
    st.sampled_from(["flat", "per_layer", "automatic"]),
    st.sampled_from([2, BATCH]),
)
def test_a_poisson_batch_of_any_size_sums_clipped_gradients_of_single_examples(
    world, seed, micro, clip, way, size
):
    """Together to C, or each of L tensors to C_l = C / sqrt(L), whose squares sum to C^2; or all to nearly C."""
    task, part, names, adapter = world
    asked = told(names, noise_multiplier=1e-10, clip_norm=clip, micro_batch_size=micro, lr=1e8, batch_size=size)
    update = DPSGD().fit(task, adapter, part, dataclasses.replace(asked, clip=way), Rng(seed, 1, 0))
    drawn = part.rows[Rng(seed, 1, 0)("batches").random(len(part)) < size / len(part)]
    gradients = single_gradients(task, part, names, adapter, drawn)
    parts = gradients.split([adapter[n].size for n in names], 1) if way == "per_layer" else [gradients]
    bound = clip / len(parts) ** 0.5
    clipped = torch.cat([g * torch.clamp(bound / (g.norm(dim=1, keepdim=True) + 1e-6), max=1.0) for g in parts], 1)
    if way == "automatic":
        clipped = clip * gradients / (gradients.norm(dim=1, keepdim=True) + 0.01)
    assert not len(drawn) or float(clipped.norm(dim=1).max()) <= clip * (1 + 1e-5)
    got = flat([adapter[n].astype(np.float64) - update.adapter[n].astype(np.float64) for n in names]) / 1e8 * size
    expected = clipped.double().sum(0)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-6 * clip


def test_noise_of_clipping_by_layer_is_that_of_the_whole_bound(world):
    """Chi-square at a false-alarm rate of one in a million."""
    from scipy.stats import chi2

    task, part, names, adapter = world
    noised, quiet = (
        DPSGD().fit(task, adapter, part, told(names, noise_multiplier=s, clip="per_layer"), Rng(5, 1, 0))
        for s in (3.0, 1e-9)
    )
    sample = flat([noised.adapter[n] - quiet.adapter[n] for n in names]) * BATCH / (3.0 * CLIP)
    low, high = chi2.ppf([5e-7, 1 - 5e-7], len(sample))
    assert low < float((sample**2).sum()) < high


def test_a_bound_that_adapts_moves_by_the_noised_count_and_noises_the_sum_the_more(world, monkeypatch):
    """Of n expected all B drawn are far beyond the bound: it grows by exp(0.2 B / 2n), but for the noise."""
    import math

    from opacus.optimizers import DPOptimizer

    task, part, names, adapter = world
    seen = []
    step = DPOptimizer.pre_step

    def watch(self, closure=None):
        made = step(self, closure)
        seen.append((self.max_grad_norm, self.noise_multiplier, self.count))
        return made

    monkeypatch.setattr(DPOptimizer, "pre_step", watch)
    size = len(part) - 1
    asked = told(
        names, noise_multiplier=1e-9, clip_norm=1e-4, local_steps=3, micro_batch_size=7, lr=1e3, batch_size=size
    )
    asked = dataclasses.replace(asked, clip="quantile", quantile=0.5)
    client = DPSGD()
    client.fit(task, adapter, part, asked, Rng(3, 1, 0))
    batches = Rng(3, 1, 0)("batches")
    drawn = [int((batches.random(len(part)) < size / len(part)).sum()) for _ in range(3)]
    noise = [-5 * math.log(b / a) for a, b in zip([1e-4, *bounds(seen)], bounds(seen), strict=False)]
    for moved, count in zip(noise, drawn, strict=True):  # the count is -B/2, and its noise is n / 20
        assert abs(moved - (-count / 2 / size)) < 6 / 20
    assert len({round(n, 6) for n in noise}) == 3 and seen[-1][2] == 0.0
    client.fit(task, adapter, part, dataclasses.replace(asked, noise_multiplier=2.0), Rng(3, 1, 0))
    assert seen[-1][1] == pytest.approx(
        (2.0**-2 - (size / 10) ** -2) ** -0.5
    )  # more than 2: the count takes its part


def bounds(seen):
    """The bound after each step: the last that its micro-batches saw."""
    found = [bound for bound, _, _ in seen]
    return [b for a, b in zip([None, *found], found, strict=False) if b != a and b != 1e-4]


def test_a_bound_that_adapts_survives_an_empty_batch_and_starts_each_round_afresh(world):
    task, part, names, adapter = world
    seed = next(s for s in range(10_000) if not (Rng(s, 1, 0)("batches").random(len(part)) < 1 / len(part)).any())
    asked = told(names, noise_multiplier=0.05, batch_size=1, clip="quantile", quantile=0.5)
    client = DPSGD()
    one = client.fit(task, adapter, part, asked, Rng(seed, 1, 0))
    client.fit(task, adapter, part, dataclasses.replace(asked, local_steps=6), Rng(seed + 1, 1, 0))
    again = client.fit(task, adapter, part, asked, Rng(seed, 1, 0))
    assert all(np.isfinite(t).all() for t in one.adapter.values())
    assert all(np.array_equal(one.adapter[n], again.adapter[n]) for n in names)


def test_a_batch_too_small_for_a_bound_that_adapts_is_refused(world):
    _, part, names, _ = world
    with pytest.raises(SettingError, match=r"batches of 8 are too small .* they take more than 10"):
        DPSGD().spends(len(part), told(names, noise_multiplier=1.0, clip="quantile", quantile=0.5))


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


@pytest.mark.parametrize("more", [{}, {"bands": 2}, {"sample_rate": 0.2}])
def test_no_batch_is_over_its_limit(world, monkeypatch, more):
    """Eight on average, or a fifth of the rows; ten or so at most, and sizes vary below."""
    task, part, names, adapter = world
    if "bands" in more:
        more = {"coefficients": coefficients(more["bands"], 60)}
    seen = []
    original = task.micro_batches
    monkeypatch.setattr(task, "micro_batches", lambda e, rows, k: seen.append(rows) or original(e, rows, k))
    asked = told(names, local_steps=25, batch_limit=1.25, **more)
    DPSGD().fit(task, adapter, part, asked, Rng(3, 1, 0))
    limit = int(1.25 * (0.2 * len(part) if "sample_rate" in more else BATCH))
    sizes = np.array([len(rows) for rows in seen])
    assert len(sizes) == 25 and sizes.max() == limit and sizes.min() < BATCH
    assert DPSGD().spends(len(part), asked) == DPSGD().spends(len(part), told(names, local_steps=25, **more))


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


@pytest.mark.parametrize("way", ["flat", "automatic"])
def test_an_example_that_overflows_is_left_out_and_the_noise_is_not(world, monkeypatch, caplog, way):
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
    update = DPSGD().fit(task, adapter, part, told(names, share_metrics=True, clip=way), Rng(3, 1, 0))
    assert update.metrics["not_finite"] == 1 and "client 0: left out 1 gradients" in caplog.text
    assert all(np.isfinite(t).all() and (t != adapter[n]).any() for n, t in update.adapter.items())


def test_per_example_gradients_in_half_precision_are_those_of_single_examples_to_two_per_cent(build, world):
    """bfloat16 keeps eight bits: passes of one example differ from those of many by its rounding."""
    worker = build("engine.precision=bf16")
    task, part, names = worker.task, worker.dataset.partition(0), tuple(sorted(worker.task.layout))
    adapter, rows = world[3], part.rows[:12]
    expected = []
    for row in rows:
        parameters = task.begin(adapter, names)
        with task.autocast():
            loss = task.losses(task.batch(part.examples, np.array([row]))).sum()
        loss.backward()
        expected.append(torch.cat([p.grad.flatten() for p in parameters]))
    parameters = task.begin(adapter, names)
    hook(task, names)
    backward(task, task.batch(part.examples, rows))
    make_safe(parameters, len(rows))
    assert all(p.grad_sample.dtype == torch.float32 for p in parameters)
    got, whole = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1), torch.stack(expected)
    assert float(((got - whole).norm(dim=1) / whole.norm(dim=1)).max()) < 0.02


def test_a_tensor_outside_the_loss_is_noticed(world):
    stray = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ContractError, match="no per-example gradient"):
        make_safe([stray], 1)


@pytest.mark.parametrize("shape", [(1, 2), (6, 2), (3, 1)], ids=["shared", "windows", "another shape"])
def test_gradients_that_are_not_one_for_each_example_are_refused(shape):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad_sample = torch.zeros(shape)
    with pytest.raises(ContractError, match=rf"has {shape[0]} gradients, and there are 3 examples"):
        make_safe([parameter], 3)


def test_a_layer_of_opacus_that_runs_on_what_all_share_is_refused(world):
    """A head that is given one row for all examples."""
    task, part, names, adapter = world
    head = task.model.get_base_model().classifier
    pass_on = head.register_forward_hook(
        lambda module, args, out: out + module.modules_to_save["default"](args[0][:1])
    )
    try:
        task.begin(adapter, names)
        vars(task.model).pop("fedlora_hooked", None)
        hook(task, names)
        with pytest.raises(ContractError, match=r"classifier.* runs on 1 rows where there are 3 examples"):
            backward(task, task.batch(part.examples, part.rows[:3]))
    finally:
        pass_on.remove()
        vars(task.model).pop("fedlora_hooked", None)


def test_batch_normalisation_is_refused(world):
    task, _, names, _ = world
    task.model.add_module("stray", torch.nn.BatchNorm1d(3))
    try:
        with pytest.raises(SettingError, match="normalises over the batch"):
            vars(task.model).pop("fedlora_hooked", None)
            hook(task, names)
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


class PaysForMore(DPSGD):
    """States twice the noise that it adds."""

    def spends(self, num_examples, settings):
        event = super().spends(num_examples, settings)
        return dataclasses.replace(event, noise_multiplier=2 * event.noise_multiplier)


def test_a_client_that_pays_for_other_noise_than_it_adds_does_not_train(build, tiny_yaml):
    worker = build()
    names = tuple(n for n, s in worker.task.layout.items() if s.role != "A")
    settings = Settings(
        round=1, train=names, send=names, local_steps=1, batch_size=8, lr=0.5, noise_multiplier=1.0, clip_norm=1.0
    )
    told = (worker.task, {}, worker.dataset.partition(0), settings, Rng(3, 1, 0))
    assert DPSGD().fit(*told).clients == (0,)
    with pytest.raises(ContractError, match="pays for something else than it does"):
        PaysForMore().fit(*told)
