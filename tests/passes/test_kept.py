"""Where what the frozen layers make of examples is kept, and when."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from fedlora import simulate
from fedlora.engine import Worker
from fedlora.engine.inline import InlineEngine
from fedlora.passes import kept
from fedlora.passes.kept import pays
from fedlora.prepare import prepare

UPPER = ("model.adapter.layers=[1]", "rounds=8")


@pytest.fixture
def ready(tiny, tmp_path):
    ready = prepare(tiny(*UPPER, private=False))
    return replace(ready, setup=replace(ready.setup, kept=tmp_path / "frozen"))


@pytest.fixture
def engine(ready):
    engine = InlineEngine(ready.scenario.clients.total)
    engine.start(ready.setup)
    return engine


def test_a_run_finds_on_disk_what_another_left_there(ready, engine, monkeypatch):
    first = engine.worker
    folder = first.kept.folder
    assert sorted(file.name for file in folder.iterdir()) == ["test.npy", "train.npy"]
    held = np.load(folder / "train.npy")
    assert held.shape == (first.dataset.train.offsets[-1], 32) and np.isfinite(held).all()
    monkeypatch.setattr(Worker, "fill", lambda *told: pytest.fail("is passed again"))
    second = InlineEngine(ready.scenario.clients.total)
    second.start(ready.setup)
    assert second.worker.kept.folder == folder
    assert "prefix" in second.worker.task.batch(second.worker.dataset.train, np.arange(3))


def test_what_is_kept_is_what_the_layers_make_of_each(engine):
    """One example by itself, through the whole model, enters the layer with factors as it is kept."""
    worker = engine.worker
    base = worker.task.model.get_base_model()
    seen = []
    hook = base.bert.encoder.layer[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    examples, rows = worker.dataset.train, np.array([5])
    mine = worker.task.prefix.find(examples, rows)
    worker.task.prefix.kept = lambda examples: None
    worker.task.begin(worker.task.initial, ())
    worker.task.logits(worker.task.batch(examples, rows))
    hook.remove()
    assert mine.shape == (int(examples.lengths(rows)[0]), 32)
    np.testing.assert_allclose(mine, seen[0][0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"threads": 2}, {"precision": "bf16"}])
def test_another_machine_or_precision_has_its_own(ready, engine, change):
    other = Worker(replace(ready.setup, **change))
    assert other.kept.folder != engine.worker.kept.folder


def test_bfloat16_is_kept_as_its_bits_and_never_judged_by(ready, engine):
    other = InlineEngine(ready.scenario.clients.total)
    other.start(replace(ready.setup, precision="bf16"))
    worker, rows = other.worker, np.arange(4)
    worker.task.begin(worker.task.initial, ())
    made = worker.task.batch(worker.dataset.train, rows)["prefix"]
    exact = engine.worker.task.batch(engine.worker.dataset.train, rows)["prefix"]
    assert str(made.dtype) == "torch.bfloat16"
    np.testing.assert_allclose(made.float().numpy(), exact.numpy(), atol=0.05)
    worker.task.evaluate(worker.task.initial, worker.dataset.train, rows)  # leaves the task in float32
    assert "prefix" not in worker.task.batch(worker.dataset.train, rows)
    assert str(worker.task.batch(worker.dataset.test, rows)["prefix"].dtype) == "torch.float32"


@pytest.mark.parametrize("rounds, whether", [(1, False), (2, True), (3, True)])
def test_the_rule_when_to_keep(tiny, rounds, whether):
    """180 rows train; four clients take two steps of 8, 64 examples a round: half of the rows is 90."""
    told = tiny(*UPPER[:1], f"rounds={rounds}")
    data = prepare(told).data
    assert len(data.train) == 180 and pays(told, data) is whether


def test_without_room_it_is_computed_each_time(ready, monkeypatch, caplog):
    monkeypatch.setattr(kept, "DISK", 10)
    engine = InlineEngine(ready.scenario.clients.total)
    engine.start(ready.setup)
    assert "no room" in caplog.text and not list(ready.setup.kept.iterdir())
    assert "prefix" not in engine.worker.task.batch(engine.worker.dataset.train, np.arange(3))


def test_the_folder_that_was_used_longest_ago_makes_way(tmp_path, monkeypatch):
    for name, days in (("new", 0.5), ("old", 3), ("older", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.npy").write_bytes(bytes(100))
        os.utime(tmp_path / name, (then := time.time() - days * 86_400, then))
    monkeypatch.setattr(kept, "DISK", 300)
    assert kept._room(tmp_path, 90)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new", "old"]
    assert not kept._room(tmp_path, 250)  # what was used within a day stays
    assert [f.name for f in tmp_path.iterdir()] == ["new"]


def test_a_site_keeps_it_in_memory_and_no_more_than_fits(ready, monkeypatch):
    worker = Worker(replace(ready.setup, kept=None))
    assert worker.describe().wanted is None
    rows = np.arange(3)
    assert "prefix" in worker.task.batch(worker.dataset.train, rows)
    monkeypatch.setattr(kept, "MEMORY", 10)
    small = Worker(replace(ready.setup, kept=None))
    assert "prefix" not in small.task.batch(small.dataset.train, rows)


def test_a_run_that_fills_and_one_that_finds_agree_to_the_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    runs = [simulate(tiny(*UPPER), out=tmp_path / name) for name in ("fills", "finds")]
    assert list((tmp_path / "cache" / "frozen").iterdir())
    first, second = ((run.folder / "adapter/adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_a_full_disk_costs_what_is_kept_and_not_the_run(ready, monkeypatch, caplog):
    def full(*told):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Worker, "fill", full)
    engine = InlineEngine(ready.scenario.clients.total)
    engine.start(ready.setup)
    assert "is not kept: No space left on device" in caplog.text and not list(ready.setup.kept.iterdir())
    assert "prefix" not in engine.worker.task.batch(engine.worker.dataset.train, np.arange(3))


def test_what_is_kept_is_in_the_digest_of_a_sum(tiny, tmp_path):
    """Were it altered between two runs of a round, one noise would hide two sums."""
    from fedlora.client import Setter
    from fedlora.prepare import calibrate

    ready = prepare(tiny(*UPPER))
    setup = replace(ready.setup, kept=tmp_path / "frozen", noise=calibrate(ready.scenario, ready.data))
    found = []
    for altered in (False, True):
        engine = InlineEngine(4)
        engine.start(setup)
        worker = engine.worker
        if altered:
            file = worker.kept.folder / "train.npy"
            np.save(file, 1.5 * np.load(file))
        instruction = worker.strategy.instruct(1, dict(worker.task.initial), [4])
        partition = worker.dataset.partition(0)
        told = Setter(ready.scenario, setup.noise)(instruction, len(partition))
        found.append(worker.digests.of(instruction, instruction.adapter, partition, told))
    assert found[0] != found[1]


def test_a_model_that_writes_answers_begins_from_their_tokens(tiny, tiny_lm, tmp_path):
    """Nothing of the last pass of an evaluation is left for it."""
    decoder = ("task=causal_lm", "model.adapter.targets=[q_proj]", f"model.base={tiny_lm}")
    ready = prepare(tiny(*UPPER, *decoder, "exact_match={examples: 4, max_new_tokens: 2}", private=False))
    engine = InlineEngine(4)
    engine.start(replace(ready.setup, kept=tmp_path / "frozen"))
    figures = engine.evaluate(dict(engine.description.initial))
    assert 0 <= figures["exact_match"] <= 1 and engine.worker.task.prefix.row is None
