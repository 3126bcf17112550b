"""The tutorial of docs/strategies.md, followed to the letter in a folder outside of the repository."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from fedlora import plugins, scenario

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "strategies.md").read_text()
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', TEXT, re.S))


def test_the_tutorial_works_as_it_is_written(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    commands = re.findall(r"^\$ (.*)$", TEXT, re.M)
    assert [c.split()[0] for c in commands] == ["python", "fedlora", "fedlora"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]]
        if command.startswith("fedlora"):
            words[1:1] = ["-m", "fedlora"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "run" / "summary.json").exists()


def test_its_strategy_is_no_longer_than_fifteen_lines():
    tree = ast.parse(FILES["mine.py"])
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = FILES["mine.py"].splitlines()[cls.decorator_list[0].lineno - 1 : cls.end_lineno]
    assert len([line for line in lines if line.strip()]) <= 15


def test_the_page_says_of_each_strategy_what_is_so():
    table = {
        row[0].strip("` "): row
        for row in (
            line.strip("|").split("|") for line in TEXT.splitlines() if "| `" in line[:3] and "arxiv.org" in line
        )
    }
    for name in plugins.names("strategies"):
        cls, cells = plugins.find("strategies", name), [cell.strip() for cell in table[name]]
        assert (cells[4] == "yes") == cls.facts.exact, name
        assert (cells[5] == "yes") == cls.linear, name
        assert (cells[6] == "unequal") == cls.unequal_ranks, name
        assert plugins.source("strategies", name) in cells[7], name


def test_the_settings_on_the_page_are_real():
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S):
        for line in filter(str.strip, block.splitlines()):
            text = "{name: x, data: {dataset: tweets}, clients: {total: 20}, strategy: {use: flora}, rounds: 1}"
            ((key, value),) = yaml.safe_load(line).items()
            base = {**yaml.safe_load(text), key: value}
            scenario.parse(yaml.safe_dump(base))
