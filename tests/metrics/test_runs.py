"""Runs that are judged by figures of one's choice: recorded by name, kept by name, the same for any engine."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fedlora.engine import base
from fedlora.engine.inline import InlineEngine
from fedlora.errors import UserError
from fedlora.metrics import contract
from fedlora.prepare import prepare
from fedlora.reports.comparison import compare
from fedlora.reports.single import html
from fedlora.run import Run
from fedlora.simulation import simulate

NAMES = ["macro_f1", "auroc", "brier", "ece"]
ASKED = f"metrics=[{', '.join(NAMES)}]"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    told = (ASKED, "data.client_test_share=0.3", "data.validation_share=0.4", "rounds=3", "keep={best: brier}")
    return simulate(tiny(*told, private=False), out=tmp_path_factory.mktemp("runs") / "run")


def test_figures_are_recorded_by_name(run):
    for line in run.rounds:
        assert all(0 <= line[f"{of}{name}"] <= 1 for name in NAMES for of in ("", "validation_", "local_"))
        assert "confusion" not in line
    kept = run.rounds[run.summary["best_round"] - 1]
    assert run.summary["metrics"] == {name: kept[name] for name in ("accuracy", *NAMES)}
    assert run.summary["lower_is_better"] == ["brier", "ece"]
    text = (run.folder / "metrics.jsonl").read_text() + (run.folder / "summary.json").read_text()
    assert "NaN" not in text and run.figures == ["accuracy", *NAMES, "loss"]


def test_the_best_round_is_kept_by_a_figure_of_which_less_is_better(run):
    chosen = [line["validation_brier"] for line in run.rounds]
    assert run.summary["best_round"] == 1 + chosen.index(min(chosen)) and len(set(chosen)) == 3


def test_the_test_rows_are_told_by_label_after_the_round_that_was_kept(run):
    told = json.loads((run.folder / "test.json").read_text())
    best = run.rounds[run.summary["best_round"] - 1]
    assert told["round"] == run.summary["best_round"] and told["labels"] == ["bad", "good"]
    counts = np.array(told["confusion"])
    assert counts.sum() == run.summary["test_examples"]
    assert np.diag(counts).sum() / counts.sum() == pytest.approx(best["accuracy"])
    mean = np.mean([one["f1"] or 0.0 for one in told["classes"]])
    assert mean == pytest.approx(best["macro_f1"])


def test_clients_tell_their_own_figures_where_nothing_is_private(run):
    for line in run.rounds:
        own = [c for c in run.clients if c["round"] == line["round"]]
        assert sorted(c["client"] for c in own) == [0, 1, 2, 3]
        for name in ("accuracy", "loss", *NAMES):
            known = [c[f"local_{name}"] for c in own if c[f"local_{name}"] is not None]
            assert np.mean(known) == pytest.approx(line[f"local_{name}"])


def test_clients_that_were_not_drawn_have_a_line_of_their_own_figures(tiny, tmp_path):
    told = ("data.client_test_share=0.3", "clients.per_round=2", "rounds=1")
    made = simulate(tiny(*told, private=False), out=tmp_path / "run")
    assert sorted(c["client"] for c in made.clients) == [0, 1, 2, 3]
    rested = [set(c) for c in made.clients if "steps" not in c]
    assert rested == [{"round", "client", "local_accuracy", "local_loss"}] * 2


@pytest.mark.parametrize("shares", [False, True])
def test_under_privacy_clients_tell_them_only_as_share_metrics_allows(tiny, tmp_path, shares):
    told = (ASKED, "data.client_test_share=0.3", f"privacy.share_metrics={str(shares).lower()}", "rounds=1")
    made = simulate(tiny(*told), out=tmp_path / "run")
    assert all(("local_macro_f1" in line) is shares for line in made.clients)
    assert ("worst client" in html(made)) is shares


def test_a_figure_that_says_nothing_is_null_and_said_once(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(
        contract.known("class"),
        "auroc",
        contract.Metric(name="auroc", takes="class", function=lambda *_: float("nan")),
    )
    made = simulate(tiny("metrics=[auroc]", private=False), out=tmp_path / "run")
    assert [line["auroc"] for line in made.rounds] == [None, None] and made.summary["metrics"]["auroc"] is None
    assert [r.message for r in caplog.records if "auroc" in r.message] == [
        "auroc is null: it says nothing of these rows, as where all have one label"
    ]


def test_one_pass_gives_loss_and_figures_of_every_row(tiny, monkeypatch):
    """In pieces as in one, each batch passes the model once, and a row's outputs stand at its place."""
    ready = prepare(tiny(ASKED, private=False))
    engine = InlineEngine(4)
    engine.start(ready.setup)
    task, test = engine.worker.task, engine.worker.dataset.test
    passes, run = [], type(task)._pass
    monkeypatch.setattr(
        type(task), "_pass", lambda self, batch, **told: passes.append(1) or run(self, batch, **told)
    )
    plain = task.evaluation(task.initial, test, rows := np.arange(len(test)))
    once = len(passes)
    found = task.evaluation(task.initial, test, rows, rowwise=True)
    assert len(passes) == 2 * once and found.sums == plain.sums and plain.outputs is None
    assert found.outputs.shape == (len(test), 2) and (found.targets == test.targets).all()
    assert -np.log(found.outputs[rows, found.targets]).sum() == pytest.approx(found.sums["loss"], rel=1e-5)
    mixed = task.evaluation(task.initial, test, rows[::-3], rowwise=True)
    np.testing.assert_allclose(mixed.outputs, found.outputs[::-3], atol=1e-6)
    figures = engine.evaluate(task.initial)
    assert figures["macro_f1"] == f1_score(found.targets, found.outputs.argmax(-1), average="macro")
    monkeypatch.setattr(base, "EVALUATION_CHUNK", 7)
    cut = engine.evaluate(task.initial)
    assert cut.keys() == figures.keys() and cut["confusion"] == figures["confusion"]
    assert all(cut[name] == pytest.approx(figures[name]) for name in NAMES)


def test_a_run_goes_on_with_its_figures(tiny, tmp_path):
    told = (ASKED, "data.validation_share=0.4", "keep={best: macro_f1}")
    whole = simulate(tiny(*told, "rounds=3", private=False), out=tmp_path / "whole")
    simulate(tiny(*told, "rounds=2", private=False), out=tmp_path / "cut")
    done = simulate(tiny(*told, "rounds=3", private=False), out=tmp_path / "cut", resume=True)
    assert done.summary["metrics"] == whole.summary["metrics"] and done.test == whole.test


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metrics=[macro_f2]"], "metrics: unknown metric 'macro_f2': did you mean 'macro_f1'"),
        (["metrics=[os.path:join]"], "metrics: join fails on made-up rows: TypeError"),
        (["keep={best: brier}", "data.validation_share=0.3"], "keep.best: an evaluation here has no 'brier'"),
    ],
)
def test_what_is_wrong_with_a_metric_is_a_line_before_anything_is_written(tiny, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        simulate(tiny(*overrides), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_runs_are_compared_by_a_figure_of_ones_choice(run, tiny, tmp_path):
    other = simulate(tiny(ASKED, "rounds=1", "data.validation_share=0.4", private=False), out=tmp_path / "other")
    made = compare([run, other], metric="brier")
    assert (made.metric, made.higher_is_better) == ("brier", False)
    assert made.groups[0].final() == [run.summary["metrics"]["brier"]]
    assert [*made.table().head[-4:]] == ["accuracy", "macro_f1", "auroc", "ece"]
    assert compare([run, other]).table().head[2] == "accuracy"
    with pytest.raises(UserError, match="has no figure 'briar': did you mean 'brier'"):
        compare([run], metric="briar")
    assert not Run(other.folder).by("ece").higher_is_better and Run(other.folder).by("auroc").higher_is_better


def test_the_report_shows_the_figures_the_confusion_and_the_clients(run):
    page = html(run)
    for title in ("Macro f1 by round", "Brier by round", "Confusion of labels", "Figures of each label"):
        assert title in page
    assert "Clients by their own rows" in page and "worst client" in page and "standard deviation" in page


def test_the_report_has_tables_for_many_labels(run, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for file in ("scenario.yaml", "metrics.jsonl", "clients.jsonl", "summary.json"):
        (folder / file).write_bytes((run.folder / file).read_bytes())
    labels = [f"label {i}" for i in range(31)]
    counts = np.diag(np.full(31, 5))
    counts[3, 7] = 2
    from fedlora.metrics.confusion import told

    (folder / "test.json").write_text(json.dumps(told(3, labels, counts.tolist())))
    page = html(Run.open(folder))
    assert "Confusion of labels</h3><div" in page and "<td>label 7</td>" in page and "taken for after" not in page
