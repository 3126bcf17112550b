r"""Rows with a tag for each word, in IOB2: `O` is outside of all entities, one of type X is `B-X I-X I-X ...`.

They come as lists of words and of tags, as CoNLL files, or as texts with spans of characters. A text is cut into
words here, the same for every tokenizer: what `\w` takes for letters and digits, and any other sign by itself.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from fedlora.errors import SettingError

OUTSIDE = "O"
SUFFIXES = (".conll", ".iob2")  # of files with a word and its tag in each line

_TAG = re.compile(r"O|[BI]-.+")
_SCRIPT = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han, which have no spaces
_WORD = re.compile(rf"[{_SCRIPT}]|(?:(?![{_SCRIPT}])\w)+|[^\w\s]")

Place = tuple[int, int]
"""Where a word begins and ends in a text, in characters."""


class Entity(NamedTuple):
    """Some words of a sequence."""

    start: int  # the first
    end: int  # after the last
    type: str


class _Wrong(Exception):
    """What is wrong with a row; never its text."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key = key  # `text` or `label`


def places(text: str | Sequence[str]) -> tuple[str, list[Place]]:
    """A text and where its words are; words are joined by spaces."""
    if isinstance(text, str):
        return text, [found.span() for found in _WORD.finditer(text)]
    ends = np.cumsum([len(word) + 1 for word in text], dtype=int).tolist()
    return " ".join(text), [(end - 1 - len(word), end - 1) for word, end in zip(text, ends, strict=True)]


def entities(tags: Sequence[str], strict: bool = False) -> list[Entity]:
    """The entities of a sequence, by the rules of seqeval (https://github.com/chakki-works/seqeval).

    Args:
        tags: of its words.
        strict: as IOB2 says: an `I-X` that follows no `B-X` or `I-X` of its entity is none; else it begins one.
    """
    found: list[Entity] = []
    going = False  # whether the word before belongs to the last of them
    for at, tag in enumerate(tags):
        begins, _, kind = tag.partition("-")
        if begins == "I" and going and found[-1].type == kind:
            found[-1] = found[-1]._replace(end=at + 1)
            continue
        going = begins == "B" or (begins == "I" and not strict)
        if going:
            found.append(Entity(at, at + 1, kind))
    return found


def names(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The tags of some rows, `O` first, then sorted; of each type both, so that no row has another one."""
    types = {tag[2:] for tags in rows for tag in tags if tag != OUTSIDE}
    return OUTSIDE, *sorted(f"{prefix}-{kind}" for prefix in "BI" for kind in types)


def wrong_names(labels: Sequence[str]) -> str:
    """What is wrong with a list of tags; empty where nothing is."""
    if not labels:
        return f"the list is empty: name {OUTSIDE}, and B-TYPE and I-TYPE of each type, or leave it out"
    if OUTSIDE not in labels:
        return f"tags are {OUTSIDE}, and B-TYPE and I-TYPE of each type: {OUTSIDE} is missing"
    for tag in labels:
        if not _TAG.fullmatch(tag):
            return f"{tag!r} is none of {OUTSIDE}, B-TYPE and I-TYPE"
        if tag.startswith("I-") and f"B-{tag[2:]}" not in labels:
            return f"{tag!r} has no 'B-{tag[2:]}' beside it, with which an entity begins"
    return "" if len(set(labels)) > 1 else "there is no type of entities among them, such as B-NAME and I-NAME"


def rows(
    texts: Sequence[Any],
    labels: Sequence[Any],
    *,
    key: str,
    source: str,
    columns: tuple[str, str],
    known: Collection[str] | None,
) -> tuple[list[str | tuple[str, ...]], list[tuple[str, ...]]]:
    """The words or the text, and the tags, of each row.

    Args:
        texts: of each row its words, or its text.
        labels: of each row its tags, or the spans of its text.
        key: of the scenario, that names the source.
        source: what it is called.
        columns: the names of the two columns.
        known: tags that there may be; None: any.

    Raises:
        SettingError: a row is not as it should be; by its number, from 1, and its column.
    """
    named = dict(zip(("text", "label"), columns, strict=True))
    made = []
    for at, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        try:
            made.append(_row(text, label, known))
        except _Wrong as wrong:
            what = f"{source}: row {at}, column {named[wrong.key]!r}: {wrong}"
            raise SettingError(f"{key}.{wrong.key}", what) from None
    return [text for text, _ in made], [tags for _, tags in made]


def _row(text: Any, label: Any, known: Collection[str] | None) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    spans, words = _list(label), _list(text)
    if spans is None:
        raise _Wrong("label", "should be a list, of a tag for each word or of spans {start, end, label}")
    if isinstance(text, str):
        tags = _of_spans(text, spans)
    elif words is None or not all(isinstance(word, str) for word in words):
        raise _Wrong("text", "should be a list of words, or a text where the labels are spans")
    else:
        text, tags = tuple(words), tuple(spans)
        if len(text) != len(tags):
            raise _Wrong("label", f"{len(tags)} tags of {len(text)} words: write one for each")
        _check(tags)
    if known is not None and (strange := sorted(set(tags) - set(known))):
        raise _Wrong("label", f"{strange[0]!r} is none of data.labels")
    return text, tags


def _list(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else None


def _check(tags: Sequence[Any]) -> None:
    """Make sure that tags are IOB2."""
    before = OUTSIDE
    for at, tag in enumerate(tags, 1):
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise _Wrong("label", f"tag {at} is none of {OUTSIDE}, B-TYPE and I-TYPE")
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise _Wrong(
                "label",
                f"tag {at} begins with I- and follows none of its type: in IOB2 an entity begins with B-",
            )
        before = tag


def _of_spans(text: str, spans: Sequence[Any]) -> tuple[str, ...]:
    """The tags of a text's words by its spans."""
    _, words = places(text)
    tags, taken = [OUTSIDE] * len(words), sorted(_span(at, span, len(text)) for at, span in enumerate(spans, 1))
    for (_, end, one, _), (start, _, other, _) in pairwise(taken):
        if start < end:
            raise _Wrong("label", f"spans {min(one, other)} and {max(one, other)} overlap")
    for start, end, at, kind in taken:
        inside = [i for i, (first, last) in enumerate(words) if first < end and start < last]
        if not inside:
            raise _Wrong("label", f"span {at} holds no word")
        if words[inside[0]][0] < start or end < words[inside[-1]][1]:
            raise _Wrong("label", f"span {at} begins or ends within a word: move it to the word's edge")
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{kind}"
    return tuple(tags)


def _span(at: int, span: Any, length: int) -> tuple[int, int, int, str]:
    """Where a span begins and ends, its number in its row, and its type."""
    told = span if isinstance(span, Mapping) else {}
    start, end, kind = (told.get(key) for key in ("start", "end", "label"))
    if not _whole(start) or not _whole(end):
        raise _Wrong("label", f"span {at} should be {{start, end, label}}, in characters from 0, end excluded")
    if not isinstance(kind, str) or not kind:
        raise _Wrong("label", f"span {at} has no label: write a word")
    if not 0 <= start < end <= length:
        raise _Wrong("label", f"span {at} lies outside of its text, or is empty: characters 0 to {length}")
    return int(start), int(end), at, kind


def _whole(number: Any) -> TypeGuard[int]:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def read_conll(key: str, path: Path, text: str, columns: Sequence[str] | None) -> dict[str, list[list[str]]]:
    """The sentences of a CoNLL file, by column.

    Fields are parted by tabs, or by spaces where a line has none. Blank lines part sentences; comments, such as
    `# id = 3`, and lines of `-DOCSTART-` are left out.

    Args:
        key: of the scenario, that names the file.
        path: of the file, for errors.
        text: that it holds.
        columns: names of the fields; None: the first is of `tokens`, the last of `tags`.

    Raises:
        SettingError: a line has other fields.
    """
    found: list[list[list[str]]] = [[]]  # sentences, of lines, of fields
    for at, line in enumerate(text.split("\n"), 1):
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            found.append([])
        elif not _comment(line, fields):
            if len(fields) < 2 if columns is None else len(fields) != len(columns):
                asked = "a word and its tag" if columns is None else f"{len(columns)}, as in columns"
                raise SettingError(key, f"{path}:{at}: {len(fields)} fields, and there should be {asked}")
            found[-1].append(fields)
    sentences = [sentence for sentence in found if sentence]
    named = {"tokens": 0, "tags": -1} if columns is None else {name: i for i, name in enumerate(columns)}
    return {name: [[fields[i] for fields in sentence] for sentence in sentences] for name, i in named.items()}


def _comment(line: str, fields: Sequence[str]) -> bool:
    """Whether a line is no word; `# O` is one."""
    return line.startswith("#") and (" = " in line or not _TAG.fullmatch(fields[-1]))


def first_pieces(text: str, words: Sequence[Place], pieces: Sequence[Place]) -> Iterator[int | None]:
    """Of each word the number of the first piece of a tokenizer that begins in it; None where there is none.

    Args:
        text: that was cut.
        words: where they are in it.
        pieces: where they are in it; empty where they stand for no text. A piece may begin with spaces.
    """
    word_of = np.full(len(text) + 1, -1)
    for i, (start, end) in enumerate(words):
        word_of[start:end] = i
    found: dict[int, int] = {}
    for number, (start, end) in enumerate(pieces):
        within = word_of[start:end]
        if len(real := within[within >= 0]):
            found.setdefault(int(real[0]), number)
    return (found.get(i) for i in range(len(words)))
