"""Faults while a run goes on, each a real one: it goes on too, or stops by one line and can be gone on with."""

import time

import pytest
from safetensors.numpy import load_file

from fedlora.errors import RoundError, UserError
from fedlora.privacy import ledger
from fedlora.reports.console import Silent
from fedlora.simulation import simulate

FLAKY = "clients.use=tests.engine.faulty:Flaky"


def adapter(run):
    return {n: t.tobytes() for n, t in load_file(run.folder / "adapter" / "adapter_model.safetensors").items()}


class After(Silent):
    """A display that does something after a round."""

    def __init__(self, at, do):
        self.at, self.do = at, do

    def round(self, line):
        if line["round"] == self.at:
            self.do()


@pytest.mark.parametrize("use", ["ffa_lora", "fedex_lora"])
@pytest.mark.parametrize("size", [0, 300, 1500, 4000])
def test_a_full_disk_is_a_line_and_the_run_goes_on_bit_for_bit(tiny, tmp_path, largest_file, size, use):
    """No bytes fit, or a ledger's but not a checkpoint's: each size stops the run at another file."""
    scenario = tiny(f"strategy.use={use}", "rounds=3")
    whole = simulate(scenario, out=tmp_path / "whole")
    with pytest.raises(
        UserError, match="File too large; what was finished is saved: mend that, and go on"
    ) as told:
        simulate(scenario, out=tmp_path / "cut", display=After(1, lambda: largest_file(size)))
    largest_file()
    assert "\n" not in str(told.value)
    done = simulate(scenario, out=tmp_path / "cut", resume=True)
    assert adapter(done) == adapter(whole)
    assert ledger.replay(done.folder / "privacy.jsonl") == ledger.replay(whole.folder / "privacy.jsonl")


def test_a_folder_that_cannot_be_written_is_a_line_before_anything_is_trained(tiny):
    with pytest.raises(UserError, match=r"^/proc/no/run: cannot be written: "):
        simulate(tiny(), out="/proc/no/run")


def test_a_folder_that_can_no_longer_be_written_is_a_line(tiny, tmp_path):
    folder = tmp_path / "run"
    blocked = folder / "checkpoint.new"
    with pytest.raises(UserError, match=r"checkpoint\.new: File exists; what was finished is saved"):
        simulate(tiny("rounds=3"), out=folder, display=After(2, blocked.touch))
    blocked.unlink()
    assert simulate(tiny("rounds=3"), out=folder, resume=True).summary["rounds"] == 3


def test_nothing_depends_on_the_clock(tiny, tmp_path, monkeypatch):
    """It goes back by a year at each look."""
    steady = simulate(tiny(), out=tmp_path / "steady")
    year, now = 365 * 86400.0, time.time()
    looks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - next(looks) * year)
    jumping = simulate(tiny(), out=tmp_path / "jumping")
    assert adapter(steady) == adapter(jumping) and jumping.summary["epsilon"] == steady.summary["epsilon"]
    assert all(line["seconds"] >= 0 for line in jumping.rounds)


def lose(monkeypatch, clients):
    monkeypatch.setattr("fedlora.strategies.ffa_lora.FFALoRA.config", lambda self, round: {"lose": clients})


def test_a_round_with_too_few_replies_is_tried_with_other_clients_and_paid_each_time(tiny, tmp_path, monkeypatch):
    lose(monkeypatch, "0,1")
    asked = (FLAKY, "clients.per_round=2", "clients.min_replies=2", "clients.retries=20", "rounds=2")
    noise = "privacy={noise_multiplier: 2.0, delta: 1.0e-3}"
    made = simulate(tiny(*asked, noise), out=tmp_path / "run")

    lines = ledger.read(made.folder / "privacy.jsonl")
    for line in made.rounds:
        tries = max(li.get("attempt", 0) for li in lines if li["round"] == line["round"]) + 1
        mine = [c for c in made.clients if c["round"] == line["round"]]
        assert sum(li["round"] == line["round"] for li in lines) == 2 * tries  # two clients in each
        assert {c["client"] for c in mine if c["error"] is None} == {2, 3} and line["clients"] == 2
        assert len({c["client"] for c in mine}) == len(mine)
    assert max(li.get("attempt", 0) for li in lines) > 0
    again = simulate(tiny(*asked, noise), out=tmp_path / "again")
    assert ledger.read(again.folder / "privacy.jsonl") == lines  # cohorts follow from seed, round and attempt


def test_after_the_last_retry_the_run_stops_with_what_it_had(tiny, tmp_path, monkeypatch):
    lose(monkeypatch, "0,1,2")
    asked = (FLAKY, "clients.min_replies=2", "clients.retries=1", "privacy={noise_multiplier: 2.0, delta: 1.0e-3}")
    with pytest.raises(
        RoundError, match=r"^round 1: 1 of 4 clients replied and 2 must; client 0: RuntimeError: gone$"
    ):
        simulate(tiny(*asked), out=tmp_path / "run")
    assert len(ledger.read(tmp_path / "run" / "privacy.jsonl")) == 8  # four clients, twice

    lose(monkeypatch, "")
    done = simulate(tiny(*asked), out=tmp_path / "run", resume=True)
    assert done.summary["rounds"] == 2 and done.summary["failures"] == 0
    # Clients are told other words than in the first attempt: they draw other noise, and pay again.
    assert len(ledger.read(tmp_path / "run" / "privacy.jsonl")) == 16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["clients.min_replies=5"], "at most the 4 clients of a round"),
        (
            ["privacy={unit: client, epsilon: 8, delta: 1.0e-2}", "clients.use=sgd", "clients.retries=1"],
            "drawn once",
        ),
    ],
)
def test_bounds_that_cannot_hold_are_a_line(tiny, overrides, words):
    with pytest.raises(UserError, match=words):
        tiny(*overrides)
