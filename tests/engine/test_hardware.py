"""What workers run on, with the measuring of a GPU played."""

import contextlib
import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.engine import hardware, trial
from fedlora.engine.hardware import CONTEXT, MARGIN, MOST, Measured, Node, held, pack, room, share
from fedlora.engine.pool import Pool
from fedlora.engine.ray import RayEngine
from fedlora.errors import ScenarioError, SettingError, UserError
from fedlora.prepare import prepare
from fedlora.simulation import simulate

GIB = 2**30
without = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.mark.parametrize(
    "free, worker, nodes, threads, cohort, workers, made",
    [
        (80, 10, [Node(1, 16)], 1, 100, None, (7, 0.1428)),  # 72 of 80 GiB to share: 7; floor(10000 / 7) = 1428
        (80, 10, [Node(1, 16)], 4, 100, None, (4, 0.25)),  # cores for 4
        (80, 10, [Node(1, 16)], 1, 3, None, (3, 0.3333)),  # clients for 3
        (80, 10, [Node(2, 16)], 1, 5, None, (5, 0.3333)),  # 3 on one GPU and 2 on the other
        (80, 10, [Node(4, 32)], 1, 100, None, (28, 0.1428)),
        (
            80,
            10,
            [Node(1, 2), Node(1, 16)],
            1,
            100,
            None,
            (9, 0.1428),
        ),  # cores for 2 on the first, 7 fit the second
        (80, 10, [Node(0, 64), Node(1, 2)], 1, 100, None, (2, 0.5)),  # the first has no GPU
        (80, 79, [Node(1, 16)], 1, 100, None, (1, 1.0)),  # one by itself needs no margin
        (80, 36, [Node(1, 16)], 1, 100, None, (2, 0.5)),  # two leave 8 of 80
        (80, 37, [Node(1, 16)], 1, 100, None, (1, 1.0)),
        (80, 10, [Node(2, 16)], 1, 100, 6, (6, 0.3333)),  # as asked
        (80, 10, [Node(2, 16)], 1, 2, 6, (6, 0.3333)),
    ],
)
def test_workers_are_packed_by_memory_cores_and_clients(free, worker, nodes, threads, cohort, workers, made):
    found = Measured(free * GIB, worker * GIB)
    assert pack(found, nodes, threads=threads, cohort=cohort, workers=workers) == made


@pytest.mark.parametrize(
    "free, worker, nodes, threads, workers, key, line",
    [
        (8, 9, [Node(1, 16)], 1, None, "clients.micro_batch_size", "takes 9 GiB, and 8 GiB .* or data.max_length"),
        (80, 10, [Node(1, 16)], 1, 8, "engine.workers", "8 of 10 GiB do not fit: .* 80 GiB, .* for 7; lower it"),
        (80, 10, [Node(1, 2)], 1, 3, "engine.workers", "for 2; lower it"),
        (80, 10, [Node(1, 2)], 4, None, "engine.threads", "no node with a GPU has 4 cores"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_lower(free, worker, nodes, threads, workers, key, line):
    with pytest.raises(SettingError, match=line) as told:
        pack(Measured(free * GIB, worker * GIB), nodes, threads=threads, cohort=9, workers=workers)
    assert told.value.key == key and "\n" not in str(told.value)


@given(
    free=st.integers(1, 10**12),
    worker=st.integers(1, 10**12),
    nodes=st.lists(st.builds(Node, st.integers(0, 8), st.integers(0, 128)), min_size=1, max_size=4),
    threads=st.integers(1, 8),
    cohort=st.integers(1, 1000),
    asked=st.none() | st.integers(1, 64),
)
def test_packing_never_asks_for_more_than_there_is(free, worker, nodes, threads, cohort, asked):
    try:
        workers, each = pack(Measured(free, worker), nodes, threads=threads, cohort=cohort, workers=asked)
    except SettingError:
        if asked is None:
            assert worker > free or not any(node.gpus and node.cores >= threads for node in nodes)
        return
    on_one = held(each)  # that Ray places on a GPU
    assert on_one * worker <= (free if on_one == 1 else free * (1 - MARGIN))
    assert 1 <= workers <= room(nodes, on_one, threads)
    assert workers * threads <= sum(node.cores for node in nodes)
    assert workers == asked if asked else workers <= cohort


def test_shares_are_those_that_ray_can_place():
    assert [share(n) for n in (1, 2, 3, 6, 7)] == [1.0, 0.5, 0.3333, 0.1666, 0.1428]
    assert [held(share(n)) for n in range(1, MOST + 1)] == [*range(1, MOST + 1)]
    assert held(1 / 6) == 5  # which Ray rounds to 0.1667
    assert [held(x) for x in (1.0, 0.6, 0.5, 0.34, 0.3333, 0.25, 0.1)] == [1, 1, 2, 2, 3, 4, 10]


def test_a_worker_is_measured_by_what_it_held_at_most(build, monkeypatch):
    worker = build(private=False)
    figures = {"memory_reserved": 3 * GIB, "max_memory_reserved": 4 * GIB, "mem_get_info": (70 * GIB, 80 * GIB)}
    for name, figure in figures.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda figure=figure: figure)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert trial.measure(worker) == Measured(free=73 * GIB + CONTEXT, worker=4 * GIB + CONTEXT)


@pytest.mark.parametrize("private", [False, True])
def test_a_rehearsal_takes_the_longest_at_once_and_leaves_nothing_behind(private, build, monkeypatch):
    worker = build("clients.micro_batch_size=6", private=private)  # batches of 8
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    before, _ = worker.fit(instruction, 1)
    seen, batch = [], worker.task.batch
    monkeypatch.setattr(
        worker.task, "batch", lambda examples, rows: seen.append((examples, rows)) or batch(examples, rows)
    )
    trial.rehearse(worker)
    monkeypatch.undo()
    train, test = worker.dataset.train, worker.dataset.test
    (trained,) = (rows for examples, rows in seen if examples is train)  # one pass, where two would be of 4
    (tested,) = (rows for examples, rows in seen if examples is test)
    every, longest = (np.sort(e.lengths(np.arange(len(e)))) for e in (train, test))
    assert np.sort(train.lengths(trained)).tolist() == every[-8:].tolist()
    assert len(tested) == min(len(test), 1024 // longest[-1])
    after, report = worker.fit(instruction, 1)
    assert report.error is None and all(
        np.array_equal(before.adapter[n], after.adapter[n]) for n in before.adapter
    )


def test_a_rehearsal_of_fused_clients_passes_the_examples_of_all_at_once(build, monkeypatch):
    worker = build("engine.fused=3", private=False)
    seen, join = [], worker.task.join
    monkeypatch.setattr(worker.task, "join", lambda batches: seen.append(len(batches)) or join(batches))
    trial.rehearse(worker)
    assert seen == [3]


@pytest.mark.parametrize("supported, made", [(True, "bf16"), (False, "fp32")])
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it(supported, made, monkeypatch):
    def answer(including_emulation):
        assert not including_emulation
        return supported

    monkeypatch.setattr("torch.cuda.is_bf16_supported", answer)
    assert hardware.precision("auto", "cuda") == made
    assert hardware.precision("fp32", "cuda") == "fp32" and hardware.precision("bf16", "cpu") == "bf16"


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    for there, made in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert hardware.device("auto") == made and hardware.device("cpu") == "cpu"


def test_a_client_and_a_worker_without_room_on_the_gpu_say_what_to_lower(build, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    def fit(*_):
        raise full

    worker = build(private=False)
    monkeypatch.setattr(worker.client, "fit", fit)
    update, report = worker.fit(worker.strategy.instruct(1, dict(worker.task.initial)), 0)
    assert update is None and report.error == (
        "OutOfMemoryError: the GPU is full: lower clients.micro_batch_size, data.max_length, or engine.workers "
        "where several share it"
    )
    with pytest.raises(
        SettingError, match=r"^engine\.gpus_per_worker: the GPU is too small for a step: lower clients"
    ):
        trial.rehearse(worker)


@pytest.mark.parametrize("value", ["1.5", "-1", "some"])
def test_a_worker_uses_one_gpu_at_most(value, tiny):
    with pytest.raises(ScenarioError, match=r"gpus_per_worker") as told:
        tiny(f"engine.gpus_per_worker={value}")
    assert value != "1.5" or "should be less than or equal to 1, not 1.5" in told.value.lines[0]


@without
def test_auto_without_a_gpu_is_a_cpu_without_a_word(tiny, tmp_path, caplog):
    run = simulate(tiny("engine.gpus_per_worker=auto", "rounds=1"), out=tmp_path / "run")
    assert run.summary["device"] == "cpu" and run.summary["precision"] == "fp32" and not caplog.records


@without
def test_a_gpu_that_is_not_there_is_one_line_about_its_key(tiny, tmp_path):
    with pytest.raises(UserError) as told:
        simulate(tiny("engine.gpus_per_worker=1"), out=tmp_path / "run")
    assert str(told.value) == (
        "--set engine.gpus_per_worker=1: engine.gpus_per_worker: asks for a GPU, and torch finds none: "
        "write 0, or auto, which takes one where it is"
    )


@pytest.fixture
def two_gpus(monkeypatch):
    """Ray that counts two GPUs and four cores."""
    import ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    counted = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 2**27}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False, **counted)
    yield ray
    ray.shutdown()
    gc.collect()


@pytest.mark.parametrize(
    "nodes, share, asked, made",
    [
        ([Node(0, 2)], 0.0, None, 2),
        ([Node(0, 64)], 0.0, None, 9),  # clients of a round
        ([Node(2, 64)], 1.0, None, 2),
        ([Node(2, 64)], 0.34, 4, 4),
        (
            [Node(2, 64)],
            0.6,
            3,
            "3 workers of 1 cores and 0.6 of a GPU each do not fit: Ray has room for 2; lower it",
        ),
        ([Node(1, 1)], 0.5, 2, "room for 1; lower it or engine.gpus_per_worker"),
        (
            [Node(0, 3)],
            0.0,
            4,
            "4 workers of 1 cores each do not fit: Ray has room for 3; lower it or engine.threads",
        ),
    ],
)
def test_numbers_that_ray_could_not_place_are_refused(nodes, share, asked, made, monkeypatch):
    monkeypatch.setattr(Pool, "_connect", lambda self, workers: None)
    pool = Pool(workers=asked, cohort=9, threads=1, gpus_per_worker=share, address=None)
    pool._nodes = nodes
    if isinstance(made, int):
        assert pool._fitting(asked) == made
        return
    with pytest.raises(SettingError, match=made):
        pool._fitting(asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_places_workers_that_share_gpus(two_gpus, tiny, monkeypatch):
    from ray.util.placement_group import placement_group, remove_placement_group

    for n in (3, 6, 7):
        group = placement_group([{"GPU": share(n)}] * 2 * n)
        assert group.wait(30), n
        remove_placement_group(group)

    ready = prepare(tiny(private=False))
    monkeypatch.setattr(Pool, "_measure", lambda self: Measured(free=10 * GIB, worker=4 * GIB))
    with contextlib.closing(RayEngine(4, workers=None, cohort=3, gpus_per_worker="auto")) as engine:
        assert len(engine.pool.workers) == 1
        engine.start(ready.setup)
        assert engine.pool.gpus_per_worker == 0.5 and len(set(engine.pool.pids())) == 3
