"""A run that is killed at any phase of a round goes on as if it had not been, and never forgets what was spent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ffa_lora", "flexlora", "fedsa_lora", "fedex_lora")  # linear, by SVD, personalised, merging


def matrix(tmp_path, scenario, every, *more):
    """The outcome of `tests.faults.kill`, in a process of its own: it forks, which one with threads should not."""
    file = tmp_path / "scenario.yaml"
    file.write_text(scenario.to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", file, tmp_path / "work", str(every), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print("{strategy:<12} {lines} lines, {changes} states of the disk, {killed} kills".format(**told))
    assert not told["wrong"], "\n".join([*told["wrong"], done.stderr[-4000:]])
    return told


def asked(tiny, use, rounds):
    noise = "privacy={noise_multiplier: 1.0, delta: 1.0e-3}"
    return tiny(
        f"strategy.use={use}", f"rounds={rounds}", noise, "data.client_test_share=0.2", "clients.per_round=3"
    )


@pytest.mark.parametrize(("use", "every"), [("ffa_lora", 5), ("fedsa_lora", 11), ("fedex_lora", 11)])
def test_some_phases(tiny, tmp_path, use, every):
    told = matrix(tmp_path, asked(tiny, use, 2), every)
    assert told["killed"] >= 5


def test_some_phases_with_an_evaluation_under_way(tiny, tmp_path):
    told = asked(tiny, "fedex_lora", 3)
    told = told.model_copy(update={"data": told.data.model_copy(update={"client_test_share": None})})
    assert matrix(tmp_path, told, 11, "beside")["killed"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("use", STRATEGIES)
def test_every_phase(tiny, tmp_path, use):
    told = matrix(tmp_path, asked(tiny, use, 4), 1)
    assert {"loop", "ledger", "checkpoint", "folder", "simulation", "shutil"} == set(told["modules"])
    assert told["killed"] == told["changes"] > 80
