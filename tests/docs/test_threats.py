"""The threat table has a row for each who looks and each that is looked for, and the tests it names are there."""

import ast
import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "privacy.md").read_text()
SECTION = PAGE.partition("the threat table\n")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith("| who | ")
]
TESTS = dict(re.findall(r"^(\d+)\. `(.+)`$", SECTION, re.M))

WHO = (
    "another client",
    "a server that follows the protocol and looks",
    "a server that lies",
    "a network observer",
    "a submitter",
    "who reads a site's disk later",
    "users of the model",
)
WHAT = (
    "an example",
    "how many examples a client holds",
    "the label set",
    "presence in a round",
    "an update",
)


def test_everybody_who_looks_and_everything_looked_for_has_one_row():
    assert [tuple(row[:2]) for row in ROWS] == list(product(WHO, WHAT))
    assert all(len(row) == 5 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}, {row[1]}")
def test_what_is_promised_names_a_mechanism_and_a_test(row):
    """A cell that starts with "nothing is promised" and names no more needs none."""
    _, _, holds, mechanism, numbers = row
    assert holds
    promises = not holds.startswith("nothing is promised")
    assert bool(mechanism and numbers) or not promises
    assert all(number in TESTS for number in numbers.split())


def test_the_tests_are_numbered_as_a_list_is_and_each_is_needed():
    assert [int(number) for number in TESTS] == list(range(1, len(TESTS) + 1))
    assert {number for row in ROWS for number in row[4].split()} == set(TESTS)
    assert len(set(TESTS.values())) == len(TESTS)


@pytest.mark.parametrize("name", TESTS.values())
def test_every_test_that_is_named_exists(name):
    file, _, function = name.partition("::")
    made = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in made.body if isinstance(node, ast.FunctionDef)}
