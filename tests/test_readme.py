"""The README's words, held to what is there."""

import re
import shlex
from pathlib import Path

import numpy as np

from fedlora import Update, plugins, scenario
from fedlora.cli import _parser, main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_every_fedlora_command_parses_and_names_real_settings():
    commands = re.findall(r"(?:^|\s)(?:\.venv/bin/)?(fedlora (?:simulate|check|list)[^#\n]*)", TEXT, re.M)
    assert len(commands) >= 6
    for command in commands:
        told = _parser().parse_args(shlex.split(command.strip())[1:])
        if getattr(told, "scenario", None) and told.scenario not in ("my.yaml", "scenario.yaml"):
            scenario.load(ROOT / told.scenario if "/" in told.scenario else told.scenario, told.overrides)


def test_as_many_methods_are_published_as_are_listed():
    """`alone` is a baseline."""
    names = {*plugins.names("strategies")} - {"alone"}
    assert len(names) == 18 and "Eighteen published methods run by name" in TEXT


def test_every_command_about_your_own_data_runs(small, tiny_base, tiny_yaml, reviews, capsys):
    """On a tiny model and few rows; audits, sweeps and sites have commands in tests of their own."""
    (small / "my.yaml").write_text(tiny_yaml)
    (small / "roberta-base").symlink_to(tiny_base)
    rows = reviews.read_text().replace("text,label", "question,kind")
    for name in ("a.csv", "b.csv", "my.csv"):
        (small / name).write_text(rows)
    for name in ("runs/a", "runs/b", "runs/noniid-<hash>"):
        assert main(["simulate", "noniid", "--set", "rounds=1", "--out", name]) == 0
    block = re.search(r"^```\n(fedlora check my.yaml.*?)^```", TEXT, re.S | re.M).group(1)
    commands = [shlex.split(line, comments=True)[1:] for line in block.replace("<hash>", "'<hash>'").splitlines()]
    assert len(commands) >= 13
    for command in commands:
        if command[0] not in ("audit", "sweep", "tune", "submit"):
            assert main(command) == 0, f"{command}: {capsys.readouterr()}"


def test_ci_installs_and_tests_as_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    told = re.search(r'pip install -e "\.\[dev\]" && \.venv/bin/pytest( .*)', TEXT).group(1)
    assert '-e ".[dev]"' in ci and f'"$venv/bin/pytest"{told}\n' in ci


def trims(cls):
    """One value at least goes at each end where there are three or more; the loud one is the last."""
    for values, mean in (([0, 9], 4.5), ([1, 2, 900], 2), ([1, 2, 3, 4, 900], 3), ([*range(9), 900], 4.5)):
        updates = [Update(adapter={"w": np.array([x], float)}, weight=1.0, clients=(x,)) for x in values]
        assert cls().aggregate({"w": np.zeros(1)}, updates)["w"] == mean


def test_the_strategy_in_the_readme_works():
    code = re.search(r"```python\n(from dataclasses.*?)```", TEXT, re.S).group(1)
    assert len([line for line in code.split("@dataclass")[1].splitlines() if line.strip()]) <= 15
    names: dict = {"__name__": "readme"}
    exec(code, names)
    trims(names["TrimmedMean"])


def test_nothing_was_left_to_fill_in():
    for file in [ROOT / "README.md", *(ROOT / "scenarios").glob("*.yaml")]:
        assert not re.search(r"\b(MINUTES|TESTMIN|RESULT\w*|RATIO|BENCH|TIME[IL]?|ACC[I]?)\b", file.read_text()), (
            file
        )
