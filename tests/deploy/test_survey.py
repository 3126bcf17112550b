"""A survey: what a site counts, adds as noise and pays, and what a server makes of the answers."""

import json
import math
import shutil
from collections import Counter
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import wire
from fedlora.data.rows import Rows
from fedlora.deploy import admission, survey, surveyed
from fedlora.deploy.account import Account
from fedlora.deploy.backup import backup
from fedlora.deploy.node import Node
from fedlora.deploy.restoring import restore
from fedlora.deploy.site import Accept, Surveyed, load
from fedlora.deploy.state import State
from fedlora.errors import Refusal, UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Own
from tests.deploy.federation import LocalGrid

ROWS = [("a b c", "ham"), ("w " * 40, "spam"), ("w " * 600, "spam"), ("", "ham"), ("x", "other")] * 40
SITE = """
name: {name}
client: 1
data: {{train: {rows}, labels: [ham, spam]}}
state: {state}
privacy: {{max_epsilon: 8, delta: 1.0e-3}}
survey: {{epsilon: 0.5, floor: 10}}
"""


@pytest.fixture
def site(tmp_path):
    """Makes a site's file, with its rows."""

    def make(name="ward", rows=ROWS, head="text,label", **changes):
        table = tmp_path / f"{name}.csv"
        table.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
        text = SITE.format(name=name, rows=table, state=tmp_path / f"{name}-state")
        for old, new in changes.items():
            text = text.replace(f"{old}:", f"{new}\n{old}:") if new else text.replace(f"{old}:", f"# {old}:")
        (file := tmp_path / f"{name}.yaml").write_text(text)
        return file

    return make


def opened(file):
    made = load(file)
    (state := State(made.folder)).folder.mkdir(exist_ok=True)
    return made, Account(made.folder / "ledger", made.privacy), state


def ask(node, **words):
    told = {"run": "survey-1", "version": version("fedlora"), "signature": None, **words}
    return wire.unpack_words(node.answer(f"query.{wire.SURVEY}", wire.pack_words(told), 0))


def test_each_row_adds_one_to_its_label_and_one_to_its_length(site):
    counted = surveyed.count(load(site()))
    assert list(counted.cells / 2**20) == [80, 80, 80, 0, 0, 40, 0, 0, 0, 40]  # "other" is none of its labels


def test_the_account_pays_once_and_other_rows_are_another_answer(site):
    made, account, state = opened(site())
    made = made.model_copy(update={"accept": Accept(submitters=("one",))})  # who signs a name
    name = "survey-1"
    first = surveyed.answer(made, account, state, name)
    spent = account.epsilon
    assert 0.48 < spent <= 0.5
    assert surveyed.answer(made, account, state, name) == first and account.epsilon == spent
    (line,) = ledger.read(made.folder / "ledger" / "privacy.jsonl")
    assert line["sample_rate"] == 1 and line["steps"] == 1 and line["clip_norm"] == math.sqrt(2)
    (event,) = account.ledger.events[Own()]
    assert first["noise"] == pytest.approx(event.noise_multiplier * math.sqrt(2))
    assert epsilon([event], 1e-3) == spent
    site(rows=[*ROWS, ("a b c", "ham")])
    with pytest.raises(Refusal, match="answered this survey over other rows"):  # a signature is good once
        surveyed.answer(made, account, state, name)
    assert account.epsilon == spent
    other = surveyed.answer(made, account, state, "survey-2")
    assert 0.5 < account.epsilon < 1.0
    assert [first[what] for what in ("counts", "lengths")] != [
        other[what] for what in ("counts", "lengths")
    ]  # new


def test_rows_are_read_once_while_they_are_as_they_were(site, monkeypatch):
    seen, count = [], surveyed.count
    monkeypatch.setattr(surveyed, "count", lambda made: seen.append(made) or count(made))
    counts, made = surveyed.Counts(), load(site())
    first = counts.of(made)
    assert counts.of(made) is first and len(seen) == 1
    site(rows=[*ROWS, ("a b c", "ham")])
    assert counts.of(made).cells[0] == first.cells[0] + 2**20 and len(seen) == 2
    counts.of(made.model_copy(update={"client": 2}))  # another site file
    assert len(seen) == 3


def test_noise_is_what_is_said_and_small_counts_are_not_told(site, monkeypatch):
    made, account, state = opened(site())
    noise = []
    for turn in range(40):
        monkeypatch.setattr(state, "key", lambda turn=turn: bytes([turn]) * 32)
        told = surveyed.answer(replace_cap(made), account, state, f"survey-{turn}")
        cells = [*told["counts"], *told["lengths"]]
        assert all(cell is None or cell >= 10 for cell in cells)
        true = [80, 80, 80, 0, 0, 40, 0, 0, 0, 40]
        noise += [cell - t for cell, t in zip(cells, true, strict=True) if t >= 80 and cell is not None]
    assert np.std(noise) == pytest.approx(told["noise"], rel=0.2) and abs(np.mean(noise)) < told["noise"] / 3


def replace_cap(site):
    return site.model_copy(update={"privacy": site.privacy.model_copy(update={"max_epsilon": 1e6})})


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.sampled_from("abc"), max_size=4)), min_size=1, max_size=12),
    st.integers(0, 3),
    st.booleans(),
)
def test_one_row_or_person_more_is_at_most_the_root_of_two(rows, gone, persons):
    """Whatever labels rows have, and however many rows a person has."""

    def cells(kept):
        texts = ["w " * (9 * n) for _, n in ((p, len(x) + p) for p, x in kept)]
        held = Rows(texts, [tuple(x) for _, x in kept], None, [str(p) for p, _ in kept] if persons else None)
        return surveyed.cells_of(held, ["a", "b", "c"])

    if not persons:
        gone = gone % len(rows)
        fewer = rows[:gone] + rows[gone + 1 :]
    else:
        fewer = [row for row in rows if row[0] != gone]
    gap = (cells(rows) - cells(fewer)) / 2**20 if fewer else cells(rows) / 2**20
    assert (gap >= -1e-12).all() and np.linalg.norm(gap) <= surveyed.NORM
    assert gap[:3].sum() <= 1 and gap[3:].sum() <= 1


def test_persons_count_whole_whatever_rows_they_have(site):
    rows = [("a", "ham", "p"), ("b", "spam", "p"), ("c", "ham", "q")]
    file = site(rows=rows, head="text,label,who")
    file.write_text(file.read_text().replace("delta: 1.0e-3}", "delta: 1.0e-3, person: who}"))
    counted = surveyed.count(load(file))
    assert counted.cells[:3] / 2**20 == pytest.approx([1.5, 0.5, 2.0], abs=1e-5)
    assert surveyed.answer(*opened(file), "survey-1")["unit"] == "person"


def test_a_server_that_was_not_signed_for_or_has_another_version_learns_nothing(site, tmp_path):
    plain = site("plain", survey="")
    signed = site(
        "signed",
        survey="accept: {submitters: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwN"
        "Dg8QERITFBUWFxgZGhscHR4f me]}",
    )
    for file, words, why in (
        (plain, {}, "its site file has no section survey"),
        (signed, {}, "nobody whom it knows has signed this survey: ask by fedlora survey --key FILE"),
        (site(), {"version": "0.0.1"}, "install one version on both sides"),
        (site(), {"run": "../../x"}, "no name that could be a folder's"),
    ):
        node = Node(file, tmp_path / "app")
        told = ask(node, **words)
        assert why in told["refused"] and set(told) <= {"refused", "name", "client"}
        node.close()
        assert not (load(file).folder / "ledger" / "privacy.jsonl").exists()


def test_a_survey_beyond_the_budget_or_of_rows_that_cannot_be_read_is_refused(site, tmp_path):
    file = site()
    file.write_text(file.read_text().replace("max_epsilon: 8", "max_epsilon: 0.6"))
    _, account, _ = opened(file)
    account.spend("wards-1", 1, 0, surveyed.event(Surveyed(epsilon=0.4), account.terms))
    del account  # and with it the lock
    node = Node(file, tmp_path / "app")
    assert "the epsilon that the site allows" in ask(node)["refused"]
    node.close()
    file.write_text(file.read_text().replace("max_epsilon: 0.6", "max_epsilon: 8"))
    (tmp_path / "ward.csv").write_text("nothing\nsecret\n")
    node = Node(file, tmp_path / "app")
    told = ask(node)
    assert told["refused"] == "its rows or its ledger cannot be read: its log says why"
    line = json.loads((load(file).folder / "history.jsonl").read_text().splitlines()[-1])
    assert (line["what"], line["outcome"]) == ("survey", "refused") and "column" in line["why"]


def lost(made, tmp_path, **how):
    shutil.rmtree(made.folder)
    return restore(tmp_path / "ward.yaml", tmp_path / "kept", **how)


def test_a_restore_asks_for_surveys_and_pays_for_them_as_the_dearest(site, tmp_path):
    made, account, state = opened(site())
    surveyed.answer(made, account, state, "survey-1")
    del account
    backup(tmp_path / "ward.yaml", tmp_path / "kept")
    for told in ({"lost": ["none"]}, {"lost": ["none"], "surveys": -1}):
        with pytest.raises(UserError, match="--surveys"):
            lost(made, tmp_path, **told)
    assert lost(made, tmp_path, lost=["none"], surveys=0).after == pytest.approx(0.5, abs=0.02)
    done = lost(made, tmp_path, lost=["none"], surveys=3)
    (first, *more) = ledger.replay(made.folder / "ledger" / "privacy.jsonl")[Own()]
    assert first.steps + sum(event.steps for event in more) == 4 and done.after > 0.9
    site(survey="")  # the section went, and its price does not
    assert lost(made, tmp_path, lost=["none"], surveys=3).after == done.after


def test_a_section_without_a_budget_is_refused(site):
    file = site()
    file.write_text(file.read_text().replace("privacy:", "# privacy:"))
    with pytest.raises(UserError, match="survey: is paid for from a budget: set privacy too"):
        load(file)


def test_all_sites_that_are_connected_are_asked(site, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "_SETTLED", 0.2)
    files = [site("ward"), site("clinic"), site("shy", survey="")]
    grid = LocalGrid({n: Node(file, tmp_path / "app") for n, file in enumerate(files, 1)})
    told = survey.gather(grid, "survey-1", 20.0, None)
    assert [one.name for one in told][:2] == ["clinic", "ward"] and told[2].refused is not None
    again = [survey.Answer.read(one.to_json()) for one in told]  # as it travels to who asked
    assert again == told
    text = "\n".join(survey.lines(told))
    assert "told nothing: it answers no survey" in text and "clinic" in text and "below the floor" in text
    assert Counter(text.split())["spam"] == 1  # a row for both sites


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": "ham"},
        {"labels": ["ham"], "counts": [1, 2]},
        {"counts": [-1, 2]},
        {"counts": [1.5, 2]},
        {"lengths": [1]},
        {"unit": "row"},
        {"noise": float("nan")},
        {"epsilon": 0},
        {"client": -1},
    ],
)
def test_an_answer_that_is_none_is_one_line(site, changes):
    whole = surveyed.answer(*opened(site()), "survey-1")
    assert survey.Answer.read(whole).refused is None
    with pytest.raises(wire.ContractError):
        survey.Answer.read({**whole, **changes})


def test_what_a_site_calls_itself_cannot_move_a_terminal(site):
    whole = surveyed.answer(*opened(site()), "survey-1")
    told = survey.Answer.read({**whole, "name": "a\x1b[2J" * 99, "labels": ["\x1b", "b"]})
    assert "\x1b" not in "\n".join(survey.lines([told])) and len(told.name) <= 64


def test_the_owner_is_told_what_a_survey_may_learn(site):
    assert "costs epsilon 0.5, and again where the rows have changed" in surveyed.rule(load(site()))
    assert "may learn no counts" in surveyed.rule(load(site("plain", survey="")))
    with pytest.raises(Refusal):
        admission.named({"version": version("fedlora"), "run": 7})
