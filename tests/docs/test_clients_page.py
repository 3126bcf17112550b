"""The page on clients of one's own: its classes run as it is written, and are as short as it says."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from fedlora import Settings, plugins, scenario
from fedlora.client import Client
from fedlora.simulation import simulate

TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
FILES = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', TEXT, re.S))
PLAIN, PRIVATE = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S)]


@pytest.fixture
def page(small, monkeypatch):
    """Trains two small rounds as a block says, in a folder with the page's files, where Python finds them."""
    for name, code in FILES.items():
        (small / name).write_text(code)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)  # another page has one too
    monkeypatch.syspath_prepend(str(small))

    def run(block, out, *more):
        told = [f"clients.{key}={value}" for key, value in block["clients"].items() if key != "total"]
        told += [] if "privacy" in block else ["privacy=null"]
        return simulate(scenario.load("smoke", [*told, "clients.batch_size=8", "rounds=2", *more]), out=out)

    return run


def lines(file):
    (cls,) = [node for node in ast.parse(FILES[file]).body if isinstance(node, ast.ClassDef)]
    first = min([cls.lineno, *(decorator.lineno for decorator in cls.decorator_list)])
    return [line for line in FILES[file].splitlines()[first - 1 : cls.end_lineno] if line.strip()]


def test_its_classes_are_as_short_as_its_headings_say():
    assert len(lines("mine.py")) == 10 and "## Another optimiser in ten lines" in TEXT
    assert len(lines("mine_private.py")) == 4 and "## A private one in four" in TEXT


def test_the_cosine_trains_and_its_rate_falls(page):
    """From the rate of the scenario in round 1 to half of it in the middle; at the end it is above zero."""
    alone, fused = page(PLAIN, "plain"), page(PLAIN, "fused", "engine.fused=2")
    assert alone.summary["rounds"] == 2 and fused.summary["accuracy"] == pytest.approx(alone.summary["accuracy"])
    client = plugins.find_of("clients", PLAIN["clients"]["use"], Client)(over=10)

    def rates(round, parameters):
        told = Settings(round=round, train=(), send=(), local_steps=1, batch_size=1, lr=0.002)
        return [group["lr"] for group in client.optimizer(parameters, told).param_groups]

    one = torch.nn.Parameter(torch.zeros(1))
    assert rates(1, [one]) == [0.002] and rates(6, [one]) == [pytest.approx(0.001)]
    assert rates(6, [{"params": [one], "lr": 0.5}]) == [pytest.approx(0.25)]  # by role
    assert 0 < rates(11, [one])[0] == rates(10, [one])[0] < 0.0001


def test_the_private_one_is_dp_sgd_with_adamw_bit_for_bit(page):
    own = page(PRIVATE, "own")
    named = {**PRIVATE, "clients": {**PRIVATE["clients"], "use": "dp_sgd", "optimizer": "adamw"}}
    shipped = page(named, "shipped")
    first, second = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (own, shipped))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    assert own.summary["epsilon"] == shipped.summary["epsilon"] > 0


def test_every_attribute_that_it_names_is_one():
    from fedlora.clients.dp_sgd import DPSGD

    told = re.findall(r"^\| `(\w+)[(`]", TEXT, re.M)
    assert set(told) == {"private", "hooked", "clips", "limits", "mechanism", "persons", "spends", "passes", "fit"}
    assert all(hasattr(DPSGD, name) for name in told)
