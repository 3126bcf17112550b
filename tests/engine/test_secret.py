"""Where noise is secret, nobody draws it again: not by a seed, not by trying all states of a generator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.engine import Worker
from fedlora.errors import Refusal
from fedlora.passes import alone
from fedlora.prepare import calibrate, prepare

LOUD = ("privacy={noise_multiplier: 100.0, delta: 1.0e-3}", "clients.local_steps=1")


@pytest.fixture(scope="module")
def site(tiny):
    """A worker whose noise is a site's."""
    ready = prepare(tiny(*LOUD))
    return Worker(replace(ready.setup, noise=calibrate(ready.scenario, ready.data), secret=True))


def noise_of(worker, client=0):
    """What a server sees of a client's noise, in standard deviations; gradients are small beside it."""
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    update, report = worker.fit(instruction, client)
    assert report.error is None and report.digest == ""
    told, event = worker.scenario.clients, report.event
    unit = told.lr * event.noise_multiplier * event.clip_norm / told.batch_size
    return np.concatenate(
        [((update.adapter[n] - instruction.adapter[n]) / unit).ravel() for n in instruction.send]
    )


def found(noise, states):
    """The states of torch's generator that draw a noise: their numbers go with it by eight sigma."""
    matching = []
    for state in states:
        drawn = torch.randn(len(noise), generator=torch.Generator().manual_seed(state)).numpy()
        if abs(np.corrcoef(drawn, noise)[0, 1]) > 8 / np.sqrt(len(noise)):
            matching.append(state)
    return matching


def test_trying_states_of_a_generator_finds_nothing(site):
    """A slice of 2^32; with noise of such a generator it finds the state."""
    noise = noise_of(site)
    assert 0.9 < noise.std() < 1.1
    weak = torch.randn(len(noise), generator=torch.Generator().manual_seed(7 + 2**40)).numpy()
    assert found(weak, range(20)) == [7]  # the low 32 bits are all that it takes
    assert found(noise, range(3000)) == []


def test_each_training_draws_afresh_whatever_the_seed(site):
    one, again = noise_of(site), noise_of(site)
    assert abs(np.corrcoef(one, again)[0, 1]) < 5 / np.sqrt(len(one))


def test_a_worker_makes_no_generator_of_torch_and_moves_none(tiny, monkeypatch):
    def refuse(*args, **told):
        raise AssertionError("a generator was made or seeded")

    ready = prepare(tiny(*LOUD, "clients.local_steps=2", "privacy.clip=quantile", "clients.batch_size=40"))
    noise = dict.fromkeys(ready.data.sizes(), 1.0)
    for name in ("Generator", "manual_seed", "seed"):
        monkeypatch.setattr(torch, name, refuse)
    worker = Worker(replace(ready.setup, noise=noise, secret=True))
    before, ambient = torch.default_generator.get_state(), np.random.get_state()[1].copy()
    noise_of(worker)
    assert torch.equal(before, torch.default_generator.get_state())
    assert np.array_equal(ambient, np.random.get_state()[1])


def test_tensors_under_which_examples_move_each_other_are_refused_before_it_pays(site, monkeypatch):
    instruction = site.strategy.instruct(1, dict(site.task.initial))
    assert alone.mingle(site.task, instruction.adapter) == ""
    wild = {name: np.full_like(tensor, np.nan) for name, tensor in instruction.adapter.items()}
    paid = []
    monkeypatch.setattr(site, "pay", lambda *told: paid.append(told) or 0)
    with pytest.raises(Refusal, match="examples would not be bounded one by one: logits"):
        site.fit(replace(instruction, adapter=wild), 0)
    assert not paid
    assert site.fit(instruction, 0)[0] is not None and len(paid) == 1
