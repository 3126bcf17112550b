"""A new project runs at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora import Run
from fedlora.cli import main
from fedlora.scenario import load
from tests.test_readme import trims

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "project"
    assert main(["init", str(folder)]) == 0
    return folder


def python(project, *arguments):
    import os

    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240, env=environment)


def test_its_scenario_runs_with_its_strategy_and_is_what_its_schema_says(project, tiny_base, reviews):
    import jsonschema
    import yaml

    scenario = yaml.safe_load((project / "scenario.yaml").read_text())
    jsonschema.validate(scenario, json.loads((project / "scenario.schema.json").read_text()))
    assert main(["check", str(project / "scenario.yaml"), "--set", "strategy={use: ffa_lora}"]) == 0
    smaller = [f"model.base={tiny_base}", f"data.files={{train: '{reviews}'}}", "data.partition={kind: iid}"]
    sets = [part for s in [*smaller, "rounds=1", "privacy.delta=1.0e-3"] for part in ("--set", s)]
    done = python(project, "fedlora", "simulate", "scenario.yaml", "--out", "runs/first", *sets)
    assert done.returncode == 0, done.stderr
    assert Run.open(project / "runs" / "first").summary["strategy"] == "trimmed_mean:TrimmedMean"


def test_its_own_test_passes(project):
    done = python(project, "pytest", "-q", "test_trimmed_mean.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_folder_with_something_in_it_is_left_alone(project, capsys):
    assert main(["init", str(project)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.fixture
def mine(tmp_path):
    """Columns in an order that helps nobody: ids, labels, dates and texts."""
    rows = ["id,kind,day,question"]
    rows += [
        f"{i},{('place', 'person', 'number')[i % 3]},2026-01-{i % 28 + 1:02},what is number {i} of them"
        for i in range(90)
    ]
    (file := tmp_path / "my questions.csv").write_text("\n".join(rows) + "\n")
    return file


def test_a_project_of_ones_own_data_finds_texts_and_labels_and_runs(mine, tmp_path, tiny_base, capsys):
    folder = tmp_path / "study"
    assert main(["init", str(folder), "--data", str(mine)]) == 0
    assert "90 rows, 3 values of 'kind' to be learnt from 'question'" in capsys.readouterr().out
    scenario = load(folder / "scenario.yaml")
    assert (scenario.data.files.text, scenario.data.files.label, scenario.name) == (
        "question",
        "kind",
        "my-questions",
    )
    assert scenario.data.max_length == 32 and scenario.clients.use == "dp_sgd"
    sets = ["rounds=2", f"model.base={tiny_base}", "model.adapter.layers=[1]", "clients.sample_rate=0.2"]
    told = [part for s in sets for part in ("--set", s)]
    assert main(["simulate", str(folder / "scenario.yaml"), "--out", str(tmp_path / "run"), *told]) == 0
    assert Run.open(tmp_path / "run").summary["rounds"] == 2


@pytest.mark.parametrize(("rows", "rate"), [(90, 1.0), (25_000, 0.8)])
def test_labels_of_texts_begin_with_the_mean_and_with_large_steps(rows, rate, tmp_path):
    """A step takes 20,000 rows of all clients at most."""
    table = ["kind,question", *(f"{i % 3},what is number {i} of them" for i in range(rows))]
    (tmp_path / "own.csv").write_text("\n".join(table) + "\n")
    assert main(["init", str(tmp_path / "study"), "--data", str(tmp_path / "own.csv")]) == 0
    made = load(tmp_path / "study" / "scenario.yaml")
    assert (made.model.pooling, made.clients.sample_rate, made.rounds) == ("mean", rate, 20)


def test_what_judges_no_text_by_one_label_begins_as_it_did(tmp_path):
    table = ["score,answer", *(f"{i / 90},what is number {i} of them" for i in range(90))]
    (tmp_path / "own.csv").write_text("\n".join(table) + "\n")
    told = ["--task", "regression", "--data", str(tmp_path / "own.csv")]
    assert main(["init", str(tmp_path / "study"), *told]) == 0
    made = load(tmp_path / "study" / "scenario.yaml")
    assert (made.model.pooling, made.clients.sample_rate, made.rounds) == (None, 0.06, 60)


def test_the_strategy_of_a_new_project_trims_any_three(project):
    names: dict = {"__name__": "mine"}
    exec((project / "trimmed_mean.py").read_text(), names)
    trims(names["TrimmedMean"])


def test_what_the_readme_of_a_project_says_of_ones_own_strategy_works_as_printed(
    mine, tmp_path, monkeypatch, capsys
):
    import re
    import shlex

    folder = tmp_path / "study"
    assert main(["init", str(folder), "--data", str(mine)]) == 0
    monkeypatch.chdir(folder)
    (line,) = re.findall(r"^fedlora simulate (.*trimmed_mean:.*) --out", (folder / "README.md").read_text(), re.M)
    assert main(["check", *shlex.split(line)]) == 0
    beside = ["check", "scenario.yaml", "--set", "strategy.use=trimmed_mean:TrimmedMean"]
    assert main(beside) == 2
    said = re.search(r"\((--set strategy.server=null)\)", capsys.readouterr().err)
    assert main([*beside, *shlex.split(said[1])]) == 0


def test_columns_may_be_named(mine, tmp_path):
    folder = tmp_path / "study"
    assert main(["init", str(folder), "--data", str(mine), "--text", "day", "--label", "kind"]) == 0
    assert load(folder / "scenario.yaml").data.files.text == "day"


@pytest.mark.parametrize(
    "told, said",
    [
        (["--text", "questoin"], "has no column 'questoin': did you mean 'question'?"),
        (["--label", "id2"], "has no column 'id2'"),
    ],
)
def test_a_column_that_is_not_there_is_told(mine, tmp_path, capsys, told, said):
    assert main(["init", str(tmp_path / "study"), "--data", str(mine), *told]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "study").exists()


def test_what_is_no_table_is_told(tmp_path, capsys):
    (tmp_path / "one.csv").write_text("text\na\nb\n")
    assert main(["init", str(tmp_path / "study"), "--data", str(tmp_path / "one.csv")]) == 2
    assert "no column looks like labels" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "study"), "--data", str(tmp_path / "none.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "study"), "--label", "kind"]) == 2
    assert "--data FILE" in capsys.readouterr().err


@pytest.mark.parametrize("stem", ["2024", "null", "1_000", "on"])
@pytest.mark.parametrize("column", ["k\u2028trackers: [wandb] #", 'say "what"', "k: {a", "\x80", "ü"])
def test_no_name_of_a_file_or_column_is_more_than_a_name(tmp_path, stem, column):
    import csv

    with (file := tmp_path / f"{stem}.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", column], *([f"text {i}", "xy"[i % 2]] for i in range(20))])
    assert main(["init", str(tmp_path / "study"), "--data", str(file)]) == 0
    made = load(tmp_path / "study" / "scenario.yaml")
    assert (made.name, made.data.files.label, made.trackers) == (stem, column, ())


@pytest.mark.parametrize(
    ("rows", "told", "said"),
    [
        (["text,k", "a long text,x", "another text,x"], ["--label", "k"], "'k' has one value"),
        (["text,k", "a long text,x", "another text,y"], ["--text", "k", "--label", "k"], "cannot be both"),
        (["text,k", "a long text,x", "another text,", "a text,y"], ["--label", "k"], "row 2 has no 'k'"),
    ],
)
def test_labels_that_cannot_be_learnt_are_told(tmp_path, capsys, rows, told, said):
    (file := tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    assert main(["init", str(tmp_path / "study"), "--data", str(file), *told]) == 2
    assert said in capsys.readouterr().err


def test_a_table_of_another_encoding_has_it_in_its_scenario(tmp_path, capsys):
    (file := tmp_path / "a.csv").write_text(
        "".join(["text,k\n", *(f"caf\u00e9 {i},{'xy'[i % 2]}\n" for i in range(30))]), encoding="cp1252"
    )
    told = ["init", str(tmp_path / "study"), "--data", str(file)]
    assert main(told) == 2 and "such as --encoding cp1252, or save" in capsys.readouterr().err
    assert main([*told, "--encoding", "cp1251x"]) == 2
    assert "--encoding cp1251x: no encoding is called so" in capsys.readouterr().err
    assert main([*told, "--encoding", "cp1252"]) == 0
    assert load(tmp_path / "study" / "scenario.yaml").data.encoding == "cp1252"
    assert main(["check", str(tmp_path / "study" / "scenario.yaml")]) == 0


@pytest.mark.parametrize(
    ("rows", "told", "said"),
    [
        (
            [{"text": f"note {i}", "kind": "xy"[i % 2]} if i else {"text": "note 0"} for i in range(40)],
            [],
            "row 1",
        ),
        (
            [{"text": f"note {i}", "kind": {"name": "xy"[i % 2]}} for i in range(40)],
            ["--label", "kind"],
            "an object of keys",
        ),
        ([{"text": "same", "kind": "xy"[i % 2]} for i in range(40)], [], "test set is empty"),
        ([{"text": f"note {i}", "kind": "xy"[i % 2]} for i in range(4)], [], "5 clients, and only"),
        ([{"text": f"note {i}", "kind": "x"} for i in range(40)], [], "'kind' has one value, and no other column"),
    ],
)
def test_rows_that_check_would_refuse_are_refused(rows, told, said, tmp_path, capsys):
    (file := tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", str(tmp_path / "study"), "--data", str(file), *told]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and not (tmp_path / "study").exists()


TALK = [{"role": "user", "content": "how is it"}, {"role": "assistant", "content": "fine"}]
SPAN = {"start": 0, "end": 4, "label": "Name"}


@pytest.mark.parametrize(
    ("row", "told", "task", "keys"),
    [
        (
            lambda i: {"tokens": ["Ann", f"t{i}"], "tags": ["B-Name", "O"]},
            [],
            "token_classification",
            ("tokens", "tags"),
        ),
        (lambda i: {"note": f"Anna is {i}", "spans": [SPAN]}, [], "token_classification", ("note", "spans")),
        (lambda i: {"id": i, "messages": [{**TALK[0], "content": f"how is {i}"}, TALK[1]]}, [], "causal_lm", ()),
        (
            lambda i: {"prompt": f"say {i}", "chosen": "yes please", "rejected": "no"},
            [],
            "preference",
            ("prompt", ("chosen", "rejected")),
        ),
        (lambda i: {"text": f"a note {i}", "labels": ["x", "yz"[i % 2]]}, [], "multi_label", ("text", "labels")),
        (lambda i: {"text": f"a note {i}", "labels": f"x;{'yz'[i % 2]}"}, [], "multi_label", ("text", "labels")),
        (lambda i: {"text": f"a note {i}", "score": i / 7}, [], "regression", ("text", "score")),
        (
            lambda i: {"text": f"a note {i}", "stars": i % 5},
            ["--task", "regression"],
            "regression",
            ("text", "stars"),
        ),
        (
            lambda i: {"sentence1": f"note {i}", "sentence2": f"a longer note {i}", "score": i / 7},
            [],
            "regression",
            (("sentence1", "sentence2"), "score"),
        ),
        (
            lambda i: {"premise": f"a longer note {i}", "hypothesis": f"note {i}", "kind": "xy"[i % 2]},
            [],
            "classification",
            (("premise", "hypothesis"), "kind"),
        ),
        (lambda i: {"text": f"a note {i}", "stars": i % 5}, [], "classification", ("text", "stars")),
        (
            lambda i: {"ask": f"what is {i}", "say": f"it is {i}"},
            ["--task", "causal_lm", "--text", "ask", "--label", "say"],
            "causal_lm",
            ("ask", "say"),
        ),
    ],
)
def test_the_task_is_told_by_the_columns_and_the_scenario_is_fine(
    row, told, task, keys, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # check looks, and fetches nothing
    (file := tmp_path / "mine.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)))
    assert main(["init", str(tmp_path / "study"), "--data", str(file), *told]) == 0
    made = load(tmp_path / "study" / "scenario.yaml")
    assert made.task == task and (not keys or (made.data.files.text, made.data.files.label) == keys)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "study" / "scenario.yaml")]) == 0
    assert "fine" in capsys.readouterr().out
    if task == "regression":
        assert (made.data.score.low, made.data.score.high) == (0, 9 if keys[1] == "score" else 4)


@pytest.mark.parametrize(
    ("row", "told", "said"),
    [
        (
            lambda i: {"text": f"note {i}", "labels": f"x,{'yz'[i % 2]}"},
            [],
            "say --task multi_label or --task class",
        ),
        (lambda i: {"text": f"note {i}", "score": i}, [], "say --task classification or --task regression"),
        (
            lambda i: {"text": f"note {i}", "kind": "xy"[i % 2]},
            ["--task", "regression"],
            "no column looks like what task",
        ),
        (
            lambda i: {"text": f"note {i}", "kind": "xy"[i % 2]},
            ["--task", "regresion"],
            "did you mean 'regression'?",
        ),
    ],
)
def test_what_may_be_two_tasks_is_asked(row, told, said, tmp_path, capsys):
    (file := tmp_path / "mine.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)))
    assert main(["init", str(tmp_path / "study"), "--data", str(file), *told]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "study").exists()
