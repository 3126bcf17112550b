"""Several labels of a text: figures by hand and by scikit-learn, thresholds, partitions, exports, bad cells."""

import json
import math

import numpy as np
import pytest
import torch

from fedlora import evaluate, export, load_adapter, predict, prepare, simulate
from fedlora.baselines import derive
from fedlora.data import reading
from fedlora.data.cells import separator
from fedlora.data.partitions import classes
from fedlora.data.store import majority
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.scenario.baseline import configuration
from fedlora.tasks import loading
from fedlora.tasks.multi_label import HALF, THRESHOLDS, MultiLabel, best_threshold, figures

LABELS = ("bad", "good", "long")
NOISE = "privacy={noise_multiplier: 1.0, delta: 1.0e-3}"  # whatever the number of rounds


class Told(MultiLabel):
    """Its logits are given."""

    def __init__(self, logits):
        self._told = torch.tensor(logits, dtype=torch.float32)

    def logits(self, batch):
        return self._told


def sums_of(shares, held):
    shares = np.asarray(shares, np.float64)
    held = torch.tensor(np.asarray(held, np.uint8))
    return Told(np.log(shares / (1 - shares))).score({"targets": held})


def test_figures_by_hand():
    """Of three rows and two labels: at 0.5 one right of two given, of three had; F1 is 2 / 5, and 2 / 3 and 0."""
    sums = sums_of([[0.9, 0.2], [0.3, 0.7], [0.2, 0.1]], [[1, 1], [0, 0], [1, 0]])
    told = figures(sums, 0.5)
    assert told["micro_f1"] == pytest.approx(2 / 5) and told["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    loss = -sum(map(math.log, (0.9, 0.2, 0.7, 0.3, 0.2, 0.9))) / 3
    assert told["loss"] == pytest.approx(loss, rel=1e-5) and told["threshold"] == 0.5
    assert "precision_at_5" not in told
    # From 0.15 on the two lowest that are right are given too: three right of five given, of three had.
    assert best_threshold(sums) == 0.2 or figures(sums, best_threshold(sums))["micro_f1"] >= 6 / 8


def test_the_loss_of_an_example_is_the_sum_over_its_labels():
    task = Told([[0.0, 0.0], [100.0, -100.0]])
    losses = task.losses({"targets": torch.tensor([[1, 0], [1, 0]], dtype=torch.uint8)})
    torch.testing.assert_close(losses, torch.tensor([2 * math.log(2), 0.0]))


def test_f1_is_that_of_scikit_learn_at_every_threshold():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for case in range(50):
        rows, labels = rng.integers(1, 12), rng.integers(2, 7)
        shares, held = rng.uniform(0.001, 0.999, (rows, labels)), rng.random((rows, labels)) < 0.4
        sums = sums_of(shares, held)
        for threshold in (THRESHOLDS[case % len(THRESHOLDS)], HALF):
            told, given = figures(sums, threshold), shares >= threshold
            for name in ("micro", "macro"):
                right = f1_score(held, given, average=name, zero_division=0)
                assert told[f"{name}_f1"] == pytest.approx(right, abs=1e-12)


def test_precision_at_5_is_the_share_of_right_ones_among_the_five_likeliest():
    shares = [[0.9, 0.8, 0.7, 0.6, 0.55, 0.1, 0.2]]
    assert figures(sums_of(shares, [[1, 0, 1, 0, 0, 1, 1]]), HALF)["precision_at_5"] == pytest.approx(2 / 5)


def test_validation_rows_choose_the_threshold_and_the_others_report_by_it():
    chooses = sums_of([[0.35, 0.2], [0.35, 0.1]], [[1, 0], [1, 0]])
    reports = sums_of([[0.36, 0.31], [0.1, 0.1]], [[1, 0], [0, 1]])
    assert best_threshold(chooses) == 0.35  # as 0.25 and 0.3 would, and nearest to a half
    task = Told([[0.0]])
    told = task.by_half({"test": reports, "validation": chooses})
    assert told["validation"]["micro_f1"] == 1.0
    assert told["test"]["threshold"] == 0.35 and told["test"]["micro_f1"] == pytest.approx(2 / 3)
    assert task.by_half({"test": reports})["test"]["threshold"] == 0.5


def test_always_saying_the_commonest_label_is_judged_by_micro_f1():
    held = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]], np.uint8)
    assert majority(held) == pytest.approx(2 * 2 / (4 + 4))  # right twice, given four times, of four had
    assert majority(np.array([0, 0, 1])) == pytest.approx(2 / 3) and majority(np.zeros((3, 1), np.float32)) is None


def test_partitions_tell_rows_apart_by_their_rarest_label():
    held = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], np.uint8)
    assert classes(held).tolist() == [1, 0, 2, 3, 2]


@pytest.fixture
def films(tmp_path):
    rows = ["text,labels"]
    for i in range(240):
        held = [name for name, word in (("good", i % 2), ("long", i % 3 == 0), ("sad", i % 5 == 0)) if word]
        words = " ".join({"good": "lovely", "long": "endless", "sad": "tearful"}[name] for name in held)
        rows.append(f"note {i} of a {words} film,{'|'.join(held)}")
    (file := tmp_path / "films.csv").write_text("\n".join(rows) + "\n")
    return file


def told(file, *more):
    return (
        "task=multi_label",
        f"data.files={{train: '{file}', text: text, label: labels}}",
        "data.validation_share=0.4",
        *more,
    )


def test_a_run_tells_its_threshold_where_predict_and_plain_peft_read_it(tiny, films, tmp_path):
    from transformers import pipeline

    run = simulate(tiny(*told(films)), out=tmp_path / "run")
    summary = run.summary
    threshold = summary["metrics"]["threshold"]
    assert summary["metric"] == "micro_f1" and threshold in THRESHOLDS and "macro_f1" in summary["metrics"]
    about = json.loads((run.folder / "adapter" / "fedlora.json").read_text())
    assert about["threshold"] == threshold and about["labels"] == ["good", "long", "sad"]
    card = (run.folder / "adapter" / "README.md").read_text()
    assert f"each given from a probability of {threshold:g} on" in card
    config = json.loads((run.folder / "adapter" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    again = evaluate(run, films, metrics=["auroc", "micro_f1"])
    assert again.metrics["threshold"] == threshold and 0 <= again.metrics["auroc"] <= 1
    text = "a lovely endless film"
    (answer,) = predict(run, text)
    model, reader = load_adapter(run)
    with torch.inference_mode():
        shares = model(**reader(text, return_tensors="pt", truncation=True, max_length=16)).logits.sigmoid()[0]
    given = [(float(s), name) for s, name in zip(shares, about["labels"], strict=True) if s >= about["threshold"]]
    assert answer.answer == (", ".join(f"{n} {s:.3f}" for s, n in sorted(given, reverse=True)) or "none")
    whole = export(run, tmp_path / "whole", merge=True)
    (said,) = pipeline("text-classification", model=str(whole), top_k=None)([text])
    assert {s["label"]: s["score"] for s in said} == pytest.approx(
        dict(zip(about["labels"], shares.tolist(), strict=True)), abs=1e-5
    )
    config = json.loads((whole / "config.json").read_text())
    assert config["threshold"] == about["threshold"] and config["problem_type"] == MultiLabel.problem


def test_a_run_goes_on_bit_for_bit_and_fused_clients_come_to_the_same(tiny, films, tmp_path):
    from safetensors.numpy import load_file

    asked = told(films, "data.partition={kind: dirichlet, alpha: 2.0, min_examples: 20}", "rounds=3", NOISE)
    whole = simulate(tiny(*asked), out=tmp_path / "whole")
    simulate(tiny(*asked, "rounds=2"), out=tmp_path / "parts")
    parts = simulate(tiny(*asked), out=tmp_path / "parts", resume=True)
    fused = simulate(tiny(*asked, "engine.fused=2"), out=tmp_path / "fused")
    one, two, three = (
        load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (whole, parts, fused)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert all(np.allclose(one[name], three[name], atol=2e-4) for name in one)
    held = whole.partitions
    counts = np.sum([c["labels"] for c in held["clients"]], axis=0)
    assert held["labels"] == ["good", "long", "sad"] and sum(c["num_examples"] for c in held["clients"]) > 100
    assert counts.tolist() != [0, 0, 0] and whole.summary["majority"] is not None


def test_a_model_that_says_nothing_is_no_better_than_the_commonest_label(tiny, films, tmp_path):
    run = simulate(
        tiny(*told(films, "rounds=1", "clients.lr=0.000001", "clients.local_steps=1")), out=tmp_path / "r"
    )
    codes = [verdict.code for verdict in run.verdicts()]
    assert ("majority" in codes) is (run.summary["micro_f1"] <= run.summary["majority"])


def rows(file, task="multi_label", **named):
    from fedlora.scenario import Data

    data = Data(files={"train": str(file), "test": str(file), "label": "labels", **named})
    return reading.read(data, task)[0]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["a|b", "c", ""], [("a", "b"), ("c",), ()]),
        (["a;b,c", "a;a"], [("a", "b,c"), ("a",)]),
        (["a, b", "c"], [("a", "b"), ("c",)]),
        ([["a", "b|c"], [], None], [("a", "b|c"), (), ()]),
        ([[1, 2], [2]], [("1", "2"), ("2",)]),
    ],
)
def test_labels_are_lists_or_text_with_a_separator(cells, labels, tmp_path):
    (file := tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}", "labels": cell}) + "\n" for i, cell in enumerate(cells))
    )
    assert list(rows(file).labels) == labels
    parquet = tmp_path / "x.parquet"
    reading.read_table("x", file, None).to_parquet(parquet)
    assert list(rows(parquet).labels) == labels


def test_a_separator_that_is_named_is_the_one(tmp_path, caplog):
    (file := tmp_path / "x.csv").write_text("text,labels\none,a|b;c\ntwo,\n")
    assert list(rows(file, separator=";").labels) == [("a|b", "c"), ()]
    assert "1 of 2 rows have no label" in caplog.text


def test_what_stands_between_labels_is_found_in_the_training_rows_and_holds_for_all(tiny, tmp_path):
    """Of `c;d` in a file without a bar nobody makes two labels."""
    for name, held in (
        ("train", ("a|b", "c;d", "e")),
        ("test", ("c;d", "e")),
        ("chosen", ("c;d",)),
        ("known", ("e",)),
    ):
        lines = [f"{name} {i},{labels}" for i, labels in enumerate(held)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,labels", *lines]) + "\n")
    place = {key: str(tmp_path / f"{key}.csv") for key in ("train", "test")} | {"label": "labels"}
    place["validation"] = str(tmp_path / "chosen.csv")
    public = {"files": {"train": str(tmp_path / "known.csv")}}
    scenario = tiny("task=multi_label", f"data.files={json.dumps(place)}", f"data.public={json.dumps(public)}")
    found = prepare.separated(scenario)
    assert scenario.data.files.separator is None
    assert found.data.files.separator == found.data.public.files.separator == "|"
    assert prepare.separated(found) is found  # what was found is named
    assert prepare.separated(scenario, at_sites=True).data.files.separator == ";"  # by the server's own rows
    train, test = reading.read(scenario.data, "multi_label")
    assert (train.labels, test.labels) == ([("a", "b"), ("c;d",), ("e",)], [("c;d",), ("e",)])
    assert reading.set_aside(found.data, "multi_label", test)[1].labels == [("c;d",)]


@pytest.mark.parametrize(
    ("cells", "labels", "mark"),
    [
        (["a;b,c", "d"], (), ";"),
        (["a;b,c", "d"], ("a;b", "c", "d"), ","),  # labels that are named have the other mark
        (["a", "b"], (), "|"),  # nothing to find: other files are read by none
        (["a", "b"], ("a|b",), None),
        ([["a", "b"], None], (), None),
    ],
)
def test_a_mark_that_labels_have_does_not_separate_them(cells, labels, mark):
    assert separator(cells, labels) == mark


def test_a_run_tells_what_stood_between_labels_and_evaluates_by_it(tiny, films, tmp_path):
    run = simulate(tiny(*told(films, "rounds=1")), out=tmp_path / "run")
    assert run.scenario["data"]["files"]["separator"] == "|"
    (file := tmp_path / "more.csv").write_text("text,labels\na film,good;sad\n")
    with pytest.raises(UserError, match="row 1: labels that the run does not know, good;sad;"):
        evaluate(run, file)
    pooled = derive(prepare.separated(tiny(*told(films, "rounds=1"))), "pooled")
    assert pooled.baseline.of == configuration(run.scenario)


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        (["a", "a||b"], "row 2: 'labels' has an empty label"),
        (["", ""], "no row has a label in 'labels'"),
        ([["a"], [None]], "row 2: 'labels' is no list of labels"),
        ([["a"], {"a": 1}], "row 2: 'labels' is no list of labels"),
        ([["a"], [["b"]]], "row 2: 'labels' is no list of labels"),
        ([["a"], [float("nan")]], "row 2: 'labels' is no list of labels"),
    ],
)
def test_a_bad_cell_is_told_by_file_row_and_column(cells, what, tmp_path):
    (file := tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"secret {i}", "labels": cell}) + "\n" for i, cell in enumerate(cells))
    )
    with pytest.raises(SettingError) as caught:
        rows(file)
    assert what in caught.value.message and str(file) in caught.value.message
    assert caught.value.key == "data.files.label" and "secret" not in caught.value.message


def test_a_threshold_between_those_that_are_counted_is_a_line():
    with pytest.raises(SettingError, match=r"at the threshold 0\.33 are not counted: take one of 0\.01, "):
        figures({}, 0.33)


def test_a_label_that_the_run_does_not_know_is_refused(tiny, films, tmp_path):
    (test := tmp_path / "test.csv").write_text("text,labels\nx,good|strange\n")
    asked = [t for t in told(films) if "validation" not in t]
    with pytest.raises(UserError, match=r"the test set has labels that the training set has not.*strange"):
        simulate(tiny(*asked, f"data.files.test={test}"), out=tmp_path / "run")
    with pytest.raises(UserError, match=r"labels that it does not name.*long"):
        simulate(tiny(*told(films, "data.labels=[good, sad]")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_between_labels_is_for_this_task_alone(tiny):
    with pytest.raises(UserError, match="separator is for task: multi_label, and the task is classification"):
        tiny("data.files.separator='|'")


def test_fewer_examples_pack_as_they_pad(tiny_base):
    from fedlora.data.store import Examples

    task = loading.load(
        "multi_label", tiny_base, Lora(4, 8, ("query", "value")), labels=LABELS, seed=3, max_length=24
    )
    rng = np.random.default_rng(1)
    lengths = (3, 11, 6, 8)
    held = rng.integers(0, 2, (4, 3)).astype(np.uint8)
    some = Examples(rng.integers(5, 3000, sum(lengths)).astype(np.int32), np.cumsum([0, *lengths]), held)
    task.begin({}, ())
    packed = task.losses(task.batch(some, np.arange(4)))
    assert task.packing is not None
    with task.packing.away():
        padded = task.losses(task.batch(some, np.arange(4)))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_lists_of_the_hub_are_told_by_the_names_of_their_classes(tmp_path):
    import datasets

    from fedlora.scenario import Data

    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["joy", "grief"]))}
    )
    held = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": [[1, 0], []]}, features=features)
    datasets.DatasetDict({"train": held, "test": held}).save_to_disk(str(tmp_path / "saved"))
    train, _ = reading.read(Data(hub={"path": str(tmp_path / "saved"), "label": "labels"}), "multi_label")
    assert train.labels == [("grief", "joy"), ()]
