"""What a round makes does not depend on who ran it: one worker or several, in whatever order, here or on Ray."""

import contextlib
import gc
from dataclasses import replace

import pytest

from fedlora import plugins
from fedlora.engine.base import chunks, gathered
from fedlora.engine.inline import InlineEngine
from fedlora.engine.ray import RayEngine
from fedlora.engine.worker import Worker
from fedlora.prepare import calibrate, prepare

NAMES = [n for n in plugins.names("strategies") if plugins.find("strategies", n).linear] + ["flexlora"]
CLIENTS = 130  # in chunks of two
DRAWN = ("data.partition={kind: sampled, examples: 16}", f"clients.total={CLIENTS}", "clients.local_steps=1")


@pytest.fixture
def ready(tiny):
    """Makes all that a round needs, for a strategy."""

    def make(name):
        held = "data.client_test_share=0.2"
        made = prepare(tiny(f"strategy.use={name}", "model.adapter.kind=auto", held, *DRAWN))
        return replace(made, setup=replace(made.setup, noise=calibrate(made.scenario, made.data)))

    return make


def told(ready, description):
    strategy, found = ready.strategy, description
    strategy.bind(found.layout, found.kind, found.initial, True)
    return strategy.instruct(1, dict(found.initial)), strategy.partial_sums


def bits(replies):
    return [(u.clients, u.weight, {n: t.tobytes() for n, t in u.adapter.items()}) for u in replies.updates]


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_which_worker_served_whom_before(name, ready):
    """Two workers that take the chunks from the end, against one that takes them in order."""
    made = ready(name)
    one, other = Worker(made.setup), Worker(made.setup)
    instruction, sums = told(made, one.describe())
    pieces = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    whole = gathered([one.train(instruction, piece, sums) for piece in pieces], sums)
    parts = [(other, one)[i % 2].train(instruction, pieces[i], sums) for i in (2, 1, 0)]
    assert len(whole.reports) == 9 and not any(report.error for report in whole.reports)
    assert bits(gathered(reversed(parts), sums)) == bits(whole)


def test_the_bits_of_fused_clients_do_not_depend_on_how_many_workers_there_are(tiny):
    """One worker for all chunks, in order, and two that take turns from the end."""
    made = prepare(tiny("engine.fused=3", "clients.total=8"))
    made = replace(made, setup=replace(made.setup, noise=calibrate(made.scenario, made.data)))
    inline, other = InlineEngine(8), Worker(made.setup)
    instruction, sums = told(made, inline.start(made.setup))
    whole = inline.train(instruction, range(8), sums)
    pieces = chunks(range(8), fused=3)
    assert sums and [len(piece) for piece in pieces] == [3, 3, 2]
    parts = [(other, inline.worker)[i % 2].train(instruction, pieces[i], sums) for i in (2, 1, 0)]
    assert not any(report.error for report in whole.reports)
    assert bits(gathered(reversed(parts), sums)) == bits(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_how_many_workers_ray_has(name, ready):
    """Four workers, of which one, two and all are given work."""
    made = ready(name)
    inline = InlineEngine(CLIENTS)
    instruction, sums = told(made, inline.start(made.setup))
    whole = bits(inline.train(instruction, range(CLIENTS), sums))
    with contextlib.closing(RayEngine(CLIENTS, workers=4)) as engine:
        engine.start(made.setup)
        every = engine.pool.workers
        for count in (1, 2, 4):
            engine.pool.workers = every[:count]
            assert bits(engine.train(instruction, range(CLIENTS), sums)) == whole
        assert engine.evaluate(dict(engine.description.initial)) == inline.evaluate(
            dict(engine.description.initial)
        )
    gc.collect()
