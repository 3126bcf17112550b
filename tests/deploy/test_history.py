"""`fedlora site log`: who asked what of a site, what it cost, and why it was refused."""

import json
import subprocess

import pytest

from fedlora import wire
from fedlora.cli import main
from fedlora.deploy import history, signing
from fedlora.deploy.history import History, read
from fedlora.privacy import ledger
from tests.deploy.federation import meet, refusal


def told(made):
    return read(made.state.folder / history.NAME)


def test_each_introduction_and_each_round_is_a_line(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)
    for round in (1, 2, 2):
        made.answer("train", train(round), 0)
    assert "was promised" in refusal(made, train(1))
    lines = told(made)
    assert [(line["what"], line["round"], line["outcome"]) for line in lines] == [
        ("introduction", None, "answered"),
        ("round", 1, "answered"),
        ("round", 2, "answered"),
        ("round", 2, "answered again"),
        ("round", 1, "refused"),
    ]
    assert {(line["run"], line["scenario"], line["strategy"], line["task"]) for line in lines} == {
        ("tiny-1", "tiny", "ffa_lora", "classification")
    }
    assert {(line["epsilon_asked"], line["submitter"], len(line["digest"])) for line in lines} == {(8.0, None, 16)}
    spent = [line["epsilon_spent"] for line in lines]
    assert spent[0] == 0 and spent[1] < spent[2] == spent[3] == spent[4] <= 8
    assert lines[2]["epsilon_site"] == made.epsilon == pytest.approx(spent[2])
    assert "another round would make epsilon" in lines[4]["why"] and lines[1]["why"] is None


def test_the_owner_reads_the_whole_reason_and_no_text(server, node, capsys):
    words, files, train = server()
    meet(made := node(files[0]), words)

    def fail(*_):
        raise ValueError("a text of an example")

    made.run.worker.client.fit = fail
    assert refusal(made, train(1)) == "training failed: its log says why"
    rows = files[0].parent / "train.csv"
    rows.write_text(rows.read_text().replace("text,label", "text,kind"))
    assert "its log says why" in meet(made, {**words, "run": "tiny-2"})["refused"]
    assert "its own" not in meet(made, {**words, "version": "0\x1b[2J" + "9" * 999})["refused"]
    made.close()
    assert main(["site", "log", str(files[0])]) == 0
    said = capsys.readouterr().out
    assert "training failed (ValueError): site.log says more" in said and "a text of" not in said
    assert "site.yaml:" in said and "data.label" in said  # which the server is not told
    assert "\x1b" not in said and "0?[2J999" in said and max(map(len, said.splitlines())) < 900
    assert main(["site", "log", str(files[0]), "--json"]) == 0
    assert [line["outcome"] for line in json.loads(capsys.readouterr().out)] == ["answered"] + 3 * ["refused"]


def test_who_signed_is_named_by_the_key(server, node, tmp_path):
    words, files, train = server("data.labels=[bad, good]")
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab 7", "-f", tmp_path / "key"]
    subprocess.run(command, check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    files[0].write_text(files[0].read_text().replace("own_code: false", f"submitters: {json.dumps([public])}"))
    meet(node(files[0]), words)
    signature = signing.sign(tmp_path / "key", words["scenario"], "tiny-1", tmp_path / "app")
    meet(node(files[0]), {**words, "signature": signature})
    refusal(made := node(files[0]), train(1))  # after a restart
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "key.pub"], check=True, capture_output=True, text=True)
    name = f"{shown.stdout.split()[1]} lab 7"
    assert [line["submitter"] for line in told(made)] == [None, name, name]


def test_what_cannot_be_read_of_a_message_is_a_line_too(server, node):
    words, files, train = server()
    made = node(files[0])
    meet(made, {**words, "scenario": {"name": 7, "privacy": {"epsilon": 10**400}, "strategy": "?"}})
    refusal(made, train(1, run="tiny-9"))
    made.answer("query.keys", wire.pack_words({"run": "../x"}), 0)
    assert [(line["what"], line["run"], line["scenario"], line["epsilon_asked"]) for line in told(made)] == [
        ("introduction", "tiny-1", "7", None),
        ("round", "tiny-9", None, None),
        ("query.keys", "../x", None, None),
    ]


def test_a_training_that_was_paid_is_answered_though_the_record_cannot_be_written(server, node, caplog):
    words, files, train = server()
    meet(made := node(files[0]), words)
    made.history.file.unlink()
    made.history.file.mkdir()
    assert refusal(made, train(1)) is None
    assert "history.jsonl: cannot be written: Is a directory" in caplog.text
    assert len(ledger.replay(made.state.folder / "ledger" / "privacy.jsonl")) == 1


@pytest.fixture
def record(tmp_path):
    made = History(tmp_path)
    for round in (1, 2, 3):
        made.write("round", "answered", round=round)
    return tmp_path / history.NAME


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: f.write_text(f.read_text().replace('"round": 2', '"round": 4')),
            "history.jsonl:2: does not follow",
        ),
        (lambda f: f.write_text("".join(f.read_text().splitlines(True)[:2])), "history.jsonl:3: was cut"),
        (lambda f: f.unlink(), "history.jsonl:1: was cut"),
        (lambda f: f.with_suffix(".head").unlink(), "history.head: is missing"),
        (lambda f: f.write_text("?\n"), "history.jsonl:1: not a line of JSON"),
        (lambda f: f.write_text('{"time": 1}\n'), "history.jsonl:1: lacks or garbles 'time'"),
    ],
)
def test_damage_is_one_line_and_stays_one_whatever_is_written_after_it(record, tmp_path, capsys, harm, message):
    (site := tmp_path / "site.yaml").write_text(
        f"name: a\nclient: 0\nstate: {tmp_path}\ndata: {{train: a.csv, text: text}}\n"
    )
    harm(record)
    for seen in (message, "history.", "history."):
        assert main(["site", "log", str(site)]) == 2
        said = capsys.readouterr().err
        assert seen in said and said.count("\n") == 1
        History(tmp_path).write("round", "answered", round=9)
    assert '"round": 9' in record.read_text()


def test_an_interruption_is_no_damage(record, tmp_path):
    with record.open("a") as stream:
        stream.write('{"time": "2026')
    assert [line["round"] for line in read(record)] == [1, 2, 3]
    History(tmp_path).write("round", "answered", round=4)
    assert [line["round"] for line in read(record)] == [1, 2, 3, 4]
    head = record.with_suffix(".head")
    before = head.read_text()
    History(tmp_path).write("round", "answered", round=5)
    head.write_text(before)  # it died before it counted the line
    assert len(read(record)) == 5


def test_nothing_was_asked_yet(tmp_path):
    assert read(tmp_path / history.NAME) == [] and history.table([]) == ["nothing was asked of this site yet"]
