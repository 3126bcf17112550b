"""Which person a row is of: kept together by every partition and every split, by number, and told by row."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedlora.data import persons, reading
from fedlora.data.cells import Taught
from fedlora.data.partitions import split as by_row
from fedlora.errors import SettingError
from fedlora.scenario import Data, Files, Partition
from tests.data.test_partitions import KINDS, OWNERS, TARGETS

APART = [how for how in KINDS if how["kind"] != "natural"]


def parts(how, of_rows, clients=3, seed=0, owners=OWNERS):
    made = TypeAdapter(Partition).validate_python(how)
    return persons.split(made, TARGETS, owners, of_rows, clients, seed)


@pytest.mark.parametrize("how", APART, ids=str)
@given(st.lists(st.integers(0, 39), min_size=100, max_size=100), st.integers(0, 2**63 - 1))
@settings(max_examples=8, deadline=None)
def test_every_kind_gives_a_person_to_one_client(how, names, seed):
    of_rows = persons.numbered([str(name) for name in names])
    try:
        made = parts(how, of_rows, seed=seed)
    except SettingError:
        return  # too few persons of a label
    whose = [set(of_rows[part].tolist()) for part in made]
    assert all(whose) and sum(map(len, whose)) == len(set.union(*whose))
    assert all(len(part) == np.isin(of_rows, of_rows[part]).sum() for part in made)  # with all of their rows


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_persons_of_one_row_each_are_split_as_rows_are(how):
    made = TypeAdapter(Partition).validate_python(how)
    for one, other in zip(parts(how, np.arange(100)), by_row(made, TARGETS, OWNERS, 3, 0), strict=True):
        assert np.array_equal(one, other)


def test_numbers_go_by_where_a_person_first_occurs():
    assert persons.numbered(["Bo", "Al", "Bo", "Cy"]).tolist() == [0, 1, 0, 2]


def test_a_person_counts_by_its_commonest_label():
    found = persons._commonest(np.array([1, 1, 0, 2, 0, 2]), np.array([0, 0, 0, 1, 1, 2]))
    assert found.tolist() == [1, 0, 2]


def test_what_cannot_be_split_by_person_is_a_line():
    with pytest.raises(SettingError, match="3 clients, and only 2 persons"):
        parts({"kind": "iid"}, np.arange(100) % 2)
    natural = {"kind": "natural", "column": "site"}
    assert [len(part) for part in parts(natural, np.arange(100) % 3)] == [34, 33, 33]
    with pytest.raises(SettingError, match="a person has rows of two values of 'site'"):
        parts(natural, np.arange(100) % 2)


@given(st.lists(st.integers(0, 9), min_size=20, max_size=20), st.sampled_from([0.1, 0.3, 0.5]))
@settings(max_examples=20, deadline=None)
def test_a_client_holds_persons_out_with_all_of_their_rows(names, share):
    of_rows = persons.numbered([str(name) for name in names])
    halves = np.arange(20)[of_rows % 2 == 0], np.arange(20)[of_rows % 2 == 1]
    if any(len(np.unique(of_rows[half])) < 2 for half in halves):
        return
    trained, held = persons.keep_back(share, halves, of_rows, 5)
    for half, one, other in zip(halves, trained, held, strict=True):
        assert not set(of_rows[one]) & set(of_rows[other]) and len(one) and len(other)
        assert sorted([*one, *other]) == sorted(half)


def rows_of(tmp_path, test=None, **columns):
    """The scenario's data, of a jsonl of these columns."""
    for name, told in (("train", columns), *(() if test is None else (("test", test),))):
        lines = [dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = {"train": str(tmp_path / "train.jsonl"), "text": "text", "label": "label"}
    return Data(files=files | ({} if test is None else {"test": str(tmp_path / "test.jsonl")}), test_share=0.3)


TEXTS = [f"text {i % 25}" for i in range(60)]  # some stand several times, with several persons
LABELS = ["no" if i % 2 else "yes" for i in range(60)]


def test_no_person_is_in_training_and_in_test_rows(tmp_path):
    who = [f"Ms {i % 20}" for i in range(60)]
    train, test = reading.read(rows_of(tmp_path, text=TEXTS, label=LABELS, p=who), "classification", "p")
    assert {*train.persons} | {*test.persons} == {*map(str.lower, who)} and not {*train.persons} & {*test.persons}
    assert all(len(half.persons) == 3 * len(set(half.persons)) for half in (train, test))


@pytest.mark.parametrize(("wards", "counted"), [(1, "1 person"), (2, "2 persons")])
def test_persons_of_too_many_rows_each_leave_no_test_row_and_it_is_said_why(tmp_path, wards, counted):
    held = rows_of(tmp_path, text=TEXTS, label=LABELS, ward=[f"w{i // 2 % wards}" for i in range(60)])
    with pytest.raises(SettingError) as caught:
        reading.read(held.model_copy(update={"test_share": 0.2}), "classification", "ward")
    why = f"60 rows are of {counted} by 'ward', each stays whole, and data.test_share asks for 12 rows, and none"
    assert caught.value.key == "privacy.person" and why in caught.value.message
    assert f"of them has fewer than {60 // wards}: " in caught.value.message


def test_a_person_may_be_a_number(tmp_path):
    who = [i % 20 if i % 3 else float(i % 20) for i in range(60)]
    train, test = reading.read(rows_of(tmp_path, text=TEXTS, label=LABELS, p=who), "classification", "p")
    assert len({*train.persons, *test.persons}) == 20


def test_test_rows_need_no_column_of_persons_and_share_none_with_training_rows(tmp_path):
    who = [f"Ms {i % 20}" for i in range(60)]
    told = {"text": ["one", "two"], "label": ["yes", "no"]}
    train, test = reading.read(rows_of(tmp_path, told, text=TEXTS, label=LABELS, p=who), "classification", "p")
    assert len(train.persons) == 60 and test.persons is None
    other = {**told, "p": ["Ms 30", "Ms 31"]}
    assert reading.read(rows_of(tmp_path, other, text=TEXTS, label=LABELS, p=who), "classification", "p")
    both = {**told, "p": ["Ms 3", "Ms 31"]}
    with pytest.raises(SettingError) as caught:
        reading.read(rows_of(tmp_path, both, text=TEXTS, label=LABELS, p=who), "classification", "p")
    assert caught.value.key == "privacy.person" and "is in training and in test rows" in caught.value.message
    assert "Ms" not in caught.value.message


@pytest.mark.parametrize(
    ("cells", "says"),
    [(["Ms 1", None] * 30, "row 2 has no 'p'"), (["Ms 1", " "] * 30, "row 2 has no 'p'"), (None, "no column 'p'")],
)
def test_a_person_that_is_missing_is_told_by_row(tmp_path, cells, says):
    columns = {"text": TEXTS, "label": LABELS} | ({} if cells is None else {"p": cells})
    with pytest.raises(SettingError) as caught:
        reading.read(rows_of(tmp_path, **columns), "classification", "p")
    assert caught.value.key == "privacy.person" and says in caught.value.message
    assert "Ms" not in caught.value.message and "text 1" not in caught.value.message


def test_tweets_have_no_persons():
    with pytest.raises(SettingError, match="tweets have no column of persons"):
        reading.read(Data(dataset="tweets"), "classification", "user")


@pytest.mark.parametrize("other", [" P7", "p7", "P7\u200b", "P7 "])
def test_spellings_of_one_name_are_one_person(tmp_path, other):
    cells = ["P7", other, "P8", "007", "7", "7.0", "caf\u00e9", "cafe\u0301"]
    (file := tmp_path / "rows.csv").write_text("text,label,who\n" + "".join(f"t,a,{cell}\n" for cell in cells))
    files = Files(train=str(file), text="text", label="label")
    found = reading.read_file(files, "train", Taught("class", None, None, {}, person="who")).persons
    assert found[0] == found[1] != found[2]
    assert len({*found[3:6]}) == len({*found[6:]}) == 1 and len({*found}) == 4
