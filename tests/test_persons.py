"""Runs that protect persons: the same bits where each has one row, the same epsilon, and no name anywhere."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora import prepare
from fedlora.audit import audit
from fedlora.baselines import derive
from fedlora.client import Rng
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import SettingError, UserError
from fedlora.planning import plan
from fedlora.privacy import ledger
from fedlora.privacy.accounting import epsilon
from fedlora.reports import single
from fedlora.reports.planned import plan_lines
from fedlora.scenario import parse
from fedlora.simulation import simulate


class ByRow(DPSGD):
    """A client that knows no persons."""

    persons = False


NAMES = [f"Mrs. Smith-{i}" for i in range(50)]


@pytest.fixture(scope="module")
def notes(reviews, tmp_path_factory):
    """The reviews with columns `patient`, of 50 who have 4 rows each, and `one`, of whom each has one row."""
    folder = tmp_path_factory.mktemp("notes")
    head, *rows = reviews.read_text().splitlines()
    told = [f"{row},{NAMES[i * 7 % 50]},Mr. Smith-{i}" for i, row in enumerate(rows[:200])]
    (folder / "train.csv").write_text("\n".join([f"{head},patient,one", *told]) + "\n")
    (folder / "test.csv").write_text("\n".join([head, *rows[200:]]) + "\n")
    return folder


@pytest.fixture(scope="module")
def asked(tiny_yaml, notes):
    """Makes tiny scenarios over the notes."""

    def make(*overrides):
        files = [f"data.files.train={notes}/train.csv", f"data.files.test={notes}/test.csv"]
        return parse(tiny_yaml, "tiny.yaml", [*files, *overrides])

    return make


def files_of(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def test_a_run_by_person_says_whom_it_protects_and_names_nobody(asked, tmp_path, cache):
    """50 persons at 4 clients, 12 or 13 each: epsilon is what a run by row over 12 rows would say."""
    scenario = asked("privacy.person=patient", "privacy.rows_per_person=2", "clients.batch_size=4", "rounds=1")
    run = simulate(scenario, out=tmp_path / "run")
    spent = ledger.replay(tmp_path / "run" / "privacy.jsonl")
    data = prepare.prepare(scenario).data
    for client, events in spent.items():
        held = len(set(data.partition(client).persons))
        assert held == data.units(client) and len(data.partition(client)) == 4 * held
        (event,) = events
        assert event == replace(event, sample_rate=4 / held, steps=2, clip_norm=1.0, bands=1)
    worst = max(epsilon(events, 1e-3) for events in spent.values())
    assert run.summary["epsilon"] == worst == pytest.approx(8, rel=0.01)
    assert run.summary["privacy_unit"] == "person" and run.summary["person"] == "patient"
    whom = (
        "for each person (all rows with the same patient), neighbouring datasets differ in all rows of one person"
    )
    assert whom in run.summary["privacy"] and "Poisson sampling of persons" in run.summary["privacy"]
    assert whom in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert whom in "\n".join(ledger.statements(tmp_path / "run"))
    assert [c["num_persons"] for c in run.partitions["clients"]] == [data.units(c) for c in range(4)]
    page = single.html(run)
    assert "each of 12 to 13 persons; 4 take part" in page and "on the examples of each client" not in page
    for line in ledger.read(tmp_path / "run" / "privacy.jsonl"):
        assert (line["unit"], line["person"]) == ("person", "patient")
    for file in (*files_of(tmp_path / "run"), *files_of(cache / "tokens")):
        assert b"Smith" not in file.read_bytes(), file


def fitted(scenario, client=0, **changes):
    """What a client sends in a round."""
    from fedlora.engine import Worker

    ready = prepare.noised(prepare.prepare(scenario), prepare.known)
    worker = Worker(replace(ready.setup, kept=None))
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    part = worker.dataset.partition(client)
    settings = replace(worker.settings(instruction, part.units, client), **changes)
    rng = Rng(scenario.seed, 1, client)
    worker.task.become(worker.scenario.model.adapter.r, instruction.draw)
    return worker.client.fit(worker.task, instruction.adapter, part, settings, rng)


@pytest.mark.parametrize("clip", ["flat", "per_layer"])
@pytest.mark.parametrize("bands", [None, 2])
def test_where_each_person_has_one_row_the_bits_are_those_of_a_run_by_row(asked, clip, bands):
    told = [f"privacy.clip={clip}", "clients.batch_size=16", *([f"privacy.bands={bands}"] if bands else [])]
    by_row, by_person = (
        fitted(asked(*told)),
        fitted(asked(*told, "privacy.person=one", "privacy.rows_per_person=1")),
    )
    assert by_row.adapter.keys() == by_person.adapter.keys()
    assert all(np.array_equal(tensor, by_person.adapter[name]) for name, tensor in by_row.adapter.items())


def test_micro_batches_tear_nobody(asked):
    """A person's mean is the same whatever passes its rows are in."""
    scenario = asked("privacy.person=patient", "clients.batch_size=8")
    made = [fitted(scenario, micro_batch_size=size).adapter for size in (1, 3, 64)]
    for other in made[1:]:
        for name, tensor in made[0].items():
            np.testing.assert_allclose(other[name], tensor, atol=2e-6)


def test_clients_that_share_passes_train_as_they_do_alone(asked, tmp_path):
    told = ("privacy.person=patient", "clients.batch_size=6", "clients.micro_batch_size=5", "rounds=1")
    made = [simulate(asked(*told, f"engine.fused={n}"), out=tmp_path / str(n)).state_dict() for n in (1, 4)]
    assert all(np.allclose(tensor, made[1][name], atol=2e-6) for name, tensor in made[0].items())


def test_a_plan_counts_persons(asked):
    told = asked("privacy.person=patient", "clients.batch_size=4", "privacy.bands=2", "privacy.delta=0.2")
    made = plan(told).to_json()
    assert (made["unit"], made["person"]) == ("person", "patient")
    assert [(g["num_persons"], g["clients"], g["sample_rate"]) for g in made["groups"]] == [
        (12, 2, 4 / 12),
        (13, 2, 4 / 13),
    ]
    said = "\n".join(plan_lines(made))
    for words in (
        "for each person (all rows with the same patient); noise multiplier",
        "banded noise, b = 2, by the persons that a client holds",
        "differ in all rows of one person",
        "clients by their persons",
        "fewer than 100 persons, the smallest 12",
        "such a delta lets a whole person leak",
        "persons for each of 2 labels",
    ):
        assert words in said
    assert "examples of" not in said.partition("warning")[2]


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (
            ("clients.batch_size=20",),
            "clients.batch_size",
            "a client has 12 persons, and a private batch",
        ),
        (("clients.total=60",), "clients.total", "60 clients, and only 50 persons"),
        (
            ("privacy.bands=4", "clients.batch_size=6"),
            "privacy.bands",
            "a client has 12 persons, and a step",
        ),
        (("clients.use=tests.test_persons:ByRow",), "privacy.person", "protects examples one by one"),
    ],
)
def test_what_persons_do_not_fit_is_a_line(asked, overrides, key, says):
    with pytest.raises(SettingError) as caught:
        prepare.noised(prepare.prepare(asked("privacy.person=patient", *overrides)), prepare.known)
    assert caught.value.key == key and says in caught.value.message


def test_clients_that_draw_their_examples_protect_no_persons(tiny):
    with pytest.raises(UserError, match="clients that draw examples share persons: take another"):
        tiny("privacy.person=site", "data.partition={kind: sampled, examples: 20}")


def test_a_canary_is_a_person(asked, tmp_path):
    told = ("privacy.person=patient", "privacy.epsilon=2", "clients.batch_size=4", "clients.local_steps=1")
    made = audit(asked(*told), out=tmp_path / "audit", canaries=60)
    assert not made.refuted and made.noise.lines()[0].startswith("as stated"), made.lines()
    assert "for each person (all rows with the same patient)" in made.lines()[1]


def test_a_baseline_without_privacy_holds_out_the_same_rows(asked, notes):
    given = asked("privacy.person=patient", "clients.batch_size=4")
    assert derive(given, "pooled").privacy is None
    assert derive(given, "pooled_private").privacy.person == "patient"
    with pytest.raises(UserError, match="pooled would hold out others: name test rows"):
        derive(asked("privacy.person=patient", "data.files.test=null"), "pooled")


def test_a_round_over_other_persons_draws_other_noise(asked):
    """The same rows, of other persons, are another sum: the digest says so, and that of data too."""
    from fedlora.engine import Worker

    made = {}
    for column in ("patient", "one"):
        scenario = asked(f"privacy.person={column}", "clients.batch_size=4", "clients.total=1", "rounds=1")
        ready = prepare.noised(prepare.prepare(scenario), prepare.known)
        worker = Worker(replace(ready.setup, kept=None))
        part = worker.dataset.partition(0)
        made[column] = worker.digests.examples(part), worker.dataset.fingerprint, len(part)
    assert made["patient"][2] == made["one"][2] == 200
    assert made["patient"][0] != made["one"][0] and made["patient"][1] != made["one"][1]
