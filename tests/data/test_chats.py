"""Chats and prompts of several columns, from rows as people have them."""

import json
import logging

import pandas as pd
import pytest

from fedlora.data import reading
from fedlora.data.chats import Turn, shorter
from fedlora.errors import SettingError, UserError
from fedlora.scenario import Data, templates

OPEN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHARED = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in OPEN]
TURNS = tuple(Turn(**turn) for turn in OPEN)


def rows(folder, chats, **told):
    (file := folder / "x.jsonl").write_text("\n".join(json.dumps({"talk": chat}) for chat in chats))
    told = {"messages": "talk", **told}
    return reading.read(Data(files={"train": str(file), "test": str(file)}, **told), "causal_lm")[0]


@pytest.mark.parametrize("chat", [OPEN, SHARED], ids=["openai", "sharegpt"])
def test_both_shapes_are_turns_and_what_is_scored_is_all_or_the_last(chat, tmp_path):
    made = rows(tmp_path, [chat])
    assert made.texts == [TURNS] and made.labels == [("yes", "no")]
    assert rows(tmp_path, [chat], scored="last").labels == [("no",)]


def test_parquet_holds_chats_too(tmp_path):
    file = tmp_path / "x.parquet"
    pd.DataFrame({"talk": [OPEN, OPEN[:3]]}).to_parquet(file)
    data = Data(files={"train": str(file), "test": str(file)}, messages="talk")
    assert reading.read(data, "causal_lm")[0].texts == [TURNS, TURNS[:3]]


def test_what_the_user_says_last_is_left_out_and_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = rows(tmp_path, [OPEN[:4], OPEN])
    assert made.texts == [TURNS[:3], TURNS]
    assert "1 of 2 rows end with the user's turn, which is left out" in caplog.text


@pytest.mark.parametrize(
    "chat, what",
    [
        ([], "is an empty list"),
        ("secret", "should be a list of turns"),
        (["secret"], "turn 1 should be {role, content}"),
        ([OPEN[1], {"role": "secret", "content": "secret"}], "turn 2 has a role that is none of system, user"),
        ([OPEN[1], {"role": "assistant", "content": None}], "turn 2 has no text"),
        ([OPEN[1], OPEN[1], OPEN[2]], "turns 1 and 2 are both of the user"),
        ([OPEN[1], OPEN[2], OPEN[0]], "turn 3 is of the system"),
        ([OPEN[2]], "turn 1 is of the assistant, and answers no turn of the user"),
        ([OPEN[0], OPEN[2]], "turn 2 is of the assistant, and answers"),
        ([OPEN[0], OPEN[1]], "has no turn of the assistant"),
        ([OPEN[0]], "has no turn of the assistant"),
    ],
)
def test_what_is_no_chat_is_told_by_file_row_and_column_and_never_by_its_text(chat, what, tmp_path):
    with pytest.raises(SettingError) as caught:
        rows(tmp_path, [OPEN, chat])
    assert f"x.jsonl: row 2: 'talk' {what}" in str(caught.value) and caught.value.key == "data.messages"
    assert "secret" not in str(caught.value) and "one?" not in str(caught.value)


def test_a_column_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"data\.messages: .* has no column 'tlak': did you mean 'talk'"):
        rows(tmp_path, [OPEN], messages="tlak")


def test_chats_under_another_key_are_not_taken_for_texts(tiny, tmp_path):
    (file := tmp_path / "x.jsonl").write_text(json.dumps({"talk": OPEN}))
    data = Data(files={"train": str(file), "test": str(file), "text": "talk", "label": None})
    with pytest.raises(SettingError, match=r"files\.text: .*row 1: 'talk' is no text: .* named by data\.messages"):
        reading.read(data, "causal_lm")
    with pytest.raises(UserError, match=r"the task is causal_lm: write data\.prompt, a template"):
        tiny("task=causal_lm", "data.files.text=[instruction, input]")


def test_a_site_reads_chats_by_its_own_column(tmp_path):
    from fedlora.data.cells import Taught
    from fedlora.deploy.site import Held

    (file := tmp_path / "x.jsonl").write_text(json.dumps({"talk": OPEN}))
    taught = Taught("start", None, messages="talk", scored="last")
    made, left_out = reading.read_site(Held(train=str(file), messages="talk"), None, taught)
    assert made == reading.Rows([TURNS], [("no",)]) and left_out == 0


def test_the_oldest_question_goes_first_and_the_system_stays():
    once = shorter(TURNS)
    assert once == (TURNS[0], *TURNS[3:]) and shorter(once) is None
    assert shorter(TURNS[1:]) == TURNS[3:] and shorter(TURNS[1:4]) == TURNS[3:4]


ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"


def test_a_prompt_is_made_of_several_columns(tmp_path):
    told = [
        {"instruction": "Add {one}.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Part.", "input": None, "output": "Bye"},
    ]
    (file := tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, told)))
    files = {"train": str(file), "test": str(file), "label": "output"}
    made = reading.read(Data(files=files, prompt=ALPACA), "causal_lm")[0]
    assert made.texts == [
        "### Instruction:\nAdd {one}.\n\n### Input:\n1 2\n\n### Response:",
        "### Instruction:\nGreet.\n\n### Response:",
        "### Instruction:\nPart.\n\n### Response:",
    ]
    assert made.labels == ["3", "Hi", "Bye"]
    with pytest.raises(
        SettingError, match=r"data\.prompt: .*x.jsonl has no column 'inputs': did you mean 'input'"
    ):
        reading.read(Data(files=files, prompt="{instruction} {inputs}"), "causal_lm")


def test_a_template_leaves_out_lines_of_empty_columns_and_keeps_doubled_braces():
    row = {"a": "1", "b": " "}
    assert templates.filled("{a}\nof {b}\n{a} and {b}{{}}", row) == "1\n1 and  {}"
    assert templates.columns("{a} {b b}{a}{{c}}") == ("a", "b b")


@pytest.mark.parametrize(
    "told, what",
    [
        ("data.prompt='no column'", "names no column: write one in braces"),
        ('data.prompt="{a\\n\\nb}"', "a { stands alone: write {{"),
        ("data.prompt='{a'", "a { stands alone: write {{"),
        ("data.prompt='{} {a}'", "{} names no column"),
        ("data.prompt='{a}'", "prompt is for task: causal_lm, and the task is classification"),
        ("data.messages=a", "messages is for task: causal_lm, and the task is classification"),
        ("data.scored=some", "data.scored"),
    ],
)
def test_keys_that_do_not_go_with_a_scenario_are_told(tiny, told, what):
    with pytest.raises(UserError) as caught:
        tiny(told)
    assert what in str(caught.value)


def test_a_chat_needs_no_prompt(tiny):
    with pytest.raises(UserError, match="messages are whole chats: leave prompt out"):
        tiny("task=causal_lm", "data.messages=a", "data.prompt='{a}'")
