"""What is refused of JSON, and told of a file that was cut: by line and row, and never by text."""

import json
import logging

import pytest

from fedlora import scenario
from fedlora.cli import main
from fedlora.data import delimited, records
from fedlora.data.cells import Column, check_whole, halved
from fedlora.data.reading import read
from fedlora.errors import ScenarioError, SettingError

HALF = "\\ud800"  # as JSON spells it


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "has a key twice", 2),
        ('[{"text": "a"}, {"text": "b", "text": "c"}]', "row 2 has a key twice", 1),
        ('\n[\n{"text": "a"},\n{"text": "b",\n"text": "c"}]', "row 2 has a key twice", 2),
        ('{"m": [{"role": "user", "role": "system"}]}\n', "has a key twice", 1),
        ('{"text": ["a"], "text": ["b"]}', "has a key twice", 1),
        ('{"data": [{"text": "a", "text": "b"}]}', "has a key twice", 1),
        (f'{{"x{HALF}": "a"}}\n', "the name of a column holds half of a character", 1),
    ],
)
def test_a_row_that_would_lose_something_is_refused(text, said, line):
    with pytest.raises(delimited.Torn, match=said) as raised:
        records.read(text, ".json")
    assert raised.value.line == line


def test_equal_keys_of_different_objects_are_fine():
    assert records.read('{"a": {"b": 1}, "b": {"b": 2}}\n', ".jsonl") == {"a": [{"b": 1}], "b": [{"b": 2}]}


@pytest.mark.parametrize(
    ("cell", "half"),
    [
        ("a\ud800", True),
        ("\udfff", True),
        (["a", "b\udc00"], True),
        ([{"role": "user", "content": "\ud83d"}], True),
        ({"\ud800": 1}, True),
        ("\U0001f600", False),
        (["ok", 3, None], False),
        (1.5, False),
    ],
)
def test_half_of_a_character_is_found_wherever_it_is(cell, half):
    assert halved(cell) is half
    if half:
        with pytest.raises(SettingError, match=r"f.jsonl: row 2: 'x' holds half of a character"):
            check_whole(["a", cell], Column("data.files.text", "f.jsonl", "x"))


TASKS = {
    "classification": ({"text": "t%d", "label": "%c"}, "text: text, label: label"),
    "multi_label": ({"text": "t%d", "label": ["a", "b"]}, "text: text, label: label"),
    "token_classification": ({"text": ["t%d"], "label": ["O"]}, "text: text, label: label"),
    "causal_lm": ({"text": "t%d", "label": "so"}, "text: text, label: label"),
    "preference": ({"text": "t%d", "label": "so", "other": "no"}, "text: text, label: [label, other]"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("column", ["text", "label"])
def test_every_column_of_a_task_is_looked_at(task, column, tmp_path, capsys):
    row, named = TASKS[task]
    rows = [json.dumps(row).replace("%d", str(i)).replace("%c", "ab"[i % 2]) for i in range(20)]
    cell = json.loads(rows[4])[column]
    rows[4] = json.dumps({**json.loads(rows[4]), column: ["\ud800"] if isinstance(cell, list) else "\ud800"})
    (file := tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (told := tmp_path / "s.yaml").write_text(
        f"name: x\ntask: {task}\ndata: {{files: {{train: {file}, {named}}}}}\nclients: {{total: 2}}\n"
    )
    assert main(["check", str(told)]) == 2
    said = capsys.readouterr().err
    assert f"{file}: row 5: '{column}' holds half of a character" in said and said.count("\n") == 1
    assert main(["check", str(told), "--json"]) == 2 and "row 5" in capsys.readouterr().out


def test_natural_columns_and_chats_are_looked_at(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\ud800"}]
    rows = [{"text": "a", "label": "b", "site": "\udc00", "m": turns}]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, name in (
        ("partition: {kind: natural, column: site}", "site"),
        ("messages: m}\ntask: causal_lm\nx: {", "m"),
    ):
        text = f"name: x\ndata: {{files: {{train: {file}}}, {more}}}\nclients: {{total: 2}}\n"
        told = scenario.parse(text.replace("x: {}\n", ""))
        with pytest.raises(SettingError, match=f"row 1: '{name}' holds half"):
            read(told.data, told.task)


@pytest.mark.parametrize("text", ['name: "a\\ud800"\n', '"a\\ud800": 1\nname: x\n'])
def test_half_of_a_character_in_a_scenario_is_a_line_that_can_be_printed(text):
    with pytest.raises(ScenarioError) as raised:
        scenario.parse(text)
    str(raised.value).encode()
    assert "ud800" in str(raised.value)


def test_a_last_row_that_may_be_half_is_told(caplog):
    whole = "text,label\n" + "".join(f"t{i},{'good' if i % 2 else 'bad'}\n" for i in range(10))
    for text, told in (
        (whole + "t,goo", 1),
        (whole + "t,", 1),
        (whole + "t,goo\n", 0),
        (whole + "t,good", 0),
        ("text\na\nb\nc", 0),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            delimited.read(text, ".csv", None, "f.csv")
        assert len(caplog.messages) == told and all(
            "f.csv: its last line has no end" in m for m in caplog.messages
        )
    with pytest.raises(delimited.Torn, match="has 1 cell"):
        delimited.read(whole + "t", ".csv", None, "f.csv")
    with pytest.raises(delimited.Torn, match="a quote opens"):
        delimited.read(whole + '"t', ".csv", None, "f.csv")
