"""Runs that protect persons: the same bits where each has one row, the same epsilon, and no name anywhere."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora import prepare
from fedlora.client import Rng
from fedlora.privacy import ledger
from fedlora.privacy.accounting import epsilon
from fedlora.scenario import parse
from fedlora.simulation import simulate

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
