"""Runs to look at: of ten clients, private, with everything that a report can show."""

import shutil

import pytest

from fedlora.run import Run
from fedlora.simulation import simulate

TEN = ("clients.total=10", "rounds=3", "strategy.use=fedavg_lora", "privacy.share_metrics=true")


@pytest.fixture(scope="session")
def ten(tiny, tmp_path_factory):
    """A finished run of ten clients."""
    return simulate(tiny(*TEN), out=tmp_path_factory.mktemp("runs") / "ten")


@pytest.fixture
def copy(ten, tmp_path):
    """The same in a folder of its own, to be damaged; opened anew by the call of what it gives."""
    shutil.copytree(ten.folder, tmp_path / "run")
    return lambda: Run.open(tmp_path / "run")
