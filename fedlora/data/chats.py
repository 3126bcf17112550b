"""Chats: a list of turns in a column, as OpenAI (`role, content`) or ShareGPT (`from, value`) writes them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedlora.data.cells import Column

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""What a turn's role may be called, and what chat templates call it."""

logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """What one side says."""

    role: str  # system, user or assistant
    content: str


def rows(
    cells: Sequence[Any], scored: Literal["all", "last"], column: Column
) -> tuple[list[tuple[Turn, ...]], list[tuple[str, ...]]]:
    """Of each row its turns up to the assistant's last, and what is scored: all of the assistant's, or that.

    Raises:
        SettingError: a row is no chat; by its number, from 1.
    """
    chats, answers, unanswered = [], [], 0
    for row, cell in enumerate(cells, 1):
        turns = chat(cell, row, column)
        if turns[-1].role == "user":
            unanswered += 1
            turns = turns[:-1]
        said = tuple(turn.content for turn in turns if turn.role == "assistant")
        if not said:
            raise column.wrong(row, "has no turn of the assistant: nothing in it can be learnt")
        chats.append(turns)
        answers.append(said if scored == "all" else said[-1:])
    if unanswered:
        logger.warning(
            "%s: %d of %d rows end with the user's turn, which is left out",
            column.source,
            unanswered,
            len(cells),
        )
    return chats, answers


def no_lists(cells: Sequence[Any], column: Column) -> None:
    """Make sure that a column of texts is none of chats.

    Raises:
        SettingError: a cell is a list, or a mapping.
    """
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, list | tuple | dict | np.ndarray):
            raise column.wrong(row, "is no text: a column of chats is named by data.messages")


def asked(cell: Any, row: int, column: Column) -> tuple[Turn, ...]:
    """The turns of a chat up to its last of the user, which is to be answered.

    Raises:
        SettingError: the cell is no chat, or nobody asks.
    """
    turns = chat(cell, row, column)
    turns = turns[:-1] if turns[-1].role == "assistant" else turns
    if not turns or turns[-1].role != "user":
        raise column.wrong(row, "has no turn of the user")
    return turns


def chat(cell: Any, row: int, column: Column) -> tuple[Turn, ...]:
    """The turns of a cell: one of the system or none, then the user and the assistant by turns.

    Raises:
        SettingError: they are not; by the turn's number, from 1.
    """
    if not isinstance(cell, list | tuple | np.ndarray):
        raise column.wrong(
            row, "should be a list of turns, {role, content} or {from, value}, as jsonl and parquet hold"
        )
    if not len(cell):
        raise column.wrong(row, "is an empty list: a chat has a turn of the user and one of the assistant")
    turns: list[Turn] = []
    for at, told in enumerate(cell, 1):
        if not isinstance(told, Mapping):
            raise column.wrong(row, f"turn {at} should be {{role, content}} or {{from, value}}")
        name, content = (told.get(key, told.get(other)) for key, other in (("role", "from"), ("content", "value")))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise column.wrong(row, f"turn {at} has a role that is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise column.wrong(row, f"turn {at} has no text for its content")
        before = turns[-1].role if turns else None
        if role == before:
            raise column.wrong(row, f"turns {at - 1} and {at} are both of the {role}: join them into one")
        if role == "system" and turns:
            raise column.wrong(row, f"turn {at} is of the system, which may have the first alone")
        if role == "assistant" and before != "user":
            raise column.wrong(row, f"turn {at} is of the assistant, and answers no turn of the user")
        turns.append(Turn(role, content))
    return tuple(turns)


def shorter(turns: tuple[Turn, ...]) -> tuple[Turn, ...] | None:
    """A chat without its oldest question and answer; what the system says stays. None where it has one."""
    first = 1 if turns[0].role == "system" else 0
    return (*turns[:first], *turns[first + 2 :]) if len(turns) > first + 2 else None
