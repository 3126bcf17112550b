"""Scores of texts: figures by hand and by numpy, the scale, partitions, exports, bad cells."""

import json

import numpy as np
import pytest
import torch

from fedlora import evaluate, export, predict, simulate
from fedlora.data import reading
from fedlora.data.partitions import classes
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.tasks import base_model, loading
from fedlora.tasks.regression import Regression

NOISE = "privacy={noise_multiplier: 1.0, delta: 1.0e-3}"  # whatever the number of rounds


class Told(Regression):
    """Its logits are given, and so is the scale."""

    def __init__(self, logits, scale=(0.0, 1.0)):
        self._told = torch.tensor(np.asarray(logits), dtype=torch.float32)
        self.model = self
        self.config = self
        self.score_scale = scale

    def get_base_model(self):
        return self

    def logits(self, batch):
        return self._told


def figures_of(predicted, told, scale=(0.0, 1.0)):
    task = Told(predicted, scale)
    return task.figures(task.score({"targets": torch.tensor(np.asarray(told, np.float32))}))


def test_figures_by_hand():
    told = figures_of([[0.0], [0.5], [1.0]], [[0.0], [1.0], [0.5]], (1.0, 5.0))
    assert told["loss"] == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert told["mae"] == pytest.approx(4 * (0 + 0.5 + 0.5) / 3)
    assert told["pearson"] == pytest.approx(0.5)  # deviations (-1, 0, 1) / 2 and (-1, 1, 0) / 2


def test_the_loss_of_an_example_is_the_mean_over_its_scores():
    losses = Told([[0.0, 1.0]]).losses({"targets": torch.tensor([[0.5, 0.0]])})
    torch.testing.assert_close(losses, torch.tensor([(0.25 + 1.0) / 2]))


def test_pearson_is_that_of_numpy_however_the_rows_are_cut():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, k = rng.integers(3, 40), rng.integers(1, 4)
        told = rng.random((n, k)).astype(np.float32)
        predicted = (rng.normal() * told + rng.random((n, k))).astype(np.float32)
        right = np.mean([np.corrcoef(told[:, i], predicted[:, i])[0, 1] for i in range(k)])
        assert figures_of(predicted, told)["pearson"] == pytest.approx(right, abs=1e-6)


def test_scores_that_are_all_the_same_have_no_correlation():
    assert figures_of([[0.1], [0.9]], [[0.3], [0.3]])["pearson"] == 0.0
    assert figures_of([[0.7], [0.7], [0.7]], [[0.1], [0.2], [0.9]])["pearson"] == 0.0


def test_partitions_tell_rows_apart_by_fifths_of_the_score():
    scores = np.arange(10, dtype=np.float32)[:, None] / 10
    assert classes(scores).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert classes(np.hstack([scores, scores[::-1]])).max() <= 4


@pytest.fixture
def pairs(tmp_path):
    rows = ["one,two,score,tone"]
    for i in range(200):
        alike = i % 5
        rows.append(f"film {i} was {'so ' * alike}good,film {i} was good,{alike},{-1 + i % 3}")
    (file := tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return file


def told(file, *more, label="score"):
    return (
        "task=regression",
        f"data.files={{train: '{file}', text: [one, two], label: {label}}}",
        "data.score={low: 0, high: 4}",
        *more,
    )


def test_a_runs_scores_are_those_of_plain_peft_and_predict_tells_them_in_their_units(tiny, pairs, tmp_path):
    from transformers import AutoModelForSequenceClassification, pipeline

    asked = told(pairs, "data.partition={kind: dirichlet, alpha: 5.0, min_examples: 10}", "metrics=[spearman]")
    run = simulate(tiny(*asked), out=tmp_path / "run")
    assert run.metric == "pearson" and "mae" in run.summary["metrics"] and run.summary["majority"] is None
    assert run.partitions["labels"] == [] and run.majority is None
    assert "0 stands for 0, and 1 for 4" in (run.folder / "adapter" / "README.md").read_text()
    assert run.summary["metrics"]["spearman"] <= 1
    again = evaluate(run, pairs, metrics=["rmse"])
    assert again.metrics["rmse"] >= again.metrics["mae"] > 0
    (answer,) = predict(run, "film 1 was good\tfilm 2 was so good")
    whole = export(run, tmp_path / "whole", merge=True)
    config = json.loads((whole / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["score_scale"] == [0.0, 4.0]
    assert config["id2label"] == {"0": "score"}
    (said,) = pipeline("text-classification", model=str(whole))(
        [{"text": "film 1 was good", "text_pair": "film 2 was so good"}]
    )
    assert said["label"] == "score" and float(answer.answer) == pytest.approx(4 * said["score"], abs=2e-3)
    with pytest.raises(UserError, match="pairs of texts: write both with a tab between them"):
        predict(run, "film 1")
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(whole).num_labels, int)


def test_several_scores_have_names(tiny, pairs, tmp_path):
    run = simulate(
        tiny(*told(pairs, "data.score={low: -1, high: 4}", label="[score, tone]")), out=tmp_path / "run"
    )
    (answer,) = predict(run, "a\tb")
    assert [part.split()[0] for part in answer.answer.split(", ")] == ["score", "tone"]


def test_figures_of_a_run_are_in_its_units(tiny_base):
    kind = Lora(4, 8, ("query", "value"))
    made = loading.load(
        "regression", tiny_base, kind, labels=("score",), seed=3, max_length=24, scale=(10.0, 30.0)
    )
    sums = {key: np.array([0.0]) for key in ("x", "y", "xx", "yy", "xy")} | {"off": np.array([0.5])}
    assert made.figures({**sums, "loss": 1.0, "examples": 1.0})["mae"] == pytest.approx(10.0)
    assert base_model.text_kinds(made.model) == 2


def test_a_run_goes_on_bit_for_bit(tiny, pairs, tmp_path):
    from safetensors.numpy import load_file

    whole = simulate(tiny(*told(pairs), "rounds=3", NOISE), out=tmp_path / "whole")
    simulate(tiny(*told(pairs), "rounds=2", NOISE), out=tmp_path / "parts")
    parts = simulate(tiny(*told(pairs), "rounds=3", NOISE), out=tmp_path / "parts", resume=True)
    one, two = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (whole, parts))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_start_of_another_scale_gives_no_head(tiny, pairs, tmp_path, caplog):
    first = simulate(tiny(*told(pairs), "rounds=1"), out=tmp_path / "first")
    for scale, left_out in (("{low: 0, high: 5}", True), ("{low: 0, high: 4}", False)):
        caplog.clear()
        asked = tiny(*told(pairs, f"data.score={scale}", f"model.start={first.folder}", "rounds=1"))
        simulate(asked, out=tmp_path / str(left_out))
        assert ("is for scores of another scale" in caplog.text) is left_out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("data.score=null", r"say from where to where scores go, as \{low: 0, high: 5\}"),
        ("data.score={low: 4, high: 4}", "low should be below high, and is 4 of 4"),
        ("data.score={low: 0, high: .inf}", "finite"),
        ("data.labels=[a, b]", "scores are called by their columns: leave it out"),
        ("data.files.label=null", "regression needs the name of the column of scores"),
        ("task=classification", "score is for task: regression, and the task is classification"),
    ],
)
def test_what_does_not_go_together_is_told(tiny, pairs, change, what):
    with pytest.raises(UserError, match=what):
        tiny(*told(pairs, change))


def test_several_columns_of_labels_are_for_scores_alone(tiny, reviews):
    with pytest.raises(UserError, match="several columns are for task: regression"):
        tiny("data.files.label=[label, site]")


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("four", "row 2: 'score' is no number"),
        ("", "row 2: 'score' is empty, and should be a number"),
        ("nan", "row 2: 'score' is no finite number"),
        ("inf", "row 2: 'score' is no finite number"),
        ("4.5", r"row 2: 'score' is outside of 0 to 4 \(data.score\)"),
        ("-0.1", r"row 2: 'score' is outside of 0 to 4 \(data.score\)"),
    ],
)
def test_a_bad_score_is_told_by_file_row_and_column(cell, what, tmp_path):
    from fedlora.scenario import Data

    (file := tmp_path / "x.csv").write_text(f"text,score\nsecret,1\nsecret too,{cell}\n")
    data = Data(files={"train": str(file), "test": str(file), "label": "score"}, score={"low": 0, "high": 4})
    with pytest.raises(SettingError, match=what) as caught:
        reading.read(data, "regression")
    assert caught.value.key == "data.files.label" and str(file) in caught.value.message
    assert "secret" not in caught.value.message


def test_scores_are_read_on_their_scale(tmp_path):
    from fedlora.scenario import Data

    (file := tmp_path / "x.jsonl").write_text('{"text": "a", "s": 1}\n{"text": "b", "s": 2.5}\n')
    data = Data(files={"train": str(file), "test": str(file), "label": "s"}, score={"low": 1, "high": 4})
    assert reading.read(data, "regression")[0].labels == [(0.0,), (0.5,)]
