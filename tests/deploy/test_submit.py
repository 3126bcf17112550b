"""What is sent to a SuperLink, and what is checked before."""

import json
import sys
import tomllib

import pytest

from fedlora import scenario as scenarios
from fedlora.deploy import signing
from fedlora.deploy import submit as module
from fedlora.deploy.submit import submit
from fedlora.errors import RoundError, UserError
from fedlora.report.console import Silent

OWN = """
from fedlora.strategies.ffa_lora import FFALoRA


class Mine(FFALoRA):
    pass
"""


def test_the_app_holds_the_scenario_the_code_and_the_signature(tiny, tmp_path, monkeypatch):
    import subprocess

    (tmp_path / "lab_of_mine").mkdir()
    (tmp_path / "lab_of_mine" / "__init__.py").write_text("")
    (tmp_path / "lab_of_mine" / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    scenario = tiny("strategy.use=lab_of_mine.mine:Mine")
    module._make(tmp_path / "app", scenario, "", tmp_path / "key")
    told = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert scenarios.parse(told["config"]["scenario"]).hash == scenario.hash and told["config"]["resume"] == ""
    assert (tmp_path / "app" / "lab_of_mine" / "mine.py").read_text() == OWN
    assert sorted(p.name for p in (tmp_path / "app").iterdir()) == ["lab_of_mine", "pyproject.toml"]
    sent = json.loads(json.dumps(scenario.model_dump()))
    public = (tmp_path / "key.pub").read_text()
    assert signing.signed(told["config"]["signature"], [public], sent, tmp_path / "app")
    sys.modules.pop("lab_of_mine.mine", None)


def test_the_app_of_the_docker_folder_is_the_same_but_for_its_configuration(tiny, tmp_path):
    from pathlib import Path

    module._make(tmp_path / "app", tiny(), "", None)
    sent = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    root = Path(__file__).parents[2]
    there = tomllib.loads((root / "docker" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert sent["components"] == there["components"] and set(sent["config"]) == set(there["config"])
    assert scenarios.load(there["config"]["scenario"]).clients.total == 3


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr's pathspec
def test_flower_builds_the_app_with_all_of_it(tiny, tmp_path):
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    module._make(tmp_path / "app", tiny(), "", None)
    (tmp_path / "fab.zip").write_bytes(build_fab_from_disk(tmp_path / "app"))
    with zipfile.ZipFile(tmp_path / "fab.zip") as fab:
        assert {"pyproject.toml", ".info/CONTENT"} == set(fab.namelist())


def test_a_scenario_that_does_not_fit_is_not_sent(tiny, monkeypatch):
    monkeypatch.setattr(module, "_start", lambda *_: pytest.fail("it was sent"))
    with pytest.raises(UserError, match=r"--set strategy.option=3: .*no option"):
        submit(tiny("strategy.option=3"), "nowhere", display=Silent())


def test_an_unknown_superlink_is_a_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(UserError, match="--superlink nowhere: .*nowhere"):
        submit(tiny(), "nowhere", display=Silent())


def test_a_folder_that_is_not_empty_is_not_written_over(tiny, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="--out"):
        submit(tiny(), "nowhere", out=tmp_path, display=Silent())


def test_a_run_that_ends_without_a_word_says_how_to_go_on(tiny, monkeypatch):
    monkeypatch.setattr(module, "_start", lambda *_: "17")
    monkeypatch.setattr(module, "_status", lambda *_: "finished")
    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", "print('INFO: nothing of ours')"])
    with pytest.raises(RoundError, match=f"--resume tiny-{tiny().hash}-17"):
        submit(tiny(), "nowhere", display=Silent())
