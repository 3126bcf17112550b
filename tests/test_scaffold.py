"""A new project runs at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedlora import Run
from fedlora.cli import main

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "project"
    assert main(["init", str(folder)]) == 0
    return folder


def python(project, *arguments):
    import os

    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240, env=environment)


def test_its_scenario_runs_with_its_strategy_and_is_what_its_schema_says(project, tiny_base, reviews):
    import json

    import jsonschema
    import yaml

    scenario = yaml.safe_load((project / "scenario.yaml").read_text())
    jsonschema.validate(scenario, json.loads((project / "scenario.schema.json").read_text()))
    assert main(["check", str(project / "scenario.yaml"), "--set", "strategy={use: ffa_lora}"]) == 0
    smaller = [f"model.base={tiny_base}", f"data.files={{train: '{reviews}'}}", "data.partition={kind: iid}"]
    sets = [part for s in [*smaller, "rounds=1", "privacy.delta=1.0e-3"] for part in ("--set", s)]
    done = python(project, "fedlora", "simulate", "scenario.yaml", "--out", "runs/first", *sets)
    assert done.returncode == 0, done.stderr
    assert Run.open(project / "runs" / "first").summary["strategy"] == "trimmed_mean:TrimmedMean"


def test_its_own_test_passes(project):
    done = python(project, "pytest", "-q", "test_trimmed_mean.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_folder_with_something_in_it_is_left_alone(project, capsys):
    assert main(["init", str(project)]) == 2
    assert "is there already" in capsys.readouterr().err
