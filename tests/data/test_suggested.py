"""Columns that may be of persons are suggested, and others are not."""

import pytest

from fedlora import checking, scenario
from fedlora.data import suggested
from fedlora.deploy import checking as sites
from fedlora.scaffold import of_data

ROWS = 60


def column(values):
    return [f"v{i % values}" for i in range(ROWS)]


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("patient_id", 30, True),  # two rows of each
        ("UserId", 50, True),  # 1.2
        ("patient_id", 51, False),  # nearly one
        ("author", 19, False),  # too few
        ("id", 20, True),
        ("product_id", 30, False),
        ("user_age", 30, False),
        ("customer.name", 30, True),
        ("num_users", 30, False),
    ],
)
def test_a_column_is_suggested_by_its_name_and_by_rows_of_a_value(name, values, found):
    assert suggested.persons({name: column(values)}, ()) == [name] * found


def test_a_column_of_many_rows_of_a_value_is_no_person_and_one_that_is_learnt_neither():
    assert suggested.persons({"user": [f"u{i % 20}" for i in range(1001)]}, ()) == []  # 50.05 rows of each
    assert suggested.persons({"user": [f"u{i % 20}" for i in range(1000)]}, ()) == ["user"]
    assert suggested.persons({"author": column(30)}, ("author",)) == []
    assert suggested.persons({"patient": [["a"]] * ROWS}, ()) == []


def test_spellings_of_a_name_are_one_value():
    twice = [f"{'P' if i % 2 else 'p'}{i // 2}" for i in range(ROWS)]
    assert suggested.persons({"patient": twice}, ()) == ["patient"]
    assert suggested.said("patient", twice).startswith("column 'patient' has 30 values in 60 rows: if each value")


@pytest.fixture
def table(tmp_path):
    file, patients = tmp_path / "notes.csv", column(30)
    rows = [f"note {i} of a ward,{'ab'[i % 2]},{patients[i]}" for i in range(ROWS)]
    file.write_text("\n".join(["text,label,patient_id", *rows, ""]))
    return file


def test_check_says_it_where_examples_are_protected_and_persons_are_not(table):
    said = suggested.sentence("patient_id", 30, ROWS)

    def notes(*overrides):
        told = ["data.partition={kind: iid}", f"data={{files: {{train: {table}}}}}", *overrides]
        return checking.check(scenario.load("smoke", ["clients.batch_size=2", *told])).notes

    assert said in notes()
    assert said not in notes("privacy.person=patient_id")
    assert said not in notes("privacy=null", "clients.use=sgd")


def test_a_site_is_told_and_init_writes_it_into_the_scenario(table, tmp_path):
    said = suggested.sentence("patient_id", 30, ROWS)
    file = tmp_path / "site.yaml"
    told = f"name: ward\nclient: 0\nstate: {tmp_path / 'state'}\ndata: {{train: {table}, labels: [a, b]}}\n"
    for privacy, there in (
        ("max_epsilon: 1, delta: 1.0e-5", True),
        ("max_epsilon: 1, delta: 1.0e-5, person: patient_id", False),
    ):
        file.write_text(f"{told}privacy: {{{privacy}}}\n")
        assert (said in sites.check(file).notes) is there
    assert said in of_data(tmp_path / "mine", table, None, None)
    assert '# Rows of one "patient_id" may be' in (tmp_path / "mine" / "scenario.yaml").read_text()
