"""`fedlora evaluate`: a finished run's adapter on any rows."""

import json

import pandas as pd
import pytest

from fedlora import evaluate, export
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.simulation import simulate


@pytest.fixture(scope="module", params=["ffa_lora", "fedex_lora"])
def run(request, tiny, reviews, tmp_path_factory):
    """Judged by all of its rows; one strategy merges into the base, so that its adapter has a higher rank."""
    told = (f"data.files.test={reviews}", f"strategy.use={request.param}", "metrics=[macro_f1, ece]")
    return simulate(tiny(*told, private=False), out=tmp_path_factory.mktemp("evaluate") / "run")


def test_the_rows_of_the_run_give_its_own_figures(run, reviews):
    made = evaluate(run, reviews)
    assert made.metrics.pop("loss") == pytest.approx(run.summary["loss"], abs=1e-4)
    assert list(made.metrics) == ["accuracy", "macro_f1", "ece"]
    assert made.metrics == pytest.approx(run.summary["metrics"], abs=1e-4)
    assert (made.rows, made.majority, made.labels) == (240, 0.5, ("bad", "good"))
    assert made.confusion == run.test["confusion"] and made.to_json()["classes"][0]["rows"] == 120
    again = evaluate(run.folder, reviews, ["brier"])
    assert list(again.metrics) == ["accuracy", "loss", "brier"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_rows_come_from_any_table_with_columns_of_any_name(run, reviews, tmp_path, suffix):
    table = pd.read_csv(reviews).rename(columns={"text": "note", "label": "kind"}).iloc[:9]
    file = tmp_path / f"rows.{suffix}"
    if suffix in ("csv", "tsv"):
        table.to_csv(file, index=False, sep="," if suffix == "csv" else "\t")
    elif suffix == "parquet":
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=suffix == "jsonl")
    made = evaluate(run, file, text="note", label="kind")
    assert (made.rows, made.majority) == (9, 5 / 9)


def test_an_exported_adapter_is_enough(run, reviews, tmp_path):
    folder = export(run, tmp_path / "adapter")
    assert evaluate(folder, reviews, ["macro_f1"]).metrics == pytest.approx(
        evaluate(run, reviews, ["macro_f1"]).metrics
    )


def test_rows_of_one_label_leave_a_figure_undefined(run, reviews, tmp_path, capsys):
    table = pd.read_csv(reviews)
    table[table["label"] == "bad"].to_csv(file := tmp_path / "bad.csv", index=False)
    assert main(["evaluate", str(run.folder), "--data", str(file), "--metrics", "auroc"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{run.folder} on 120 rows of {file}"
    told = {row.rsplit(maxsplit=1)[0].strip(): row.split()[-1] for row in rows}
    assert told["auroc"] == "undefined" and told["commonest label"] == "1.0000"
    assert main(["evaluate", str(run.folder), "--data", str(file), "--metrics", "auroc", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["auroc"] is None and told["confusion"][1] == [0, 0] and told["rows"] == 120


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ("text,label\nfine,good\nso so,fair\n", [], "row 2: labels that the run does not know, fair; it has bad"),
        ("text,label\n" + "a,no\n" * 7, [], "rows.csv: rows 1, 2, 3, 4, 5 and 2 more: labels that"),
        ("txt,label\nfine,good\n", [], "rows.csv has no column 'text': did you mean 'txt'? (--text)"),
        ("text,kind\nfine,good\n", [], "rows.csv has no column 'label': known: kind, text (--label)"),
        ("text,label\n", [], "rows.csv: holds no row"),
        ("text,label\nfine,good\n", ["--metrics", "macro_f2"], "unknown metric 'macro_f2': did you mean"),
        ("text,label\nfine,good\n", ["--text", "a", "b", "c"], "--text: name one column, or two of pairs"),
        (None, [], "no such file: "),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_a_line(run, tmp_path, capsys, rows, more, words):
    file = tmp_path / "rows.csv"
    if rows is not None:
        file.write_text(rows)
    assert main(["evaluate", str(run.folder), "--data", str(file), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and "fine" not in line


def test_a_language_model_is_judged_by_perplexity(tiny_lm, tmp_path):
    from fedlora.scenario import parse

    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"{i} and {i}", "answer": f"{2 * i} or so"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = simulate(
        parse(f"""
name: lm
task: causal_lm
model: {{base: "{tiny_lm}", adapter: {{r: 4, alpha: 8, targets: [q_proj, v_proj]}}}}
data: {{files: {{train: "{file}", test: "{file}", text: question, label: answer}}, max_length: 16}}
clients: {{total: 2, local_steps: 1, batch_size: 4, lr: 0.1}}
strategy: {{use: ffa_lora}}
rounds: 1
"""),
        out=tmp_path / "run",
    )
    told = evaluate(made, file)
    assert told.metrics["perplexity"] == pytest.approx(made.summary["perplexity"], rel=1e-3)
    assert (told.majority, told.confusion, told.rows) == (None, None, 40)
    with pytest.raises(UserError, match="'macro_f1' is of labels or scores, and this task has none"):
        evaluate(made, file, ["macro_f1"])


def test_own_code_is_not_imported_unasked(tiny, reviews, tmp_path, monkeypatch):
    (tmp_path / "own_figures.py").write_text(
        "def rows(outputs, targets, labels):\n    return float(len(targets))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = simulate(tiny("metrics=[own_figures:rows]", "rounds=1", private=False), out=tmp_path / "run")
    assert made.summary["metrics"]["rows"] == made.summary["test_examples"]
    assert "rows" not in evaluate(made, reviews).metrics
    assert evaluate(made, reviews, own_code=True).metrics["rows"] == 240


def test_a_task_of_one_s_own_that_changed_encodes_rows_anew(tiny, reviews, tmp_path, monkeypatch):
    """Else rows that were encoded for another version of it would be judged."""
    code = """
from dataclasses import replace
from fedlora.tasks.classification import Classification


class Own(Classification):
    @classmethod
    def encode(cls, *told):
        made = super().encode(*told)
        return replace(made, targets=[{} for _ in made.targets])
"""
    from fedlora.exporting import About
    from fedlora.prepare import encoding
    from fedlora.tasks.contract import find

    (tmp_path / "own_task.py").write_text(code.format(0))
    monkeypatch.syspath_prepend(str(tmp_path))
    made = simulate(tiny("task=own_task:Own", "rounds=1", private=False), out=tmp_path / "run")
    assert evaluate(made, reviews, own_code=True).majority == 1.0
    about, task = About.read(made.folder / "adapter"), find("own_task:Own")
    reader = task.reader(about.base, None)
    before = encoding(about.task, task, reader)
    (tmp_path / "own_task.py").write_text(code.format(1))
    assert encoding(about.task, task, reader) != before


@pytest.mark.parametrize("task", ["preference", "regression"])
def test_an_exported_adapter_of_several_columns_is_judged_by_all_of_them(
    task, tiny, tiny_lm, choices, tmp_path, capsys
):
    file = choices
    told = [f"model.base={tiny_lm}", "model.adapter.targets=[q_proj]"]
    if task == "regression":
        file, told = tmp_path / "rows.csv", ["data.score={low: 0, high: 9}"]
        file.write_text("text,one,two\n" + "".join(f"note {i},{i % 9},{i % 4}\n" for i in range(60)))
        told += [f"data.files={{train: {file}, label: [one, two]}}"]
    else:
        told += [f"data.files={{train: {file}}}"]
    run = simulate(tiny(f"task={task}", *told, "rounds=1", private=False), out=tmp_path / "run")
    folder = export(run, tmp_path / "adapter")
    if task == "preference":  # which columns these are is known
        assert evaluate(folder, file).metrics["accuracy"] == evaluate(run, file).metrics["accuracy"]
    label = "who" if task == "preference" else "one"
    for of in (run.folder, folder):
        assert main(["evaluate", str(of), "--data", str(file), "--label", label]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert ("2 columns of scores" in line) if task == "regression" else ("two columns, of completions" in line)


def test_rows_that_the_run_was_trained_on_are_counted_in_a_simulation_alone(tiny, reviews, tmp_path):
    """Of 240 rows a fifth is held out; of the file that is judged ten rows more are new."""
    made = simulate(
        tiny(f"data.files={{train: {reviews}, text: text, label: label}}", private=False), out=tmp_path / "run"
    )
    table = pd.read_csv(reviews)
    new = pd.DataFrame({"text": [f"new {i}" for i in range(10)], "label": "good"})
    pd.concat([table[["text", "label"]], new]).to_csv(file := tmp_path / "judged.csv", index=False)
    held = sum(c["num_examples"] for c in made.partitions["clients"])
    found = evaluate(made, file)
    assert found.trained == held == 240 - made.summary["test_examples"] and found.rows == 250
    assert f"{held} of 250 rows have a text that the run was trained on" in found.lines()[-1]
    folder = made.folder
    told = json.loads((folder / "partitions.json").read_text())
    (folder / "partitions.json").write_text(json.dumps(told | {"clients": []}))  # as at sites
    assert evaluate(folder, file).trained is None
    (folder / "partitions.json").write_text(json.dumps(told))
    (folder / "origin.json").write_text(json.dumps({"inputs": {"train": "others"}}))
    assert evaluate(folder, file).trained is None
