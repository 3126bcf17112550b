"""Chats as tokens, framed by the tokenizer's chat template: which tokens are an answer's, and what is cut.

The template writes a chat up to each turn of the assistant, once as a question that is open and once with the
answer. What the second has more is the answer, with what ends it, up to the token of the end where there is one.
Questions and answers are cut into tokens apart, so that a question's are those that a finished model is given.

Of a chat that is longer than `max_length` the oldest questions are left out with their answers, and the system's
turn stays. A last answer that is too long by itself loses its end, and keeps one token; where what goes before it
leaves no room for that, this loses its beginning.

A template is refused by a chat that is made up, and never by a row: else whether a site answers would tell what
one of its rows holds. A row that the template refuses or rewrites, as some rewrite earlier answers or take no turn
of the system, teaches nothing.
"""

import logging
from collections.abc import Sequence
from typing import Any, TypeGuard

from fedlora.data.chats import Turn, shorter
from fedlora.data.reading import Input, Rows
from fedlora.data.store import Encoded
from fedlora.errors import SettingError
from fedlora.tasks.contract import UNSCORED

Chat = tuple[Turn, ...]

_PLAIN = tuple(Turn(role, word) for word in ("one", "two") for role in ("user", "assistant"))  # nobody's

logger = logging.getLogger(__name__)


def is_chat(text: Input) -> TypeGuard[Chat]:
    """Whether a row's input is the turns of a chat."""
    return isinstance(text, tuple) and bool(text) and isinstance(text[0], Turn)


def encode(reader: Any, rows: Rows, max_length: int) -> Encoded:
    """Chats whose last turns of the assistant are scored, as many as a row has labels.

    The target is where the last answer begins. Where any row has several that are scored, tokens have marks.

    Raises:
        SettingError: the chat template refuses plain chats, or there is none.
    """
    _laid(reader, _PLAIN, 1)
    tokens: list[list[int]] = []
    marks: list[list[int]] = []
    starts, cut, several = [], 0, False
    refused: SettingError | None = None
    for turns, answers in zip(rows.texts, rows.labels or (), strict=True):
        assert is_chat(turns) and isinstance(answers, tuple)
        several |= len(answers) > 1
        try:
            ids, mine, start, whole = _row(reader, turns, len(answers), max_length)
        except SettingError as error:
            refused, (ids, mine, start, whole) = error, ([reader.eos_token_id or 0], [UNSCORED], 1, True)
        tokens.append(ids)
        marks.append(mine)
        starts.append(start)
        cut += not whole
    if refused is not None:
        logger.warning("%s: some chats teach nothing: %s", refused.key, refused.message)
    return Encoded(tokens, starts, marks=marks if several else None, cut=cut)


def question(reader: Any, turns: Chat, max_length: int) -> list[int]:
    """The tokens of a chat that the assistant is to go on with, at most `max_length`: the latest turns.

    Raises:
        SettingError: the chat template refuses it, or there is none.
    """
    while len(ids := _ids(reader, [_written(reader, turns, True)])[0]) > max_length and (less := shorter(turns)):
        turns = less
    return ids[-max_length:]


def _row(reader: Any, turns: Chat, scored: int, max_length: int) -> tuple[list[int], list[int], int, bool]:
    """A chat's tokens, their marks, where the last answer begins, and whether nothing was cut."""
    whole = True
    while True:
        ids, marks, start = _laid(reader, turns, scored)
        if len(ids) <= max_length:
            return ids, marks, start, whole
        whole = False
        if (less := shorter(turns)) is None:
            break
        turns = less
    end = max(max_length, start + 1)
    first = max(0, min(end, len(ids)) - max_length)
    return ids[first:end], marks[first:end], start - first, whole


def _laid(reader: Any, turns: Chat, scored: int) -> tuple[list[int], list[int], int]:
    """A chat's tokens, their marks, and where the last answer begins."""
    said = [i for i, turn in enumerate(turns) if turn.role == "assistant"][-scored:]
    whole, texts, at = _written(reader, turns), [], 0
    for i in said:
        before = _written(reader, turns[:i], True)
        after = whole if i == len(turns) - 1 else _written(reader, turns[: i + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise SettingError(
                "data.scored",
                "the base model's chat template writes earlier answers otherwise than the last one: write last"
                if i < said[-1]
                else "the base model's chat template begins an answer otherwise than it is asked for one",
            )
        texts += [whole[at : len(before)], whole[len(before) : len(after)]]
        at = len(after)
    ids: list[int] = []
    marks: list[int] = []
    end = reader.eos_token_id
    for number, part in enumerate(_ids(reader, texts)):
        answer, last = number % 2 == 1, number == len(texts) - 1
        ends = len(part) - part[::-1].index(end) if answer and end in part else len(part)
        if last:
            start = len(ids)
            part = part[:ends] if end is None or end in part else [*part, end]
            ends = len(part)
        ids += part
        marks += [0] * ends + [UNSCORED] * (len(part) - ends) if answer else [UNSCORED] * len(part)
    return ids, marks, start


def _ids(reader: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(reader(list(texts), add_special_tokens=False)["input_ids"])


def _written(reader: Any, turns: Chat, asks: bool = False) -> str:
    """A chat as its template writes it, with what an answer follows where it asks for one."""
    if not reader.chat_template:
        raise SettingError(
            "data.messages",
            "the base model's tokenizer has no chat template: take a model that was taught to chat, or one column "
            "of prompts and one of completions",
        )
    told = [turn._asdict() for turn in turns]
    try:
        made: str = reader.apply_chat_template(told, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # whatever a template says to roles that it does not know
        of = "a turn of the system" if turns[0].role == "system" else f"a chat of {len(turns)} turns"
        raise SettingError(
            "data.messages", f"the base model's chat template refuses {of}: {type(error).__name__}"
        ) from error
    return made
