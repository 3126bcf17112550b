"""The same question has the same answer, and costs nothing more."""

import dataclasses

import numpy as np
import pytest

from fedlora.adapter import Instruction
from fedlora.deploy.answers import Answers

ASKED = Instruction(round=2, adapter={"b": np.ones((2, 3), np.float32)}, train=("b",), send=("b",))


@pytest.fixture
def answers(tmp_path):
    return lambda key=b"k" * 32: Answers(tmp_path, key)


@pytest.mark.parametrize(
    "other",
    [
        {"round": 3},
        {"adapter": {"b": np.full((2, 3), np.nextafter(np.float32(1), 2))}},
        {"send": ()},
        {"config": {"proximal-mu": 0.1}},
        {"draw": 1},
        {"steps": {0: 1}},
        {"moments": np.ones((1, 2), np.float32)},
    ],
    ids=lambda told: next(iter(told)),
)
def test_another_instruction_is_another_question(answers, other):
    made = answers()
    assert made.question(ASKED, 1) == answers().question(dataclasses.replace(ASKED), 1)
    assert made.question(dataclasses.replace(ASKED, **other), 1) != made.question(ASKED, 1)
    assert made.question(ASKED, 2) != made.question(ASKED, 1) != answers(b"l" * 32).question(ASKED, 1)


def test_an_answer_is_found_by_its_question_alone_after_a_restart_too(answers, tmp_path):
    question, secret = answers().question(ASKED), bytes(range(200))
    answers().keep(1, question, secret)
    answers().keep(2, question, b"second")
    assert (answers().find(1, question), answers().find(2, question)) == (secret, b"second")
    assert answers().find(1, answers().question(ASKED, 1)) is None
    file = tmp_path / "answer-1"
    assert file.stat().st_mode & 0o077 == 0 and secret[:16] not in file.read_bytes()
    assert Answers(tmp_path, b"l" * 32).find(1, question) is None
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert answers().find(1, question) is None
    file.write_bytes(b"")
    assert answers().find(1, question) is None


def test_a_new_round_takes_the_place_of_the_last(answers, tmp_path):
    for trip in (1, 2):
        answers().keep(trip, "old", b"old")
    answers().keep(1, "new", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answer-1"]
    assert (answers().find(1, "old"), answers().find(2, "old"), answers().find(1, "new")) == (None, None, b"new")
