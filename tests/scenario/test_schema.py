"""The schema accepts what fedlora reads, and refuses what it refuses."""

import json
from pathlib import Path
from typing import Annotated

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter

from fedlora.cli import main
from fedlora.deploy.site import Site
from fedlora.errors import UserError
from fedlora.scenario import Scenario, Section, parse
from fedlora.scenario.schema import descriptions, schema, within
from tests.docs.test_words import LONGEST, sentences, slips, words

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


def test_keys_carry_what_their_docstrings_say():
    parts = schema()["$defs"]
    assert parts["Clients"]["description"] == "How many clients there are and how each trains."
    assert parts["Tier"]["properties"]["rank"] == {
        "anyOf": [{"minimum": 1, "type": "integer"}, {"type": "null"}],
        "default": None,
        "title": "Rank",
        "description": "Rank of its adapter. null: `model.adapter.r`. Lower it for weak devices.",
        "examples": [4],
    }
    state = parts["ClientAdamW"]["properties"]["state"]["description"]  # of the class that it extends
    assert state.startswith("Where moments are between rounds.")


SECTIONS = {section.__name__: section for root in (Scenario, Site) for section in within(root)}


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_key_has_a_description_in_plain_sentences(section):
    told = descriptions(section)
    assert told.keys() == section.model_fields.keys(), "write it under Attributes: in the docstring of the class"
    for key, text in told.items():
        text, _, example = text.partition(" Example: ")
        assert text.endswith("."), key
        for sentence in sentences(text):
            assert len(words(sentence)) <= LONGEST, f"{key}: {sentence}"
            assert not slips(sentence), f"{key}: {slips(sentence)}"
        field = section.model_fields[key]
        if example:
            value = yaml.safe_load(example.removesuffix(".").strip("`"))
            TypeAdapter(Annotated[field.annotation, *field.metadata, None]).validate_python(value)


def test_what_no_docstring_says_is_found():
    class Half(Section):
        """A section.

        Attributes:
            one: The first,
                on two lines.
            gone: No key.
        """

        one: int
        two: int

    assert descriptions(Half) == {"one": "The first, on two lines."}


def test_the_command_prints_it(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "fedlora scenario"
