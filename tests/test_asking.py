"""`predict` and `generate` from files and into files."""

import csv
import json

import pandas as pd
import pytest

from fedlora import export, generate, predict, simulate
from fedlora.cli import main
from fedlora.data.chats import Turn
from fedlora.errors import UserError
from tests.tasks.test_causal_lm import chat_base

ASKED = ["note 2 says the film was great here", "note 3 says the film was awful here"]


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory):
    """A run of classification."""
    return simulate(tiny("rounds=1", private=False), out=tmp_path_factory.mktemp("runs") / "judge")


@pytest.fixture(scope="module")
def writer(tiny, tiny_lm, tmp_path_factory):
    """A run of prompts that two columns make."""
    folder = tmp_path_factory.mktemp("writer")
    rows = [{"ask": f"say {i}", "hint": "" if i % 2 else "soon", "text": f"{i}"} for i in range(40)]
    (file := folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = ("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj]", "rounds=1")
    told += (f"data.files={{train: '{file}', label: text}}", "data.prompt='{ask} {hint}'")
    return simulate(tiny(*told, "clients.batch_size=4", private=False), out=folder / "run")


@pytest.fixture(scope="module")
def talker(tiny, tiny_lm, tmp_path_factory):
    """A run of chats."""
    folder = tmp_path_factory.mktemp("talker")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (file := folder / "x.jsonl").write_text("\n".join(json.dumps({"talk": turns}) for _ in range(40)) + "\n")
    base = chat_base(folder / "lm", tiny_lm)
    told = ("task=causal_lm", f"model.base={base}", "model.adapter.targets=[q_proj]", "rounds=1")
    told += (f"data.files={{train: '{file}', test: '{file}'}}", "data.messages=talk", "data.max_length=24")
    return simulate(tiny(*told, "clients.batch_size=4", private=False), out=folder / "run")


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_predict_reads_a_file_and_writes_one(judge, tmp_path, kind, capsys):
    file, out = tmp_path / f"x.{kind}", tmp_path / "answers.jsonl"
    table = pd.DataFrame({"text": ASKED})
    {
        "txt": lambda: file.write_text("\n".join(ASKED) + "\n\n"),
        "csv": lambda: table.to_csv(file, index=False),
        "jsonl": lambda: table.to_json(file, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(file),
    }[kind]()
    assert main(["predict", str(judge.folder), "--data", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 answers\n"
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made == [vars(answer) for answer in predict(judge, ASKED)]


def test_answers_are_a_csv_or_tsv_too_and_a_column_is_named(judge, tmp_path):
    (file := tmp_path / "x.csv").write_text('said\n"a, b"\n')
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        out = tmp_path / f"out{suffix}"
        assert main(["predict", str(judge.folder), "--data", str(file), "--text", "said", "--out", str(out)]) == 0
        (row,) = csv.DictReader(out.read_text().splitlines(), delimiter=mark)
        assert row["text"] == "a, b" and row["answer"] in ("good", "bad") and 0.5 <= float(row["probability"]) <= 1


@pytest.mark.parametrize(
    "command, what",
    [
        (["predict"], "predict: give texts, or a file of them by --data"),
        (["predict", "x", "--data", "x.csv"], "predict: give texts, or a file of them by --data"),
        (["predict", "x", "--out", "x.xls"], "x.xls: .xls is not one of .jsonl, .csv, .tsv"),
        (["predict", "x", "--out", "no/x.csv"], "no: no such folder"),
        (["predict", "--data", "no.txt"], "no.txt: cannot be read"),
        (["predict", "--data", "no.csv"], "no such file: no.csv"),
        (
            ["predict", "--data", "x.csv", "--text", "txet"],
            "x.csv has no column 'txet': did you mean 'text'? (--text)",
        ),
        (["predict", "--data", "x.csv"], "x.csv: row 2: 'text' is empty"),
        (["predict", "--data", "none.csv"], "none.csv: holds no text"),
        (["generate", "x"], "its task is classification, which writes no text: ask it with fedlora predict"),
    ],
)
def test_what_cannot_be_asked_is_one_line(judge, tmp_path, monkeypatch, capsys, command, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text('text\nsecret\n""\n')
    (tmp_path / "none.csv").write_text("text\n")
    assert main([command[0], str(judge.folder), *command[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line and "secret" not in line


def test_several_prompts_at_once_have_the_completions_of_each_alone(writer):
    prompts = ["say 1", "say something long and longer", "x"] * 4
    together = [answer.answer for answer in generate(writer, prompts, 5)]
    assert together == [generate(writer, [prompt], 5)[0].answer for prompt in prompts[:3]] * 4
    assert [answer.answer for answer in predict(writer, prompts, 5)] == together and any(together)


def test_what_is_drawn_follows_its_seed_and_its_temperature(writer):
    def drawn(**how):
        return [answer.answer for answer in generate(writer, ["say 1", "say 2"], 8, **how)]

    one = drawn(temperature=1.0, seed=3)
    assert one == drawn(temperature=1.0, seed=3) != drawn(temperature=1.0, seed=4)
    assert drawn(temperature=1.0, top_p=1e-9) == drawn() == drawn(seed=9) != one


@pytest.mark.parametrize(
    "how", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}, {"max_new_tokens": 0}]
)
def test_numbers_out_of_range_are_one_line(writer, how):
    with pytest.raises(UserError, match=f"{next(iter(how))}: should be"):
        generate(writer, ["x"], **how)


@pytest.mark.parametrize("exported", [False, True])
def test_prompts_of_a_file_are_made_by_the_runs_template(writer, tmp_path, exported, capsys):
    (file := tmp_path / "x.jsonl").write_text('{"ask": "say", "hint": "soon"}\n{"ask": "say", "hint": ""}\n')
    run = export(writer, tmp_path / "adapter") if exported else writer.folder
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(run), "--prompts", str(file), "--max-new-tokens", "3", "--out", str(out)]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made == [vars(answer) for answer in generate(writer, ["say soon", "say "], 3)]


def test_chats_of_a_file_are_gone_on_with(talker, tmp_path, capsys):
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "x"},
    ]
    (file := tmp_path / "x.jsonl").write_text(json.dumps({"talk": turns}) + "\n" + json.dumps({"talk": turns[:2]}))
    assert main(["generate", str(talker.folder), "--prompts", str(file), "--max-new-tokens", "3"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    (told,) = generate(talker, [(Turn("system", "be brief"), Turn("user", "one"))], 3)
    assert first == second == f"{told.answer}  one"
    file.write_text(json.dumps({"talk": [turns[0]]}))
    assert main(["generate", str(talker.folder), "--prompts", str(file)]) == 2
    assert capsys.readouterr().err == f"{file}: row 1: 'talk' has no turn of the user\n"


def test_evaluate_judges_a_run_of_chats(talker, capsys):
    rows = talker.scenario["data"]["files"]["train"]
    assert main(["evaluate", str(talker.folder), "--data", rows, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["perplexity"] == pytest.approx(
        talker.summary["perplexity"], rel=1e-4
    )
