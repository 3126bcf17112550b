"""Persons at sites: by the column of the site's own file, paid for as persons, and never by name."""

import logging

import pytest

from fedlora.deploy import site as sites_of
from fedlora.deploy.account import Account
from fedlora.deploy.site import Budget
from fedlora.errors import UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event
from tests.deploy.federation import meet, refusal

EVENT = Event(noise_multiplier=2.0, sample_rate=0.1, steps=2, clip_norm=1.0)


@pytest.fixture
def told(reviews, tmp_path):
    """What makes a scenario protect 60 patients, who have 4 rows each."""
    head, *rows = reviews.read_text().splitlines()
    lines = [f"{row},Mrs. Smith-{i * 7 % 60}" for i, row in enumerate(rows)]
    (tmp_path / "notes.csv").write_text("\n".join([f"{head},patient", *lines]) + "\n")
    return (f"data.files.train={tmp_path}/notes.csv", "privacy.person=patient", "clients.batch_size=4")


def test_a_site_counts_and_pays_by_person(told, server, node):
    words, files, train = server(*told)
    text = files[0].read_text()
    assert "person: person" in text and "that its persons may lose" in text
    rows = (files[0].parent / "train.csv").read_text()
    assert "Smith" not in rows and rows.splitlines()[0] == "text,label,person"
    held = {line.rpartition(",")[2] for line in rows.splitlines()[1:]}
    answer = meet(made := node(files[0]), words)
    assert answer["num_examples"] == len(held) == (len(rows.splitlines()) - 1) / 4  # persons: rows are not told
    assert answer["event"]["sample_rate"] == 4 / len(held)
    assert refusal(made, train()) is None
    for folder, person in (("runs/tiny-1", "person"), ("ledger", "person")):
        (line,) = ledger.read(files[0].parent / "state" / folder / "privacy.jsonl")
        assert (line["unit"], line.get("person"), line["steps"]) == ("person", person, 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            (", person: person", ""),
            "names no column of persons (privacy.person), and the scenario protects persons",
        ),
        (("person: person", "person: patient"), "its data or machine do not fit the scenario (privacy.person)"),
    ],
)
def test_a_site_that_cannot_tell_persons_refuses(told, server, node, caplog, change, why):
    words, files, _ = server(*told)
    files[0].write_text(files[0].read_text().replace(*change))
    with caplog.at_level(logging.ERROR):
        assert why in meet(node(files[0]), words)["refused"]
    assert "Smith" not in caplog.text
    if "patient" in change[1]:
        assert f"{files[0]}:9: privacy.person: " in caplog.text and "no column 'patient'" in caplog.text


def test_a_site_that_protects_persons_answers_no_run_by_row(told, server, node):
    words, files, _ = server(*told)
    plain = {**words["scenario"], "privacy": {**words["scenario"]["privacy"], "person": None}}
    answer = meet(node(files[0]), {**words, "scenario": plain})
    assert "it protects persons, and the scenario asks for less" in answer["refused"]


def test_the_column_and_the_most_rows_are_the_sites(tiny):
    most = {"max_epsilon": 8, "delta": 1e-5, "person": "mrn"}
    run = tiny("privacy.person=patient", "privacy.rows_per_person=4")
    for own, asked, found in ((2, 4, 2), (9, 4, 4), (None, 4, 4), (3, "null", 3)):
        given = tiny("privacy.person=patient", f"privacy.rows_per_person={asked}")
        made = Budget(**most, rows_per_person=own).held_to(given).privacy
        assert (made.person, made.rows_per_person) == ("mrn", found)
    whole = tiny("privacy={unit: client, epsilon: 4, example: {epsilon: 8, person: patient}}")
    assert Budget(**most).held_to(whole).person == "mrn" and run.person == "patient"
    assert Budget(**most).held_to(tiny()) == tiny()


def test_an_account_of_rows_is_none_of_persons(tmp_path):
    """What was lost of a row says nothing of a person with ten."""
    terms = {"max_epsilon": 8, "delta": 1e-5}
    Account(tmp_path / "ledger", Budget(**terms)).spend("run-1", 1, 0, EVENT)
    assert Account(tmp_path / "ledger", Budget(**terms)).epsilon > 0
    with pytest.raises(UserError, match="is the account of others than each person"):
        Account(tmp_path / "ledger", Budget(**terms, person="patient"))


def test_a_site_file_says_what_is_wrong_with_it(tmp_path):
    (tmp_path / "site.yaml").write_text(
        "name: a\nclient: 0\ndata: {train: a.csv}\nstate: s\nprivacy: {max_epsilon: 8, delta: 1.0e-5, persn: p}\n"
    )
    with pytest.raises(UserError, match=r"site\.yaml:5: unknown key 'persn' in privacy: did you mean 'person'"):
        sites_of.load(tmp_path / "site.yaml")
