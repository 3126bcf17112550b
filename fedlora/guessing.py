"""Which task a table of one's own is for, by its columns: `fedlora init`, where the table is."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedlora.data.cells import missing, separator
from fedlora.errors import UserError, suggestion

TASKS = ("classification", "multi_label", "regression", "token_classification", "causal_lm", "preference")
_OF_PAIRS = ("classification", "multi_label", "regression")

_CHATS, _PAIR = ("messages", "conversations"), ("prompt", "chosen", "rejected")
_WORDS, _TAGS, _SPANS = ("tokens", "words"), ("tags", "ner_tags", "labels"), ("spans", "entities")
_SEVERAL = ("labels", "label", "codes", "tags")
_PARTNERS = (  # names of the two texts of a pair
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("query", "document"),
)
_FEW = 20  # whole numbers, of which so many may be classes or scores

Columns = Mapping[str, Sequence[Any]]


class Guess(NamedTuple):
    """A task of some columns.

    Attributes:
        task: its name.
        files: keys of `data.files` beside `train`.
        more: lines of the section `data`.
        texts: by which the length of examples is told.
        aim: what is learnt, in words.
    """

    task: str
    files: dict[str, Any]
    more: tuple[str, ...]
    texts: list[str]
    aim: str


def guess(data: Path, columns: Columns, task: str | None, text: str | None, label: str | None) -> Guess | None:
    """The task, as it is named or by what columns hold; None: classification, whose columns have no such sign.

    Raises:
        UserError: a column is not there, is not what the task reads, or may be for two tasks.
    """
    if task is not None and task not in TASKS:
        raise UserError(f"--task {task}: {suggestion(task, TASKS)}")
    for name in (text, label):
        if name is not None and name not in columns:
            raise UserError(f"{data}: has no column {name!r}: {suggestion(name, columns)}")
    found = (
        _of_chats(columns, task, text)
        or _of_pairs(columns, task)
        or _of_tags(columns, task, text, label)
        or _of_labels(data, columns, task, text, label)
    )
    if found is None and task not in (None, "classification", "causal_lm"):
        raise UserError(f"{data}: no column looks like what task: {task} reads: name them, --text and --label")
    if found is None and task == "causal_lm":
        said = _longest(columns, (label,)) if text is None else text
        files = {"text": said, "label": label}
        return Guess("causal_lm", files, (), _text(columns[said]), f"to go on after {json.dumps(said)}")
    return found


def of_both(found: Guess, columns: Columns) -> Guess:
    """The same of pairs of texts, where the column of texts is one of two that go together by their names."""
    said = found.files.get("text")
    both = next((pair for pair in _PARTNERS if said in pair and columns.keys() >= {*pair}), None)
    if both is None or found.files.get("label") in both or found.task not in _OF_PAIRS:
        return found
    texts = [f"{one} {other}" for one, other in zip(*(columns[name] for name in both), strict=True)]
    return found._replace(files={**found.files, "text": [*both]}, texts=texts)


def _of_chats(columns: Columns, task: str | None, text: str | None) -> Guess | None:
    name = next((n for n in _named(columns, text, *_CHATS) if _turns(columns[n])), None)
    if task not in (None, "causal_lm") or name is None:
        return None
    texts = [json.dumps([*cell], default=str) for cell in columns[name] if _listed(cell)]
    return Guess("causal_lm", {}, (f"messages: {json.dumps(name)}",), texts, f"to chat as {json.dumps(name)} does")


def _of_pairs(columns: Columns, task: str | None) -> Guess | None:
    if task not in (None, "preference") or not columns.keys() >= {*_PAIR}:
        return None
    prompt, *both = _PAIR
    texts = [f"{one} {other}" for one, other in zip(columns[prompt], columns[both[0]], strict=True)]
    return Guess("preference", {"text": prompt, "label": both}, (), texts, "which of two answers people chose")


def _of_tags(columns: Columns, task: str | None, text: str | None, label: str | None) -> Guess | None:
    if task not in (None, "token_classification"):
        return None
    words = next((n for n in _named(columns, text, *_WORDS) if _listed(columns[n][0])), None)
    tags = next((n for n in _named(columns, label, *_TAGS) if n != words and _listed(columns[n][0])), None)
    if words is not None and tags is not None:
        texts = [" ".join(map(str, cell)) for cell in columns[words] if _listed(cell)]
        return Guess("token_classification", {"text": words, "label": tags}, (), texts, "the tags of words")
    spans = next((n for n in _named(columns, label, *_SPANS) if _spans(columns[n])), None)
    if spans is None:
        return None
    said = text or _longest(columns, (spans,))
    files = {"text": said, "label": spans}
    return Guess("token_classification", files, (), _text(columns[said]), f"to find {json.dumps(spans)} in texts")


def _of_labels(
    data: Path, columns: Columns, task: str | None, text: str | None, label: str | None
) -> Guess | None:
    names = [label] if label is not None else [n for n in columns if n != text]
    for name in names:
        cells = [cell for cell in columns[name] if not missing(cell)]
        if not cells or (label is None and name != "score" and name not in _SEVERAL and task is None):
            continue
        said = text or _longest(columns, (name,), or_none=True)
        if said is None or said == name:
            continue
        if task in (None, "multi_label") and (many := _several(data, name, cells, task)) is not None:
            return Guess(
                "multi_label",
                {"text": said, "label": name} | many,
                (),
                _text(columns[said]),
                f"the {json.dumps(name)}",
            )
        numbers = _numbers(cells)
        if numbers is None or task not in (None, "regression"):
            continue
        if task is None and all(n.is_integer() for n in numbers):
            if len(set(numbers)) > _FEW:
                raise UserError(
                    f"{data}: {name!r} holds whole numbers, which may be classes or scores: say --task "
                    "classification or --task regression"
                )
            continue
        low, high = math.floor(min(numbers)), math.ceil(max(numbers))
        scale = (
            f"score: {{low: {low}, high: {max(high, low + 1)}}} # the scale: write its real ends, which are public"
        )
        files = {"text": said, "label": name}
        return Guess("regression", files, (scale,), _text(columns[said]), f"the score {json.dumps(name)}")
    return None


def _several(data: Path, name: str, cells: Sequence[Any], task: str | None) -> dict[str, str] | None:
    """What is to be said of a column of several labels: nothing of lists, else what stands between them."""
    if all(map(_listed, cells)):
        return {} if all(isinstance(part, str | int) for cell in cells for part in cell) else None
    if not all(isinstance(cell, str) for cell in cells):
        return None
    mark = separator(cells, ())
    parts = {part.strip() for cell in cells for part in cell.split(mark)}
    if not any(mark in cell for cell in cells if mark) or len(parts) >= max(_FEW, len(cells)):
        return None if task is None else {"separator": mark or "|"}
    if mark == "," and task is None:
        raise UserError(
            f"{data}: {name!r} holds commas, which may stand between labels or in them: say --task multi_label or "
            "--task classification"
        )
    return {"separator": str(mark)}


def _numbers(cells: Sequence[Any]) -> list[float] | None:
    try:
        found = [math.nan if isinstance(cell, bool) else float(cell) for cell in cells]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if all(map(math.isfinite, found)) else None


def _named(columns: Columns, *names: str | None) -> list[str]:
    return [name for name in names if name is not None and name in columns]


def _listed(cell: Any) -> bool:
    return isinstance(cell, list | tuple) or hasattr(cell, "tolist")


def _turns(cells: Sequence[Any]) -> bool:
    return _of_mappings(cells, ({"role", "content"}, {"from", "value"}))


def _spans(cells: Sequence[Any]) -> bool:
    return _of_mappings(cells, ({"start", "end", "label"},))


def _of_mappings(cells: Sequence[Any], keys: Sequence[set[str]]) -> bool:
    held = next((cell for cell in cells if _listed(cell) and len(cell)), None)
    return held is not None and isinstance(held[0], Mapping) and any(held[0].keys() >= some for some in keys)


def _text(cells: Sequence[Any]) -> list[str]:
    return [str(cell) for cell in cells]


def _longest(columns: Columns, others: Sequence[str | None], or_none: bool = False) -> Any:
    """The column of the longest texts beside others."""
    texts = {n: c for n, c in columns.items() if n not in others and any(isinstance(cell, str) for cell in c)}
    if not texts and not or_none:
        raise UserError("no column looks like texts: name it, --text")
    return max(texts, key=lambda name: sum(len(str(cell)) for cell in texts[name]), default=None)
