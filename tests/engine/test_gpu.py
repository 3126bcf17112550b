"""What only a GPU can get wrong: `pytest -m gpu`, on a machine that has one."""

import contextlib
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedlora.engine import hardware, trial
from fedlora.engine.ray import RayEngine
from fedlora.engine.worker import Worker
from fedlora.prepare import calibrate, prepare
from fedlora.simulation import simulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

QUIET = "privacy={noise_multiplier: 1.0e-6, delta: 1.0e-3}"  # a GPU draws other noise than a CPU


@pytest.fixture(scope="module")
def worker(tiny):
    """Makes the worker of a tiny scenario on a device."""

    def make(device, *overrides, private=False):
        ready = prepare(tiny(*overrides, private=private))
        return Worker(replace(ready.setup, device=device, noise=calibrate(ready.scenario, ready.data)))

    return make


def change(worker, client=1):
    """What a client's training adds to the adapter, as one vector."""
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    update, report = worker.fit(instruction, client)
    assert report.error is None
    return np.concatenate([(update.adapter[n] - worker.task.initial[n]).ravel() for n in sorted(update.adapter)])


@pytest.mark.parametrize("strategy", ["ffa_lora", "fedavg_lora"])
@pytest.mark.parametrize("private", [False, True])
def test_an_update_is_the_same_as_on_a_cpu(private, strategy, worker):
    told = (f"strategy.use={strategy}", *((QUIET,) if private else ()))
    here, there = (change(worker(device, *told, private=private)) for device in ("cpu", "cuda"))
    assert np.linalg.norm(there - here) < 1e-3 * np.linalg.norm(here)


@pytest.mark.parametrize("private", [False, True])
def test_an_update_in_bfloat16_is_near_that_in_float32(private, worker):
    told = (QUIET,) if private else ()
    full = change(worker("cuda", *told, private=private))
    half = change(worker("cuda", "engine.precision=bf16", *told, private=private))
    assert 0 < np.linalg.norm(half - full) < 0.1 * np.linalg.norm(full)


def test_an_evaluation_is_the_same_as_on_a_cpu(worker):
    figures = []
    for device in ("cpu", "cuda"):
        made = worker(device)
        figures.append(made.evaluate(made.task.initial, "test", 0, len(made.dataset.test)).sums)
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], rel=1e-4)
    assert figures[1]["correct"] == figures[0]["correct"]


def test_a_batch_is_on_the_gpu_and_whole(worker):
    made = worker("cuda")
    tokens = np.arange(12, dtype=np.int64).reshape(3, 4)
    placed = made.task.place(tokens)
    assert placed.device.type == "cuda" and placed.cpu().numpy().tolist() == tokens.tolist()


@pytest.mark.parametrize("private", [False, True])
def test_a_measured_worker_holds_its_model_and_a_step_and_trains_as_before(private, worker):
    made = worker("cuda", private=private)
    before = change(made)
    found = trial.measure(made)
    model = sum(p.numel() * p.element_size() for p in made.task.model.parameters())
    _, total = torch.cuda.mem_get_info()
    assert model + hardware.CONTEXT < found.worker <= found.free <= total + hardware.CONTEXT
    assert np.linalg.norm(change(made) - before) < 1e-5 * np.linalg.norm(before)


def test_two_workers_on_one_gpu_give_what_one_gives(tiny, tmp_path):
    told = ("engine.kind=ray", "rounds=2")
    one, two = (
        simulate(
            tiny(*told, f"engine.workers={count}", f"engine.gpus_per_worker={share}", private=False),
            out=tmp_path / str(count),
        )
        for count, share in ((1, 1), (2, 0.5))
    )
    gc.collect()
    assert two.summary["failures"] == 0 and two.summary["device"] == "cuda"
    here, there = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for name, tensor in here.items():
        np.testing.assert_allclose(there[name], tensor, rtol=1e-4, atol=1e-6)


def test_auto_packs_several_tiny_workers_on_a_gpu(tiny):
    ready = prepare(tiny("engine.gpus_per_worker=auto", private=False))
    with contextlib.closing(RayEngine(4, workers=2, gpus_per_worker="auto")) as engine:
        found = engine.start(ready.setup)
        assert found.device == "cuda" and len(set(engine.pool.pids())) == 2
        assert engine.pool.gpus_per_worker == (0.5 if torch.cuda.device_count() == 1 else 1.0)
    gc.collect()


def test_a_step_that_does_not_fit_says_what_to_lower(worker, monkeypatch):
    made = worker("cuda")
    monkeypatch.setattr(made.client, "fit", lambda *_: torch.empty(2**50, device="cuda"))  # 4 PiB
    update, report = made.fit(made.strategy.instruct(1, dict(made.task.initial)), 0)
    assert update is None and report.error.startswith(
        "OutOfMemoryError: the GPU is full: lower clients.micro_batch"
    )
