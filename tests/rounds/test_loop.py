"""Rounds whose evaluation goes beside the next round's training."""

import signal
from functools import partial
from types import SimpleNamespace

import pytest

from fedlora.engine.inline import InlineEngine
from fedlora.errors import RoundError
from fedlora.privacy import ledger
from fedlora.reports.console import Silent
from fedlora.simulation import simulate

TIMES = ("seconds", "phases")


class Crash(Exception):
    """What ends a process at once."""


@pytest.fixture
def beside(monkeypatch):
    """The engine evaluates when it is asked for the figures; what it was asked for, in order."""
    calls, train, crashes = [], InlineEngine.train, []

    def trained(self, instruction, cohort, partial_sums):
        calls.append(f"train {instruction.round}")
        return train(self, instruction, cohort, partial_sums)

    def figures(self, adapter):
        if crashes:
            raise crashes.pop()
        calls.append("evaluate")
        return self.evaluate(adapter)

    monkeypatch.setattr(InlineEngine, "train", trained)
    monkeypatch.setattr(InlineEngine, "beside", lambda self, adapter: partial(figures, self, dict(adapter)))
    return SimpleNamespace(calls=calls, crashes=crashes)


def lines(run):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.rounds]


class Shown(Silent):
    """Keeps what was shown of rounds."""

    def __init__(self):
        self.seen = []

    def round(self, line):
        self.seen.append((line["round"], line["accuracy"]))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path_factory.mktemp("runs") / "plain")


def test_lines_are_those_of_rounds_one_after_another(plain, beside, tiny, tmp_path):
    """Of four rounds the second and the fourth are evaluated, and the last waits for no other."""
    shown = Shown()
    run = simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run", display=shown)
    assert beside.calls == ["train 1", "train 2", "train 3", "evaluate", "train 4"]
    assert lines(run) == lines(plain) and [list(line) for line in run.rounds] == [list(ln) for ln in plain.rounds]
    assert shown.seen == [(line["round"], line["accuracy"]) for line in plain.rounds]
    assert run.summary["accuracy"] == plain.summary["accuracy"]


def test_a_run_that_is_stopped_has_the_line_of_its_last_round(plain, beside, tiny, tmp_path, monkeypatch):
    """Ctrl-C comes as round 3 begins, and the figures of round 2 have not been asked for."""

    def config(self, round):
        if round == 3:
            signal.raise_signal(signal.SIGINT)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr("fedlora.strategies.ffa_lora.FFALoRA.config", config)
        run = simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run")
    assert run.summary["stopped"] == "interrupted after round 2" and beside.calls[2:] == ["evaluate"]
    assert lines(run) == lines(plain)[:2] and run.summary["accuracy"] == plain.rounds[1]["accuracy"]
    again = simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run", resume=True)
    assert lines(again) == lines(plain)


def test_a_crash_before_the_figures_came_loses_no_line(plain, beside, tiny, tmp_path):
    """Round 2 is saved and not yet told of when its figures are asked for, in round 3."""
    beside.crashes.append(Crash())
    with pytest.raises(Crash):
        simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run")
    assert [line["round"] for line in ledger.read(tmp_path / "run" / "metrics.jsonl")] == [1]
    run = simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run", resume=True)
    assert lines(run) == lines(plain) and run.summary["epsilon"] == plain.summary["epsilon"]


def test_a_line_that_was_written_before_a_crash_is_not_written_twice(plain, beside, tiny, tmp_path, monkeypatch):
    """Round 3 dies behind the line of round 2; the checkpoint does not know that there is one."""

    def die(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("fedlora.rounds.loop.Loop._catch_up", lambda self, replies, now: now.round == 2 and die())
        with pytest.raises(Crash):
            simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run")
    assert [line["round"] for line in ledger.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    run = simulate(tiny("rounds=4", "eval_every=2"), out=tmp_path / "run", resume=True)
    assert lines(run) == lines(plain)


def test_a_round_that_fails_takes_no_line_with_it(plain, beside, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedlora.strategies.ffa_lora.FFALoRA.config",
        lambda self, round: {"lose": "0,1,2,3"} if round == 3 else {},
    )
    with pytest.raises(RoundError, match="round 3"):
        simulate(tiny("rounds=4", "eval_every=2", "clients.use=tests.engine.faulty:Flaky"), out=tmp_path / "run")
    told = ledger.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["accuracy"] for line in told] == [None, plain.rounds[1]["accuracy"]]


def test_clients_that_are_judged_by_their_own_examples_are_not_beside_others(beside, tiny, tmp_path):
    """Their models would have moved on by then."""
    run = simulate(tiny("rounds=2", "data.client_test_share=0.2", private=False), out=tmp_path / "run")
    assert "evaluate" not in beside.calls and all(line["local_accuracy"] is not None for line in run.rounds)
