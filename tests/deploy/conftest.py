"""Sites with files of their own, split from the tiny scenario."""

import contextlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fedlora import prepare, wire
from fedlora.adapter import Instruction
from fedlora.deploy.node import Node
from fedlora.deploy.split import split
from fedlora.engine.flower import FlowerEngine
from fedlora.engine.worker import Worker
from fedlora.reports.console import Silent
from fedlora.simulation import carry_out
from fedlora.strategies.ffa_lora import FFALoRA
from tests.deploy.federation import ROWS

BIN = Path(sys.executable).parent


@pytest.fixture
def sites(tiny, tmp_path):
    """Makes the site files of a tiny scenario, and gives the scenario as the server has it."""

    def make(*overrides, private=True):
        scenario = tiny(*overrides, private=private)
        files = split(scenario, tmp_path / "sites")
        for file in files if not private else ():  # as in a simulation, they tell what they lose
            file.write_text(file.read_text().replace("own_code: false", "own_code: false, metrics: true"))
        test = str(tmp_path / "sites" / "test.csv")
        return tiny(f"data.files.test={test}", *overrides, private=private), files

    return make


@pytest.fixture
def nodes(tmp_path):
    """Makes nodes of site files, by id from 1."""
    return lambda files: {number: Node(file, tmp_path) for number, file in enumerate(files, 1)}


@pytest.fixture
def deployed(tmp_path):
    """Carries a scenario out on nodes; gives the run and its engine."""

    def run(scenario, grid, folder=None, resume=False, **options):
        folder = folder or tmp_path / "runs" / "run-1"
        options = {"deadline": 60.0, "join": 0.0} | options
        engine = FlowerEngine(grid, scenario.clients.total, run=folder.name, **options)
        with contextlib.closing(engine):
            return carry_out(prepare.prepare_server(scenario), engine, folder, resume, Silent()), engine

    return run


@pytest.fixture
def server(sites):
    """What a server sends: its introduction, and a round's instruction."""

    def make(*overrides, private=True):
        scenario, files = sites(*overrides, private=private)
        ready = prepare.prepare_server(scenario)
        worker = Worker(ready.setup)
        words = {
            "run": "tiny-1",
            "scenario": json.loads(json.dumps(ready.setup.scenario)),
            "labels": list(ready.data.labels),
            "version": version("fedlora"),
            "base": worker.base_fingerprint(),
            "adapter": worker.describe().fingerprint,
            "signature": None,
        }
        strategy = FFALoRA()
        strategy.bind(worker.task.layout, worker.task.kind, worker.task.initial, private)

        def train(round=1, told=(), **words):
            made = strategy.instruct(round, worker.task.initial)
            content = wire.pack_instruction(
                Instruction(round=round, adapter=made.adapter, train=made.train, send=made.send),
                worker.task.layout,
            )
            for key, value in dict(told).items():
                content[wire.CONFIG][key] = value
            content[wire.REPORT] = wire.pack_words({"run": "tiny-1", "merged": 0, **words})[wire.REPORT]
            return content

        return words, files, train

    return make


@pytest.fixture
def node(tmp_path):
    return lambda file: Node(file, tmp_path / "app")


@pytest.fixture
def made(tmp_path):
    """Makes a site file of rows and further keys."""

    def write(rows=ROWS, data="labels: [surgery, other, rare]", more="", name="rows.csv"):
        (tmp_path / name).write_text(rows)
        file = tmp_path / "site.yaml"
        file.write_text(
            f"name: st-mary\nclient: 2\ndata: {{train: {tmp_path / name}, text: text, label: ward, {data}}}\n"
            f"state: {tmp_path / 'state'}\n{more}"
        )
        return file

    return write


@pytest.fixture
def environment(tmp_path):
    return {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FEDLORA_RUNS": str(tmp_path / "server-runs"),
        "TMPDIR": str(tmp_path),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def scenario(tiny, tmp_path):
    """Two sites' files, and the scenario as a file that the server can read."""

    def make(*overrides, private=True):
        made = tiny("clients.total=2", *overrides, private=private)
        files = split(made, tmp_path / "sites")
        for site in files if not private else ():
            site.write_text(site.read_text().replace("own_code: false", "own_code: false, metrics: true"))
        test = str(tmp_path / "sites" / "test.csv")
        there = tiny("clients.total=2", f"data.files.test={test}", *overrides, private=private)
        (tmp_path / "there.yaml").write_text(there.to_yaml())
        return made, tmp_path / "there.yaml", files

    return make
