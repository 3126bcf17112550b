"""The best round is kept, and a run that gets no better ends."""

import json
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.adapter import fingerprint
from fedlora.engine.inline import InlineEngine
from fedlora.errors import UserError
from fedlora.prepare import prepare, prepare_server
from fedlora.privacy import ledger
from fedlora.reports.console import Silent, summary_lines
from fedlora.reports.groups import final
from fedlora.rounds.choice import Choice
from fedlora.rounds.loop import Loop
from fedlora.rounds.progress import Progress
from fedlora.simulation import simulate

CHOOSES = ("data.validation_share=0.5", "keep=best")


def seen(values, **told):
    """Where a run stands after rounds with these figures."""
    choice = Choice(**{"figure": "v", "higher": True, "keeps": True, "patience": 2, **told})
    now = Progress(round=0, adapter={})
    for round, value in enumerate(values, 1):
        now.round, now.merges, now.last = round, 10 * round, {"v": value}
        now.adapter = {"A": np.full(1, round, np.float32)}
        choice.see({"v": value}, now)
    return choice, now


@pytest.mark.parametrize(
    ("values", "higher", "best", "waited"),
    [
        ([0.5, 0.7, 0.6], True, 2, 1),
        ([0.5, 0.7, 0.6], False, 1, 2),
        ([0.5, 0.5, 0.6], True, 3, 0),
        ([0.5, 0.5], True, 1, 1),  # as good is no better
        ([float("nan"), 0.1, float("nan")], True, 2, 1),
    ],
)
def test_the_best_round_is_the_first_that_none_is_better_than(values, higher, best, waited):
    _, now = seen(values, higher=higher)
    assert (now.best.round, now.best.merges, now.waited) == (best, 10 * best, waited)
    assert now.best.adapter["A"][0] == best and now.best.figures == {"v": values[best - 1]}


def test_a_run_ends_when_its_patience_does():
    assert seen([0.5, 0.7, 0.6])[0].ends(seen([0.5, 0.7, 0.6])[1]) is None
    choice, now = seen([0.5, 0.7, 0.6, 0.7])
    assert choice.ends(now) == "after round 4: no better v than after round 2 in 2 evaluations"
    choice, now = seen([float("nan")] * 2)
    assert now.best is None and choice.ends(now) == "after round 2: no better v that is a number in 2 evaluations"
    choice, now = seen([0.5] * 9, patience=None)
    assert choice.ends(now) is None


@pytest.fixture
def script(monkeypatch):
    """What `validation_accuracy` is after each round, by its number; by default it falls after the second."""
    told, rounds, figures, evaluate = (
        {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.6, 5: 0.6},
        {},
        Loop._figures,
        InlineEngine.evaluate,
    )

    def measured(self, round, adapter):
        rounds[fingerprint(adapter)] = round
        return figures(self, round, adapter)

    def evaluated(self, adapter):
        return {**evaluate(self, adapter), "validation_accuracy": told[rounds[fingerprint(adapter)]]}

    monkeypatch.setattr(Loop, "_figures", measured)
    monkeypatch.setattr(InlineEngine, "evaluate", evaluated)
    return told


def adapter(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("use", ["ffa_lora", "fedex_lora", "flora"])
def test_the_best_round_is_exported_with_what_was_merged_until_then(tiny, tmp_path, script, use):
    told = (*CHOOSES, f"strategy.use={use}")
    two = simulate(tiny(*told, "rounds=2", "keep=last", private=False), out=tmp_path / "two")
    run = simulate(tiny(*told, "rounds=4", private=False), out=tmp_path / "run")
    assert same(adapter(run), adapter(two))
    assert (run.summary["rounds"], run.summary["best_round"], run.best_round) == (4, 2, 2)
    assert run.summary["validation_accuracy"] == 0.7 and run.summary["validation_examples"] > 0
    assert run.summary["accuracy"] == run.rounds[1]["accuracy"] == two.summary["accuracy"] == final(run)
    assert "best_round" not in two.summary and two.summary["validation_accuracy"] == 0.7
    assert "after 4 rounds (round 2 is kept)" in summary_lines(run)[0]
    assert "it is of round 2, the best" in (run.folder / "adapter" / "README.md").read_text()
    assert any("are of round 2" in line for line in run.remarks())


def test_a_run_that_gets_no_better_is_finished_and_pays_for_no_further_round(tiny, tmp_path, script):
    run = simulate(tiny(*CHOOSES, "stop={patience: 2}", "rounds=9"), out=tmp_path / "run")
    assert [line["round"] for line in run.rounds] == [1, 2, 3, 4]
    assert {line["round"] for line in ledger.read(run.folder / "privacy.jsonl")} == {1, 2, 3, 4}
    why = "after round 4: no better validation_accuracy than after round 2 in 2 evaluations"
    assert run.summary["ended"] == why and "stopped" not in run.summary
    assert run.state == "finished" and run.ended
    assert f"This run ended early, {why}: 4 of 9 rounds." in run.remarks()
    assert run.summary["epsilon"] < 8 * 0.9  # of nine rounds
    again = simulate(tiny(*CHOOSES, "stop={patience: 2}", "rounds=9"), out=run.folder, resume=True)
    assert len(again.rounds) == 4 and again.summary["ended"] == why and same(adapter(run), adapter(again))
    more = simulate(tiny(*CHOOSES, "stop={patience: 3}", "rounds=9"), out=run.folder, resume=True)
    assert len(more.rounds) == 5 and more.summary["best_round"] == 2


def test_a_run_that_is_only_to_end_keeps_its_last_round(tiny, tmp_path, script):
    told = ("data.validation_share=0.5", "stop={patience: 1}")
    run = simulate(tiny(*told, "rounds=5", private=False), out=tmp_path / "run")
    three = simulate(tiny(*told, "rounds=3", "stop=null", private=False), out=tmp_path / "three")
    assert same(adapter(run), adapter(three)) and "best_round" not in run.summary
    assert run.summary["ended"] and run.summary["accuracy"] == run.rounds[2]["accuracy"]


def test_only_rounds_that_are_evaluated_count(tiny, tmp_path, script):
    """Of six rounds the second, the fourth and the sixth."""
    script[6] = 0.5
    told = (*CHOOSES, "eval_every=2", "stop={patience: 2}", "rounds=8")
    run = simulate(tiny(*told, private=False), out=tmp_path / "run")
    assert (len(run.rounds), run.summary["best_round"]) == (6, 2)


@pytest.mark.parametrize("use", ["ffa_lora", "fedex_lora"])
@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on_bit_for_bit_with_its_best_round(tiny, tmp_path, script, after, use):
    told = (*CHOOSES, f"strategy.use={use}", "rounds=4")
    whole = simulate(tiny(*told), out=tmp_path / "whole")

    class Stop(Silent):
        def round(self, line):
            if line["round"] == after:
                raise KeyboardInterrupt

    cut = simulate(tiny(*told), out=tmp_path / "cut", display=Stop())
    assert cut.summary["stopped"] and cut.summary["best_round"] == min(after, 2)
    done = simulate(tiny(*told), out=tmp_path / "cut", resume=True)
    assert same(adapter(whole), adapter(done))
    for key in ("best_round", "accuracy", "loss", "validation_accuracy", "epsilon"):
        assert done.summary[key] == whole.summary[key]
    states = [json.loads((r.folder / "checkpoint" / "state.json").read_text())["words"] for r in (whole, done)]
    assert states[0]["best"] == states[1]["best"] and states[0]["waited"] == states[1]["waited"] == 2
    held = load_file(whole.folder / "checkpoint" / "strategy.safetensors")
    assert {n for n in held if n.startswith("best/")} == {
        f"best/{n}" for n in load_file(whole.folder / "checkpoint" / "adapter.safetensors")
    }


@pytest.fixture
def beside(monkeypatch):
    """Evaluations go beside the next round; what was trained and evaluated, in order."""
    calls, train = [], InlineEngine.train

    def trained(self, instruction, cohort, partial_sums):
        calls.append(f"train {instruction.round}")
        return train(self, instruction, cohort, partial_sums)

    def figures(self, adapter):
        calls.append("evaluate")
        return self.evaluate(adapter)

    monkeypatch.setattr(InlineEngine, "train", trained)
    monkeypatch.setattr(InlineEngine, "beside", lambda self, adapter: partial(figures, self, dict(adapter)))
    return calls


@pytest.mark.parametrize("use", ["ffa_lora", "flora"])
def test_an_evaluation_beside_the_next_round_chooses_its_own(tiny, tmp_path, script, beside, use):
    told = (*CHOOSES, f"strategy.use={use}")
    run = simulate(tiny(*told, "rounds=4", private=False), out=tmp_path / "run")
    assert beside == ["train 1", "train 2", "evaluate", "train 3", "evaluate", "train 4", "evaluate"]
    two = simulate(tiny(*told, "rounds=2", "keep=last", private=False), out=tmp_path / "two")
    assert run.summary["best_round"] == 2 and same(adapter(run), adapter(two))


def test_a_run_that_may_end_waits_for_its_figures(tiny, tmp_path, script, beside):
    simulate(tiny(*CHOOSES, "stop={patience: 1}", "rounds=5", private=False), out=tmp_path / "run")
    assert beside == ["train 1", "train 2", "train 3"]


def test_the_loss_chooses_where_it_is_asked_to(tiny, tmp_path):
    told = ("data.validation_share=0.5", "keep={best: loss}", "rounds=4", "clients.lr=3")
    run = simulate(tiny(*told, private=False), out=tmp_path / "run")
    losses = [line["validation_loss"] for line in run.rounds]
    assert run.summary["best_round"] == 1 + losses.index(min(losses))
    assert run.summary["validation_loss"] == min(losses) and len(set(losses)) > 1


def test_what_reports_is_not_what_chooses(tiny, tmp_path):
    """The two halves together are the test set of a run without; each evaluation is of its own rows."""
    plain, halves = (prepare(tiny(*told)).data for told in ((), CHOOSES[:1]))
    rows = [
        {tuple(part.row(i)) for i in range(len(part))} for part in (plain.test, halves.test, halves.validation)
    ]
    assert rows[1] | rows[2] == rows[0] and not rows[1] & rows[2] and min(map(len, rows)) > 5
    assert len(plain.validation) == 0 and len(plain.train) == len(halves.train)


def test_a_server_of_sites_chooses_by_rows_of_its_own(tiny, reviews):
    named = f"data.files={{train: nowhere.csv, test: '{reviews}'}}"
    ready = prepare_server(tiny(named, "data.labels=[bad, good]", *CHOOSES))
    assert len(ready.data.test) + len(ready.data.validation) == 240 and len(ready.data.validation) > 60
    assert len(ready.data.train) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["keep={best: f1}"],
            "keep.best: an evaluation here has no 'f1'",
        ),
        (["keep={best: exact_match}"], "keep.best: an evaluation here has no 'exact_match'"),
        (
            ["strategy.use=fedsa_lora", "data.client_test_share=0.2"],
            "keep: fedsa_lora gives each client a model of its own",
        ),
        (
            ["keep=last", "stop={patience: 1}", "strategy.use=fedsa_lora", "data.client_test_share=0.2"],
            "stop: fedsa_lora gives each client a model of its own",
        ),
        (["data.validation_share=0.001"], "the validation set is empty; give more rows"),
    ],
)
def test_what_cannot_choose_is_a_line_before_anything_is_written(tiny, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        simulate(tiny(*CHOOSES, *overrides), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
