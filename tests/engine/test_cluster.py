"""A Ray cluster of two nodes, on this machine: a node is killed in mid-round, and the head goes."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.engine.cluster import Cluster, place
from fedlora.engine.ray import RayEngine
from fedlora.errors import UserError
from fedlora.privacy.ledger import read
from fedlora.simulation import simulate
from fedlora.strategies.ffa_lora import FFALoRA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::ResourceWarning")]

SLOW = "clients.use=tests.engine.faulty:Slow"


@pytest.fixture
def cluster():
    """A head that trains nothing, and two nodes of a core each."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    ray.shutdown()
    made.shutdown()
    gc.collect()


def tensors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def waits(until, seconds=120):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_a_node_that_dies_in_mid_round_changes_nothing(cluster, tiny, tmp_path, monkeypatch):
    mark = tmp_path / "training"
    monkeypatch.setattr(FFALoRA, "config", lambda self, round: {"mark": str(mark)} if round == 2 else {})
    scenario = tiny(SLOW, "rounds=4")
    whole = simulate(scenario, out=tmp_path / "whole")
    mark.unlink()

    def kill():
        waits(mark.exists)
        cluster.remove_node(cluster.nodes[1], allow_graceful=False)

    killer = threading.Thread(target=kill)
    with contextlib.closing(RayEngine(4, workers=None, address=cluster.address)) as engine:
        assert len(engine.pool.workers) == 2
        monkeypatch.setattr("fedlora.engine.make", lambda *_: engine)
        killer.start()
        made = simulate(scenario, out=tmp_path / "made")
        killer.join()
    assert engine.pool.replaced >= 1 and made.summary["failures"] == 0 and len(made.rounds) == 4
    assert same(tensors(whole.folder), tensors(made.folder)) and whole.summary["loss"] == made.summary["loss"]


def test_a_head_that_goes_is_one_line_and_the_run_goes_on_from_its_checkpoint(cluster, tiny, tmp_path):
    scenario, run, address = tmp_path / "tiny.yaml", tmp_path / "run", cluster.address
    scenario.write_text(tiny("rounds=2000", "eval_every=2000", "engine.kind=ray", private=False).to_yaml())
    command = [sys.executable, "-m", "fedlora", "simulate", str(scenario), "--out", str(run)]
    process = subprocess.Popen(
        [*command, "--ray-address", address], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    records = run / "metrics.jsonl"
    waits(lambda: (records.exists() and len(read(records, torn=True)) >= 3) or process.poll() is not None, 240)
    cluster.head_node.kill_gcs_server(check_alive=False)
    _, told = process.communicate(timeout=120)
    *_, last = told.strip().splitlines()
    assert process.returncode == 2 and f"the head of the Ray cluster at {address} is gone" in last
    assert last.endswith("go on with --resume") and "Traceback" not in told

    done = len(read(records))
    more = [f"rounds={done + 1}", "eval_every=2000", "engine.kind=inline"]
    resumed = simulate(tiny(*more, private=False), out=run, resume=True)
    whole = simulate(tiny(*more, private=False), out=tmp_path / "whole")
    assert len(resumed.rounds) == done + 1 and same(tensors(whole.folder), tensors(resumed.folder))


@pytest.mark.parametrize(
    ("folder", "own", "short"),
    [("/tmp", None, False), ("/tmp/" + "long/" * 30, None, True), ("/tmp", "/tmp/" + "x" * 60, True)],
)
def test_sockets_of_ray_have_room_whatever_the_temporary_folder_is(folder, own, short, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", folder)
    monkeypatch.setenv("RAY_TMPDIR", own) if own else monkeypatch.delenv("RAY_TMPDIR", raising=False)
    told = place()
    assert bool(told) is short and all(len(folder) < 30 for folder in told.values())


def test_where_ray_does_not_start_there_is_one_line_with_the_way_out(monkeypatch):
    import ray

    def slow(**options):
        raise Exception("The current node timed out during startup.\nMore of it")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(UserError) as raised:
        Cluster(None).connect(1)
    assert str(raised.value) == (
        "cannot reach Ray at this machine: The current node timed out during startup.: "
        "engine.kind: inline needs none, for the same result"
    )
