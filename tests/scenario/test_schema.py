"""The schema accepts what fedlora reads, and refuses what it refuses."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.scenario import parse
from fedlora.scenario.schema import schema

SCENARIOS = sorted((Path(__file__).parents[2] / "scenarios").glob("**/*.yaml"))
SCENARIOS = [file for file in SCENARIOS if "sweeps" not in file.parts]
GOOD = {
    "name": "x",
    "data": {"dataset": "tweets"},
    "clients": {"total": 3},
    "strategy": {"use": "a.b:C"},
    "rounds": 1,
}


@pytest.fixture(scope="module")
def check():
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_shipped_scenarios_are_valid(check, file):
    check.validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"round": 1},
        {"strategy": {"use": "ffa_lro"}},
        {"clients": {"total": 3, "lr": 0}},
        {"data": {"dataset": "tweets", "partition": {"kind": "dirichlet"}}},
        {"privacy": {"epsilon": 1, "delta": 1}},
    ],
)
def test_slips_are_refused(check, change):
    assert check.is_valid(GOOD) and not check.is_valid({**GOOD, **change})


@pytest.mark.parametrize(
    "told, good",
    [
        ("adamw", True),
        ("RMSprop", True),
        ({"kind": "adamw", "betas": [0.9, 0.99]}, True),
        ({"kind": "sgd", "momentum": 0.9, "state": "kept"}, True),
        ({"kind": "RMSprop", "alpha": 0.9}, True),
        (None, True),
        ({"kind": "adamw", "momentum": 0.9}, False),
        ({"kind": "sgd", "momentum": 1.0}, False),
        ({"betas": [0.9, 0.99]}, False),
        (3, False),
    ],
)
def test_an_optimiser_is_a_word_or_a_section(check, told, good):
    given = {**GOOD, "clients": {"total": 3, "optimizer": told}}
    assert check.is_valid(given) is good
    if good:
        parse(yaml.safe_dump(given))
    else:
        with pytest.raises(UserError):
            parse(yaml.safe_dump(given))


def test_keys_carry_the_comments_beside_them():
    made = schema()
    assert made["$defs"]["Data"]["properties"]["max_length"]["description"] == "tokens an example is cut to"
    assert made["$defs"]["Clients"]["description"] == "How many clients there are and how each trains."
    told = [
        key for section in made["$defs"].values() for key in section["properties"].values() if "description" in key
    ]
    assert len(told) > 25


def test_the_command_prints_it(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "fedlora scenario"
