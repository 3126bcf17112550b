"""What every client promises; the package is listed, so a new file is tested automatically."""

import dataclasses

import numpy as np
import pytest

from fedlora import client as clients
from fedlora import plugins
from fedlora.client import Rng, Settings

NAMES = plugins.names("clients")


@pytest.fixture(params=NAMES)
def fit(request, build):
    """Fits a client on the tiny task: `fit(client=0, **settings)`."""
    made = clients.load(request.param, {})
    worker = build(private=made.private)
    names = tuple(sorted(n for n, s in worker.task.layout.items() if s.role != "A"))
    base = Settings(
        round=1,
        train=names,
        send=names,
        local_steps=2,
        batch_size=8,
        lr=0.5,
        noise_multiplier=1.0 if made.private else None,
        clip_norm=1.0 if made.private else None,
    )

    def run(client=0, adapter=None, seed=3, **changes):
        settings = dataclasses.replace(base, **changes)
        rng = Rng(seed, settings.round, client)
        return made.fit(worker.task, adapter or {}, worker.dataset.partition(client), settings, rng)

    run.worker, run.client, run.names = worker, made, names
    return run


def same(one, two):
    return all(np.array_equal(one.adapter[n], two.adapter[n]) for n in one.adapter | two.adapter)


def test_sends_what_was_asked_for(fit):
    layout = fit.worker.task.layout
    only = fit.names[:2]
    for send in (fit.names, only):
        update = fit(send=send)
        assert set(update.adapter) == set(send) and update.clients == (0,) and update.weight > 0
        assert all(t.shape == layout[n].shape and t.dtype == np.float32 for n, t in update.adapter.items())
        assert all(np.isfinite(t).all() for t in update.adapter.values())


def test_moves_what_trains_and_nothing_else(fit):
    update = fit(send=tuple(fit.worker.task.layout), train=fit.names[:3])
    changed = {n for n, t in update.adapter.items() if not np.array_equal(t, fit.worker.task.initial[n])}
    assert changed == set(fit.names[:3])


def test_starts_from_what_it_received(fit):
    name = fit.names[0]
    far = np.full(fit.worker.task.layout[name].shape, 5.0, np.float32)
    update = fit(adapter={name: far}, lr=1e-4)
    assert np.abs(update.adapter[name] - 5.0).max() < 0.1


def test_repeats_bit_for_bit_and_leaves_nothing_behind(fit):
    first = fit(client=0)
    fit(client=1)
    assert same(first, fit(client=0))


@pytest.fixture(
    params=[
        "encoder",
        "pooler",
        "mean",
        "decoder",
        "core",
        "tagger",
        "pairs",
        "core of pairs",
        "values",
        "values of pairs",
        "blocks",
    ]
)
def model(request, build, tiny_lm, sentences, choices):
    """Overrides that build another model: with another task, other targets, or a trained head with biases."""
    lm = ("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj,up_proj,lm_head]")
    pairs = ("task=preference", *lm[1:], f"data.files={{train: {choices}}}")
    return {
        "encoder": (),
        "pooler": ("model.pooler=trained", "model.adapter.targets=[query,dense]"),
        "mean": ("model.pooling=mean", "model.adapter.layers=[1]"),
        "core": ("model.adapter.kind=lora_xs",),
        "decoder": lm,
        "tagger": ("task=token_classification", f"data.files={{train: {sentences}}}"),
        "pairs": pairs,
        "core of pairs": (*pairs, "model.adapter.kind=lora_xs"),
        "values": ("model.adapter.kind=singular",),
        "values of pairs": (*pairs, "model.adapter.kind=ldu", "preference.beta=2.0"),
        "blocks": ("model.adapter.kind=block",),
    }[request.param]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of plain passes through a hooked model
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_made_of_the_gradients_of_single_examples(name, model, build):
    """Of each backward pass by itself, clipped if private, to 1e-5 of the change that the step makes."""
    made = clients.load(name, {})
    worker = build(*model, private=made.private)
    task, part, clip = worker.task, worker.dataset.partition(0), 0.5
    names = tuple(sorted(task.layout))
    rng = np.random.default_rng(0)  # away from B = 0, so that A has a gradient too
    adapter = {n: (0.3 * rng.normal(size=task.layout[n].shape)).astype(np.float32) for n in names}
    quiet = {"noise_multiplier": 1e-10, "clip_norm": clip} if made.private else {}
    told = Settings(
        round=1, train=names, send=names, local_steps=1, batch_size=9, lr=9e4, micro_batch_size=4, **quiet
    )
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        original = task.micro_batches
        patch.setattr(task, "micro_batches", lambda e, rows, k: taken.extend(rows) or original(e, rows, k))
        update = made.fit(task, adapter, part, told, Rng(3, 1, 0))
    total = {n: np.zeros(task.layout[n].shape) for n in names}
    shrunk = 0
    for row in taken:
        parameters = task.begin(adapter, names)
        task.losses(task.batch(part.examples, np.array([row]))).sum().backward()
        gradients = {n: p.grad.double().numpy() for n, p in zip(names, parameters, strict=True)}
        norm = length(gradients)
        shrunk += norm > clip
        factor = min(1.0, clip / norm) if made.private else 1.0
        total = {n: total[n] + factor * g for n, g in gradients.items()}
    assert len(taken) > 4 and (shrunk > 0 or not made.private)  # more than a micro-batch, and clipping bites
    off = {n: (adapter[n].astype(np.float64) - update.adapter[n]) / 1e4 - total[n] for n in names}
    assert length(off) < 1e-5 * length(total)


def length(tensors):
    return sum(float((t**2).sum()) for t in tensors.values()) ** 0.5


def test_depends_on_seed_round_and_client(fit):
    base = fit()
    assert not same(base, fit(seed=4)) and not same(base, fit(round=2)) and not same(base, fit(client=1))


def test_micro_batches_change_nothing(fit):
    whole, cut = fit(micro_batch_size=64), fit(micro_batch_size=3)
    for name in whole.adapter:
        np.testing.assert_allclose(cut.adapter[name], whole.adapter[name], rtol=1e-4, atol=1e-6)


def test_a_proximal_term_keeps_it_nearer(fit):
    def distance(update):
        return sum(float(((t - fit.worker.task.initial[n]) ** 2).sum()) for n, t in update.adapter.items())

    told = {"local_steps": 6, "lr": 0.1}
    assert distance(fit(**told, config={"proximal-mu": 1.0})) < distance(fit(**told))


def test_a_private_client_says_what_it_spends_and_shares_nothing_else(fit):
    settings = Settings(
        round=1, train=(), send=(), local_steps=5, batch_size=8, lr=1.0, noise_multiplier=1.5, clip_norm=2.0
    )
    event = fit.client.spends(40, settings)
    if not fit.client.private:
        assert event is None
        return
    assert (event.noise_multiplier, event.sample_rate, event.steps, event.clip_norm) == (1.5, 0.2, 5, 2.0)
    update = fit()
    assert update.metrics == {} and update.weight == 1.0
    shared = fit(share_metrics=True)
    assert shared.metrics.keys() == {"train_loss"} and shared.weight == len(fit.worker.dataset.partition(0))
