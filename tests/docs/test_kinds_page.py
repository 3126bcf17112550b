"""The table of docs/kinds.md, held to the kinds."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedlora import plugins, scenario
from fedlora.kinds.householder import frame
from fedlora.listing import MINILM
from fedlora.tasks.located import configuration

TEXT = (Path(__file__).parents[2] / "docs" / "kinds.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in TEXT.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip().strip("`") for cell in line.strip("|").split("|")]]
}


def numbers(name, r):
    return f"{MINILM * plugins.find('kinds', name)(r, float(r), ()).numbers(384, 384):,}"


def test_the_table_says_of_each_kind_what_is_so():
    assert sorted(ROWS) == plugins.names("kinds")
    for name, (sends, _, at_8, other, exact, noise, paper) in ROWS.items():
        kind = plugins.find("kinds", name)(8, 8.0, ())
        assert (sends.replace("`", ""), noise) == (kind.facts.sends, kind.facts.noise)
        assert at_8 == numbers(name, 8), name
        ((r, told),) = re.findall(r"^r (\d+): ([\d,]+)$", other)
        assert told == numbers(name, int(r)), name
        assert (exact == "yes") == kind.exact([role for role in kind.parts if kind.trains(role)])
        assert plugins.source("kinds", name) in paper


def test_minilm_is_as_large_as_the_table_takes_it_to_be():
    held = configuration("minilm")
    assert 2 * held["num_hidden_layers"] == MINILM and held["hidden_size"] == 384


def test_what_it_says_of_strategies_is_so():
    from fedlora import suitability

    takes = {
        name: [k for k in plugins.names("kinds") if not suitability.refuses(plugins.find("strategies", name), k)]
        for name in plugins.names("strategies")
    }
    assert {name for name, kinds in takes.items() if len(kinds) > 2} == {
        "alone",
        "fedavg_lora",
        "fedex_lora",
        "ffa_lora",
        "spectral_filter",
    }
    assert takes["fed_sb"] == ["core", "lora_xs"] and takes["flexlora"] == takes["rolora"] == ["lora"]


def test_the_settings_on_the_page_are_real():
    told = {"name": "x", "data": {"dataset": "tweets"}, "clients": {"total": 20}, "strategy": {"use": "ffa_lora"}}
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S):
        scenario.parse(yaml.safe_dump({**told, "rounds": 1, **yaml.safe_load(block)}))


def off_by(change, start, ways=20, clients=4):
    """How far the change of averaged tensors is from the average change: the median over random federations."""
    found = []
    for seed in range(ways):
        rng = np.random.default_rng(seed)
        first = start(rng)
        each = [[t + 0.1 * rng.standard_normal(t.shape) for t in first] for _ in range(clients)]
        mean = sum(change(*tensors) for tensors in each) / clients
        averaged = change(*(sum(tensors) / clients for tensors in zip(*each, strict=True)))
        found.append(np.linalg.norm(averaged - mean) / np.linalg.norm(mean - change(*first)))
    return np.median(found)


def test_kinds_that_are_not_exact_are_as_far_off_as_it_says():
    """A layer of 32 x 32 at rank 4, whose clients move each number by 0.1."""

    def lora(rng):
        return np.zeros((32, 4)), rng.uniform(-(32**-0.5), 32**-0.5, (4, 32))

    def units(rng):
        return [side / np.linalg.norm(side, axis=0) for side in rng.standard_normal((2, 32, 4))]

    def kernel(share):
        def change(b, a):
            made = b @ a + np.sign(b @ a) * (b @ a) ** 2
            return np.sign(made) * np.maximum(np.abs(made) - np.quantile(np.abs(made), share), 0)

        return change

    def reflected(u, v, d):
        return (frame(u) * d) @ frame(v).T

    told = [
        off_by(lambda b, a: b @ a, lora),
        off_by(reflected, lambda rng: [*units(rng), np.zeros(4)]),
        off_by(kernel(0.5), lora),
        off_by(kernel(0.9), lora),
    ]
    (said,) = re.findall(r"^\| off by \| (.*) \|$", TEXT, re.M)
    assert [float(figure) for figure in said.split(" | ")] == pytest.approx(told, abs=0.005)


def test_the_default_of_peft_lets_as_much_noise_through_as_it_says():
    (told,) = re.findall(r"about (\d+) times\s+the noise of `lora`", TEXT)
    peft, lora = (plugins.find("kinds", name)(8, 8.0, ()).gain(384, 384) for name in ("peft", "lora"))
    assert round(peft / lora) == int(told)
