"""docs/compression.md, held to the compressors."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedlora import plugins
from fedlora.compressors.contract import compress, load
from fedlora.scenario.checks import validate
from fedlora.traffic import statistic_bytes

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "compression.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.S | re.M)


def test_the_table_says_of_each_compressor_what_is_so():
    table = TEXT.split("| compressor | goes by |")[1].split("\n\n")[0]
    rows = {cells[1].strip(" `"): cells[2:] for line in table.splitlines()[2:] for cells in [line.split("|")]}
    assert sorted(rows) == plugins.names("compressors")
    for name, cells in rows.items():
        cls = plugins.find("compressors", name)
        assert set(re.findall(r"`(\w+)`", cells[0])) == set(cls.takes)
        assert ("nothing" in cells[0]) is not cls.needs
        assert re.findall(r"https://[^)]+", cells[3])[0] in sys.modules[cls.__module__].__doc__


def test_the_settings_on_the_page_are_real():
    first, second = (yaml.safe_load(block) for block in blocks("yaml"))
    more = {"name": "x", "data": {"dataset": "tweets"}, "clients": {"total": 20, "use": "dp_sgd"}}
    assert validate({**more, "privacy": {"epsilon": 6}, **first})[1] == []
    made, problems = validate({**more, **second})
    assert problems == [] and made.statistics.epsilon == 1


def test_the_compressor_on_the_page_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    weights = {
        "a": np.eye(16, 48, dtype=np.float32),
        "b": np.eye(8, dtype=np.float32),
        "c": np.ones((1, 1), np.float32),
    }
    cuts = compress(load("mine:Mine", {}), weights, {})
    assert {name: cut.rank for name, cut in cuts.items()} == {"a": 8, "b": 3, "c": None}


def test_the_benchmark_on_the_page_prints_both_tables(tiny, tmp_path, capsys):
    commands = re.findall("^python benchmarks/compression.py.*", TEXT, re.M)
    made = spec_from_file_location("compression", ROOT / "benchmarks" / "compression.py")
    made.loader.exec_module(module := module_from_spec(made))
    for name in ("train", "test", "films"):
        lines = [f"the {word} film was {end}\t{end}" for word in ("first", "last") for end in ("good", "bad")] * 15
        (tmp_path / f"{name}.tsv").write_text(
            "\n".join([f"{'sentence' if name == 'films' else 'text'}\tlabel", *lines])
        )
    for command in commands:
        told = [str(tmp_path / word) if word.endswith(".tsv") else word for word in command.split()[2:]]
        small = f"--base {tiny().model.base} --block 1 --rounds 1 --rate 0.5 --statistics gram"
        module.main([*told, *small.split()])
        states, accuracies = capsys.readouterr().out.split("| base | accuracy |")
        assert states.count("\n| lord |") == 4 + ("--public" in told) and "| afm | gram, epsilon 6 |" in states
        assert len(accuracies.split()) == (1 if "--states-alone" in told else 5 * 9 + 1)
    assert len(commands) == 2


def test_the_bytes_of_a_statistic_are_those_of_the_page():
    (inputs, width, others, more, gram, mean) = map(
        lambda told: int(told.replace(",", "")),
        re.findall(
            r"(\d+) inputs of (\d+) and (\d+) of ([\d,]+), so a gram is (\d+) MB a client, once, and a "
            r"mean (\d+) kB",
            TEXT,
        )[0],
    )
    sizes = [width] * inputs + [more] * others
    square = {str(i): (d, d) for i, d in enumerate(sizes)}
    flat = {str(i): (d,) for i, d in enumerate(sizes)}
    assert round(statistic_bytes(square, None) / 1e6) == gram == round(sum(2 * d * (d + 1) for d in sizes) / 1e6)
    assert statistic_bytes(flat, None) / 1e3 == pytest.approx(mean, rel=0.1)
