"""Metrics by name: found, tried out, refused with what to write instead."""

import subprocess
import sys

import numpy as np
import pytest

from fedlora.errors import ScenarioError, SettingError
from fedlora.metrics import contract
from fedlora.scenario import load

OWN = '''
def cost(outputs, targets, labels):
    """Five for each row of the second label that is missed."""
    return 5 * float(((outputs.argmax(-1) == 0) & (targets == 1)).mean())


cost.higher_is_better = False


def broken(outputs, targets, labels):
    return outputs["no"]


def nan(outputs, targets, labels):
    return float("nan")


def recall(outputs, targets, labels):
    return float((outputs.argmax(-1) == 1)[targets == 1].mean())


def accuracy(outputs, targets, labels):
    return 1.0


NUMBER = 3
'''


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_metrics", None)


def test_one_of_ones_own_says_which_way_is_better():
    cost, recall = contract.find_all(["my_metrics:cost", "my_metrics:recall"], "class")
    assert (cost.name, cost.higher_is_better, recall.higher_is_better) == ("cost", False, True)
    assert cost.of(np.float32([[0.6, 0.4], [0.1, 0.9]]), np.array([1, 1]), ("a", "b")) == 2.5


@pytest.mark.parametrize(
    ("use", "target", "words"),
    [
        ("macro_f2", "class", "unknown metric 'macro_f2': did you mean 'macro_f1'"),
        ("macro_f1", "start", "'macro_f1' is of labels or scores, and this task has none: leave it out"),
        ("my_metrics:cost", "start", "this task has none"),
        ("my_metrics:NUMBER", "class", "module 'my_metrics' has no function 'NUMBER'"),
        ("my_metrics:coost", "class", "has no function 'coost': did you mean 'cost'"),
        ("my_metrics:accuracy", "class", "another figure is called accuracy"),
        ("no_such:cost", "class", "cannot import 'no_such'"),
        ("a b:c", "class", "should read 'package.module:function'"),
    ],
)
def test_a_wrong_name_is_a_line(use, target, words):
    with pytest.raises(SettingError, match=words) as told:
        contract.find(use, target)
    assert told.value.key == "metrics" and "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["brier", "my_metrics:cost"])
def test_a_name_stands_once(name):
    with pytest.raises(SettingError, match="named twice"):
        contract.find_all([name, name], "class")


def test_one_of_ones_own_is_tried_before_a_run():
    told = contract.find_all([f"my_metrics:{n}" for n in ("cost", "recall", "nan", "broken")], "class")
    for labels in (("a", "b"), tuple("abcdefg")):
        for metric in told[:2]:
            contract.try_out(metric, "class", labels)
    with pytest.raises(SettingError, match="nan gives nan for made-up rows, and should a finite number"):
        contract.try_out(told[2], "class", ("a", "b"))
    with pytest.raises(SettingError, match="broken fails on made-up rows: IndexError"):
        contract.try_out(told[3], "class", ("a", "b"))


@pytest.mark.parametrize("target", contract.TARGETS)
def test_made_up_rows_are_as_the_target_says(target):
    seen = {}

    def look(outputs, targets, labels):
        seen.update(outputs=outputs, targets=targets)
        return 0.0

    contract.try_out(contract.Metric(name="look", function=look, takes=None), target, ("a", "b", "c"))
    assert seen["outputs"].shape == (12, 3) and seen["outputs"].dtype == np.float32
    assert seen["targets"].shape == ((12,) if target in ("class", "marks") else (12, 3))
    if target in ("class", "marks"):
        np.testing.assert_allclose(seen["outputs"].sum(-1), 1, rtol=1e-6)


def test_a_function_that_fails_in_a_run_is_none_and_said(caplog):
    metric = contract.find("my_metrics:broken", "class")
    assert metric.of(np.float32([[0.6, 0.4]]), np.array([1])) is None
    assert "the metric broken fails: IndexError" in caplog.text


def test_a_scenario_is_refused_by_file_and_line(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("name: s\ndata: {dataset: tweets}\nclients: {total: 2}\nmetrics: [macro_f2]\n")
    with pytest.raises(ScenarioError) as told:
        load(file)
    assert str(told.value).startswith(f"{file}:4: metrics: unknown metric 'macro_f2': did you mean 'macro_f1'")
    file.write_text("name: s\ndata: {dataset: tweets}\nclients: {total: 2}\nmetrics: macro_f1\n")
    with pytest.raises(ScenarioError, match=f"{file}:4: metrics: should be a list, not 'macro_f1'"):
        load(file)


def test_a_scenario_and_the_list_are_read_without_scikit_learn(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("name: s\ndata: {dataset: tweets}\nclients: {total: 2}\nmetrics: [macro_f1, ece]\n")
    code = (
        f"import sys; from fedlora.scenario import load; from fedlora.listing import TABLES; load({str(file)!r}); "
        "print(TABLES['metrics']()['ece'], {'torch', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "rows of one label, 0 to 1; less is better set()"
