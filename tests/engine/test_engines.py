"""One contract over every engine, on a tiny real model; Ray starts once, with two workers."""

import contextlib
import gc
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedlora import engine as engines
from fedlora import wire
from fedlora.adapter import Instruction, fingerprint
from fedlora.engine import base
from fedlora.engine.base import chunks
from fedlora.engine.inline import InlineEngine
from fedlora.engine.pool import Pool
from fedlora.engine.ray import RayEngine
from fedlora.errors import RoundError
from fedlora.prepare import calibrate, prepare
from fedlora.simulation import simulate
from fedlora.strategies.fedavg_lora import FedAvgLoRA
from fedlora.strategies.ffa_lora import FFALoRA

# Ray 2.55 leaves sockets and files to the garbage collector, in the driver and in what it starts.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

USE = "tests.engine.faulty:Faulty"


@pytest.fixture(scope="module")
def setup(tiny):
    ready = prepare(tiny(f"clients.use={USE}", "data.validation_share=0.3", "metrics=[macro_f1, auroc, ece]"))
    return replace(ready.setup, noise=calibrate(ready.scenario, ready.data))


@pytest.fixture(scope="module")
def inline(setup):
    engine = InlineEngine(4)
    engine.start(setup)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ray(setup):
    engine = RayEngine(4, workers=2)
    engine.start(setup)
    yield engine
    engine.close()
    gc.collect()  # while its warnings are still let pass


@pytest.fixture(params=["inline", "ray"])
def engine(request):
    return request.getfixturevalue(request.param)


def instruct(engine, made=None, **config):
    made = made or FFALoRA()
    made.layout = engine.description.layout
    told = made.instruct(1, engine.description.initial)
    return Instruction(round=1, adapter=told.adapter, train=told.train, send=told.send, config=config)


def bits(updates):
    return [(u.clients, u.weight, {n: t.tobytes() for n, t in u.adapter.items()}) for u in updates]


def test_is_a_grid_with_a_node_for_each_client(engine):
    assert isinstance(engine, Grid) and list(engine.get_node_ids()) == [1, 2, 3, 4]


def test_replies_are_sorted_by_client_and_complete(engine):
    replies = engine.train(instruct(engine), [0, 2, 3], partial_sums=False)
    assert [u.clients for u in replies.updates] == [(0,), (2,), (3,)]
    assert [(r.client, r.error, r.steps) for r in replies.reports] == [(0, None, 2), (2, None, 2), (3, None, 2)]
    assert all(r.event and r.bytes_up > 1000 and r.bytes_down > 1000 and r.seconds > 0 for r in replies.reports)


def test_engines_agree_bit_for_bit(inline, ray, monkeypatch):
    for made in (FFALoRA(), FedAvgLoRA()):
        one, other = (e.train(instruct(e, made), range(4), partial_sums=True) for e in (inline, ray))
        assert bits(one.updates) == bits(other.updates)
    monkeypatch.setattr(base, "EVALUATION_CHUNK", 7)  # several pieces, which workers share
    figures = inline.evaluate(inline.description.initial)
    assert figures == ray.evaluate(ray.description.initial)
    names = ["loss", "accuracy", "macro_f1", "auroc", "ece"]
    assert list(figures) == [*names, "confusion", *(f"validation_{name}" for name in names)]


def test_bytes_are_those_of_the_serialised_reply(inline):
    from flwr.common.serde import recorddict_to_proto

    told = instruct(inline)
    replies = inline.train(told, [1], partial_sums=False)
    content = wire.pack_update(replies.updates[0], replies.reports[0].event)
    assert replies.reports[0].bytes_up == pytest.approx(recorddict_to_proto(content).ByteSize(), abs=6)
    down = recorddict_to_proto(wire.pack_instruction(told, inline.description.layout)).ByteSize()
    assert replies.reports[0].bytes_down == pytest.approx(down, abs=6)


def test_a_client_that_raises_is_a_failure_that_says_why_and_what_it_spent(engine):
    replies = engine.train(instruct(engine, fail=1), range(4), partial_sums=True)
    assert sorted(c for u in replies.updates for c in u.clients) == [0, 2, 3]
    bad = replies.reports[1]
    assert bad.client == 1 and bad.error == "RuntimeError: as told" and bad.steps == 0 and bad.event.steps == 2


@pytest.mark.parametrize(
    "fault, words",
    [
        ("nan", "not finite"),
        ("shape", "has shape"),
        ("keys", "exactly the tensors"),
        ("weight", "positive"),
        ("claim", "claims to weigh 1000000000"),
        ("other", "speaks for"),
        ("memory", "Memory"),
    ],
)
def test_an_update_that_breaks_the_contract_is_a_failure(inline, fault, words):
    replies = inline.train(instruct(inline, fail=2, fault=fault), [1, 2], partial_sums=True)
    assert [u.clients for u in replies.updates] == [(1,)] and words in replies.reports[1].error


def test_a_client_whose_a_is_another_refuses(inline):
    told = replace(instruct(inline), frozen="0123456789abcdef")
    replies = inline.train(told, [0, 1], partial_sums=True)
    assert not replies.updates and all("not the server's" in r.error for r in replies.reports)
    kept = {n: t for n, t in inline.description.initial.items() if ".lora_A." in n}
    assert len(inline.train(replace(told, frozen=fingerprint(kept)), [0], partial_sums=True).updates) == 1


def test_a_client_that_hands_its_optimiser_on_to_the_next_is_refused(tiny, tmp_path):
    scenario = tiny("clients.use=tests.engine.faulty:Leaky", private=False)
    with pytest.raises(RoundError, match=":Leaky keeps an optimiser in 'optimizer'"):
        simulate(scenario, out=tmp_path / "run")


def test_a_dead_worker_is_replaced_and_nothing_is_lost(ray, inline):
    os.kill(ray.pool.pids()[0], signal.SIGKILL)
    replies = ray.train(instruct(ray), range(4), partial_sums=False)
    assert bits(replies.updates) == bits(inline.train(instruct(inline), range(4), partial_sums=False).updates)
    assert ray.pool.replaced >= 1 and len(set(ray.pool.pids())) == 2


def test_an_evaluation_beside_a_round_is_that_evaluation(ray, inline, monkeypatch):
    """Three clients on two workers leave one of them idle at the end; four do not."""
    first, moved = (dict(inline.description.initial) for _ in range(2))
    head = next(n for n in moved if moved[n].ndim == 1)
    moved[head] = moved[head] + np.float32([1, -1])
    assert ray.beside(first) is None and inline.beside(first) is None
    monkeypatch.setattr(ray, "cohort", 3)
    alone = ray.train(instruct(ray), range(3), partial_sums=True)
    figures = ray.beside(moved)
    assert bits(ray.train(instruct(ray), range(3), partial_sums=True).updates) == bits(alone.updates)
    spread = Pool.spread
    monkeypatch.setattr(Pool, "spread", lambda self, jobs, *told: spread(self, jobs[:2], *told))
    assert figures() == inline.evaluate(moved) != inline.evaluate(first)  # nothing but two sums was left to do
    monkeypatch.undo()
    assert ray.evaluate(moved) == inline.evaluate(moved)


def test_an_evaluation_that_no_round_took_along_is_made_when_it_is_asked_for(ray, inline, monkeypatch):
    monkeypatch.setattr(ray, "cohort", 3)
    figures = ray.beside(first := dict(inline.description.initial))
    os.kill(ray.pool.pids()[0], signal.SIGKILL)
    assert figures() == inline.evaluate(first)
    assert ray._beside is None


@pytest.fixture
def cramped():
    """A control group of the kernel's, of version 1 or 2, with room for 64 MiB."""
    for file in ("memory/fedlora/memory.limit_in_bytes", "fedlora/memory.max"):
        folder = (limit := Path("/sys/fs/cgroup") / file).parent
        with contextlib.suppress(OSError):
            folder.mkdir()
        if limit.exists() and os.access(limit, os.W_OK):
            limit.write_text(str(64 * 2**20))
            break
        with contextlib.suppress(OSError):
            folder.rmdir()
    else:
        pytest.skip("no control group can be made here")
    yield folder
    folder.rmdir()


def test_a_worker_that_the_kernel_kills_for_want_of_memory_is_replaced(ray, inline, cramped, tmp_path):
    before = ray.pool.replaced
    greed = {"fail": 2, "fault": "greed", "group": str(cramped), "done": str(tmp_path / "done")}
    replies = ray.train(instruct(ray, **greed), range(4), partial_sums=False)
    assert bits(replies.updates) == bits(inline.train(instruct(inline), range(4), partial_sums=False).updates)
    assert ray.pool.replaced == before + 1 and (tmp_path / "done").exists()


def test_a_client_that_kills_its_worker_each_time_is_a_failure(ray):
    replies = ray.train(instruct(ray, fail=3, fault="die"), range(4), partial_sums=True)
    assert sorted(c for u in replies.updates for c in u.clients) == [0, 1, 2]
    assert "died 3 times" in replies.reports[3].error and replies.reports[3].event.steps == 2


def test_messages_do_what_plain_data_does(engine):
    """What Flower's strategies see: the same numbers through `send_and_receive`."""
    made = FFALoRA()
    made.layout = engine.description.layout
    messages = made.configure_train(1, wire.to_arrays(engine.description.initial), ConfigRecord(), engine)
    replies = list(engine.send_and_receive(messages))
    assert [r.metadata.src_node_id for r in replies] == [1, 2, 3, 4]
    plain = engine.train(instruct(engine), range(4), partial_sums=False)
    for reply, update in zip(replies, plain.updates, strict=True):
        got = wire.unpack_update(reply.content, update.clients[0])
        assert all(np.array_equal(got.adapter[n], t) for n, t in update.adapter.items())
    assert list(engine.pull_messages(["no such message"])) == []


def test_a_failure_is_an_error_reply(inline):
    made = FFALoRA()
    made.layout = inline.description.layout
    made.config = lambda round: {"fail": 0}
    messages = made.configure_train(1, wire.to_arrays(inline.description.initial), ConfigRecord(), inline)
    replies = list(inline.send_and_receive(messages))
    assert [r.has_error() for r in replies] == [True, False, False, False] and "as told" in replies[0].error.reason


@pytest.mark.parametrize("count, sizes", [(1, {1}), (10, {1}), (128, {2}), (1000, {15, 10})])
def test_chunks_depend_on_the_cohort_alone(count, sizes):
    parts = chunks(range(count))
    assert {len(p) for p in parts} == sizes and [c for p in parts for c in p] == list(range(count))


def test_chunks_are_made_of_whole_groups_of_fused_clients():
    assert [len(piece) for piece in chunks(range(10), fused=4)] == [4, 4, 2]
    assert {len(piece) for piece in chunks(range(64 * 15), fused=4)} == {16}
    assert {len(piece) for piece in chunks(range(1200), 10, fused=4)} == {12}


def test_chunks_that_are_not_summed_may_be_bounded():
    assert [len(piece) for piece in chunks(range(1000), 10)] == [10] * 100
    assert [len(piece) for piece in chunks(range(4), 10)] == [1] * 4


@pytest.mark.parametrize(
    "overrides, kind",
    [
        ((), InlineEngine),  # small work
        (("rounds=1000",), RayEngine),
        (("rounds=1000", "engine.workers=1"), InlineEngine),
        (("rounds=1000", "engine.kind=inline"), InlineEngine),
        (("engine.kind=ray",), RayEngine),
    ],
)
def test_auto_runs_small_work_here_and_other_work_on_ray(tiny, monkeypatch, overrides, kind):
    monkeypatch.setattr(Pool, "_connect", lambda self, workers: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert type(engines.make(tiny("engine.kind=auto", *overrides))) is kind
