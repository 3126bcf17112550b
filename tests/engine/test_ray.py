"""What only Ray can get wrong, each with a Ray of its own."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.engine.actor import check_shared
from fedlora.engine.cluster import LAST_WORDS, SILENCE, Cluster
from fedlora.engine.ray import RayEngine
from fedlora.errors import SettingError, UserError
from fedlora.prepare import prepare
from fedlora.privacy import ledger
from fedlora.reports.console import Silent
from fedlora.simulation import simulate

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def test_a_worker_that_cannot_load_says_why(tiny, tmp_path):
    setup = prepare(tiny()).setup
    broken = {**setup.scenario, "model": {**setup.scenario["model"], "base": str(tmp_path)}}
    engine = RayEngine(4, workers=1)
    try:
        with pytest.raises(SettingError, match=r"model\.base") as caught:
            engine.start(replace(setup, scenario=broken))
        assert caught.value.key == "model.base"
    finally:
        engine.close()
        gc.collect()  # while its warnings are still let pass


def test_a_cluster_whose_head_is_silent_for_too_long_ends_the_run(monkeypatch):
    cluster = Cluster("there:6379")
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        at = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address=at))
        cluster.look_for_head()
        assert cluster._silent is None
    cluster._looked = 0.0
    cluster.look_for_head()  # refused, but not for long
    assert cluster._silent is not None
    cluster._looked, cluster._silent = 0.0, time.monotonic() - SILENCE - 1
    with pytest.raises(UserError, match=r"the head of the Ray cluster at there:6379 is gone .*with --resume$"):
        cluster.look_for_head()


@pytest.mark.parametrize("end, said", [("os._exit(1)", f"{LAST_WORDS}\n"), ("raise SystemExit(1)", "")])
def test_a_process_that_ray_ends_at_once_leaves_a_line(end, said):
    code = (
        f"import os; from fedlora.engine.cluster import _witness; cluster = lambda: None; _witness(cluster); {end}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == said


def test_a_node_without_the_shared_folders_says_so(tmp_path):
    check_shared(tmp_path)
    with pytest.raises(UserError, match=r"gone: is not on .*let FEDLORA_CACHE and --out name folders that all"):
        check_shared(tmp_path, tmp_path / "gone")


@pytest.mark.parametrize("name", ["flora", "fedask"])
def test_merges_and_trips_are_the_same_on_many_workers_one_of_which_dies(name, tiny, tmp_path):
    """In round 2 a worker is killed: the one that takes its place must hold the merges of round 1 too."""
    asked = (f"strategy.use={name}", "rounds=3", "clients.ranks={kind: list, values: [2, 4]}" * (name != "fedask"))
    scenario = tiny(*filter(None, asked))
    whole = simulate(scenario, out=tmp_path / "inline")
    killer = Killer(round=1)
    with contextlib.closing(RayEngine(4, workers=2)) as engine:
        killer.engine = engine
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedlora.engine.make", lambda *_: engine)
            many = simulate(scenario, out=tmp_path / "ray", display=killer)
    gc.collect()
    assert engine.pool.replaced >= 1 and many.summary["failures"] == 0
    one, other = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (whole, many))
    assert one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.slow
@pytest.mark.timeout(900)  # two workers load, one of them twice
def test_a_client_that_hangs_is_stopped_counted_and_replaced(tiny, tmp_path, monkeypatch):
    """The deadline counts from when a worker has loaded, which takes the new one longer than that."""
    monkeypatch.setattr(
        "fedlora.strategies.ffa_lora.FFALoRA.config", lambda self, round: HANG if round == 1 else {}
    )
    use = ("clients.use=tests.engine.faulty:Faulty", "engine.deadline=5", "engine.workers=2", "engine.kind=ray")
    made = simulate(tiny(*use), out=tmp_path / "run")
    gc.collect()
    first, second = made.rounds
    assert (first["clients"], first["failures"], second["clients"]) == (3, 1, 4) and first["seconds"] < 200
    bad = made.clients[1]
    assert bad["error"] == "took longer than engine.deadline, 5 s" and bad["epsilon"] > 0
    assert len(made.clients) == len(ledger.read(made.folder / "privacy.jsonl")) == 8


HANG = {"fail": 1, "fault": "hang"}


class Killer(Silent):
    """A display that kills a worker after a round."""

    def __init__(self, round):
        self.at = round

    def round(self, line):
        if line["round"] == self.at:
            os.kill(self.engine.pool.pids()[0], signal.SIGKILL)
