"""The table of docs/kinds.md, held to the kinds."""

import re
from pathlib import Path

import yaml

from fedlora import plugins, scenario
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
