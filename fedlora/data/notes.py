"""What a person would want to know of rows before they are learnt: counts and labels, and never a text."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fedlora.data.names import alike
from fedlora.data.reading import Input, Rows
from fedlora.data.rows import plain
from fedlora.errors import counted, cut

_SHOWN = 5  # groups of labels in a line


def slips(train: Rows, test: Rows, validation: Rows, names: Sequence[str], target: str) -> list[str]:
    """What is likely a slip in the rows, a line each.

    Args:
        train: rows, none where sites keep theirs.
        test: that report, none at a site.
        validation: that choose the best round.
        names: of the labels, in order.
        target: of the task.
    """
    named = target in ("class", "many")
    found = [*alike(names)]
    for what, rows, other, others in (
        ("test", test, train, "training"),
        ("validation", validation, train, "training"),
        ("validation", validation, test, "test"),
    ):
        if leaks := common(rows, other):
            found.append(
                f"{leaks:,} of {len(rows.texts):,} {what} rows have a text that stands in the {others} set too: a "
                "figure of them says little of new texts; leave them out of one"
            )
    if target == "class" and (torn := contradictory(train)):
        found.append(f"{counted(torn, 'text')} of the training set stands there with more than one label")
    if named and train.texts and test.texts and (lacking := missing_labels(test, names)):
        shown = ", ".join(repr(cut(name)) for name in lacking[:_SHOWN])
        found.append(f"{len(lacking)} of {len(names)} labels have no test row: {shown}")
    return found


def common(rows: Rows, other: Rows) -> int:
    """How many rows have a text that other rows have too."""
    known = set(map(plain, other.texts))
    return sum(plain(text) in known for text in rows.texts) if known else 0


def repeated(rows: Rows) -> int:
    """How many rows have a text that stood before."""
    return len(rows.texts) - len(set(map(plain, rows.texts)))


def empty(rows: Rows) -> int:
    """How many rows have no word in any of their texts."""
    return sum(not any(words(part) for part in _parts(text)) for text in rows.texts)


def words(text: Any) -> int:
    """Words of a text, as blanks part them."""
    return len(text.split()) if isinstance(text, str) else 0


def length(text: Input) -> int:
    """Words of a row's input."""
    return sum(map(words, _parts(text)))


def contradictory(rows: Rows) -> int:
    """Texts that stand with more than one class."""
    if rows.labels is None or not all(isinstance(label, str) for label in rows.labels):
        return 0
    held: dict[Any, set[Any]] = defaultdict(set)
    for text, label in zip(rows.texts, rows.labels, strict=True):
        held[plain(text)].add(label)
    return sum(len(labels) > 1 for labels in held.values())


def label_counts(rows: Rows, names: Sequence[str]) -> list[int]:
    """How many rows have each label."""
    counts: Counter[str] = Counter()
    for label in rows.labels or ():
        counts.update([label] if isinstance(label, str) else {part for part in label if isinstance(part, str)})
    return [counts[name] for name in names]


def missing_labels(rows: Rows, names: Sequence[str]) -> list[str]:
    """Labels that no row has."""
    return [name for name, count in zip(names, label_counts(rows, names), strict=True) if not count]


def _parts(text: Input) -> Sequence[Any]:
    """The texts of a row: one, both of a pair, its words, or what each side of a chat says."""
    if isinstance(text, tuple):
        return [part if isinstance(part, str) else part.content for part in text]
    return [text]
