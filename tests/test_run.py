"""Run folders in every state in which a person meets them."""

import json

import pytest
from safetensors.numpy import load_file

import fedlora
from fedlora import simulate
from fedlora.errors import UserError
from fedlora.run import Run


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A run that learns."""
    learns = ("clients.optimizer=adamw", "clients.lr=0.02", "clients.local_steps=10")
    return simulate(tiny(*learns, private=False), out=tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def folder(made, tmp_path):
    import shutil

    return shutil.copytree(made.folder, tmp_path / "run")


def test_what_is_done_with_a_run_is_what_the_functions_do(made, tmp_path):
    run = Run.open(made.folder)
    assert run.adapter == made.folder / "adapter"
    assert run.state_dict().keys() == load_file(run.adapter / "adapter_model.safetensors").keys()
    assert run.report(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert run.predict(["a fine film"]) == fedlora.predict(made.folder, ["a fine film"])
    (data := tmp_path / "rows.csv").write_text("text,label\na fine film,good\na poor one,bad\n")
    assert run.evaluate(data).metrics == fedlora.evaluate(made, data).metrics
    assert (run.export(tmp_path / "copy") / "adapter_config.json").is_file()
    assert type(made) is Run and type(run.by("loss")) is Run


def test_what_is_opened_is_what_was_made(made):
    run = Run.open(str(made.folder))
    assert run.summary == made.summary and run.rounds == made.rounds and run.state == "finished"
    assert run.remarks() == [] and run.metric == "accuracy" and run.scenario["name"] == "tiny"
    assert sum(c["num_examples"] for c in run.partitions["clients"]) == sum(
        line["num_examples"] for line in run.clients if line["round"] == 1
    )


def test_a_frame_has_a_row_for_each_line(made):
    rounds, clients = made.frame(), made.frame("clients")
    assert rounds["round"].tolist() == [1, 2] and len(clients) == 8
    assert clients.groupby("round")["bytes_up"].sum().tolist() == rounds["bytes_up"].tolist()


def test_plot_is_a_chart_of_the_metric(made):
    spec = made.plot().to_dict()
    assert [r["accuracy"] for r in next(iter(spec["datasets"].values()))] == [r["accuracy"] for r in made.rounds]


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(folder):
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 3, "acc')
    run = Run.open(folder)
    assert run.state == "unfinished" and len(run.rounds) == 2 and run.summary == {} and run.metric == "accuracy"
    assert run.remarks() == ["This run has not ended, 2 of 2 rounds are recorded. It still runs, or was killed."]


def test_a_resumed_run_is_newer_than_its_summary(folder):
    summary = json.loads((folder / "summary.json").read_text()) | {"rounds": 1, "stopped": "interrupted"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert Run.open(folder).state == "unfinished"
    (folder / "summary.json").write_text(json.dumps(summary | {"rounds": 2}))
    run = Run.open(folder)
    assert run.state == "stopped" and run.remarks() == ["This run stopped early, interrupted: 2 of 2 rounds."]


def test_a_run_of_another_version_says_so_and_is_read(folder):
    summary = json.loads((folder / "summary.json").read_text())
    summary["versions"]["fedlora"] = "0.0.1"
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "scenario.yaml").write_text("name: old\nkey_of_old: 1\n")
    (folder / "clients.jsonl").unlink()
    run = Run.open(folder)
    old, absent = run.remarks()
    assert old.startswith("Written by fedlora 0.0.1, read by ") and absent == "Not in the folder: clients.jsonl."
    assert run.clients == [] and run.scenario["key_of_old"] == 1


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "scenario.yaml").unlink(), "holds no run: scenario.yaml is missing"),
        (lambda f: (f / "summary.json").write_text("{"), "summary.json: not JSON"),
        (lambda f: (f / "summary.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "scenario.yaml").write_text("- a"), "holds no scenario"),
        (lambda f: (f / "metrics.jsonl").write_text("nonsense\n"), "metrics.jsonl:1: not a line of JSON"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError) as caught:
        run = Run.open(folder)
        _ = run.rounds, run.scenario
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Run.open(tmp_path / "none")


@pytest.mark.parametrize(
    "summary, expected",
    [
        ('{"accuracy": 0.5}', ("accuracy", True)),
        ('{"perplexity": 9.0}', ("perplexity", False)),
        ('{"metric": "hours_lost", "hours_lost": 1.0, "higher_is_better": false}', ("hours_lost", False)),
    ],
)
def test_a_summary_says_by_what_a_run_is_judged_and_what_is_better(tmp_path, summary, expected):
    (tmp_path / "scenario.yaml").write_text("name: x\n")
    (tmp_path / "summary.json").write_text(summary)
    run = Run.open(tmp_path)
    assert (run.metric, run.higher_is_better) == expected
