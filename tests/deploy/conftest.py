"""Sites with files of their own, split from the tiny scenario."""

import contextlib

import pytest

from fedlora import prepare
from fedlora.deploy.node import Node
from fedlora.deploy.split import split
from fedlora.engine.flower import FlowerEngine
from fedlora.reports.console import Silent
from fedlora.simulation import carry_out


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
