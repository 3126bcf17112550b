"""What was understood of a scenario's data, before a tokenizer or a model is loaded: counts, and never a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora import plugins
from fedlora import scenario as settings
from fedlora.data import notes, persons
from fedlora.data.partitions import classes, draw
from fedlora.data.reading import Rows, check_labels, label_names, read, read_public, separated, set_aside
from fedlora.data.targets import BY_TARGET
from fedlora.errors import SettingError, counted


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long rows are, in words: the tokenizer, which is not loaded here, makes more tokens of them.

    Attributes:
        rows: training and test rows together.
        empty: rows without any word.
        median, most: words of a row.
        over: rows of more words than `data.max_length`; these and more are cut, or have several windows. None
            where nobody says it.
        windows: whether longer rows have windows.
    """

    rows: int
    empty: int
    median: int
    most: int
    over: int | None
    windows: bool = False


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What was understood.

    Attributes:
        rows: how many of each part: `train, test, validation`.
        labels: of each label, how many rows of each part have it; empty where there are none.
        lengths: of the inputs; None of images.
        sizes: rows of each client, in order, before it holds any out; None where a tokenizer is needed to say.
        persons: of each client, where these are protected; None elsewhere.
        names: of clients, by a natural column.
        repeated: training rows whose text stood before.
        leaks: test rows whose text is in the training set too.
        notes: what is likely a slip.
    """

    rows: Mapping[str, int]
    labels: Mapping[str, Mapping[str, int]]
    lengths: Lengths | None
    sizes: Sequence[int] | None
    persons: Sequence[int] | None
    names: Sequence[str]
    repeated: int
    leaks: int
    notes: Sequence[str]


def at_hand(data: settings.Data) -> bool:
    """Whether the rows are read without the Hub."""
    return data.dataset == "tweets" or (data.files is not None and data.files.train is not None)


def overview(data: settings.Data, task: str, num_clients: int, seed: int, person: str | None = None) -> Overview:
    """Read and count rows that are at hand.

    Args:
        data: to read.
        task: of the scenario.
        num_clients: that hold the training rows.
        seed: of the scenario.
        person: the column of the persons who are protected.

    Raises:
        SettingError: as a run would.
    """
    data = separated(data, task)
    train, test = read(data, task, person)
    names, target = label_names(data, train, task), plugins.find("tasks", task).target
    check_labels("data", test, names, "the test set has labels that the training set has not")
    test, validation = set_aside(data, task, test)
    check_labels("data", validation, names, "the validation set has labels that the training set has not")
    if (known := data.public) and (known.files is not None or known.dataset == "tweets"):
        read_public(data, task, names)
    parts = {"train": train, "test": test} | ({"validation": validation} if validation.texts else {})
    counts = {part: notes.label_counts(rows, names) for part, rows in parts.items()}
    labelled = names if target != "score" else ()
    seed = seed if data.partition.seed is None else data.partition.seed
    sizes, people, called = _sizes(data, train, names, target, num_clients, seed)
    return Overview(
        rows={part: len(rows.texts) for part, rows in parts.items()},
        labels={name: {part: counts[part][i] for part in parts} for i, name in enumerate(labelled)},
        lengths=lengths_of(data.max_length, train, test, windows=target == "marks"),
        sizes=sizes,
        persons=people,
        names=called,
        repeated=notes.repeated(train),
        leaks=notes.common(test, train),
        notes=notes.slips(train, test, validation, names, target),
    )


def lengths_of(most: int | None, *parts: Rows, windows: bool = False) -> Lengths | None:
    """How long rows are; None of images, and where there are none.

    Args:
        most: words beyond which a row counts as over; None: nobody says.
        parts: rows.
        windows: whether longer rows have windows.
    """
    if any(isinstance(text, bytes) for rows in parts for text in rows.texts[:1]):
        return None
    if not any(rows.texts for rows in parts):
        return None
    words = np.array([notes.length(text) for rows in parts for text in rows.texts], np.int64)
    return Lengths(
        rows=len(words),
        empty=sum(notes.empty(rows) for rows in parts),
        median=int(np.median(words)),
        most=int(words.max()),
        over=None if most is None else int((words > most).sum()),
        windows=windows,
    )


def _sizes(
    data: settings.Data, train: Rows, names: Sequence[str], target: str, num_clients: int, seed: int
) -> tuple[list[int] | None, list[int] | None, list[str]]:
    """Rows and persons of each client, and what clients are called; as `store.prepare` splits them."""
    how, total = data.partition, len(train.texts)
    if isinstance(how, settings.Sampled):
        draw(how, total, data.client_test_share, num_clients, seed)
        return [how.examples] * num_clients, None, []
    if num_clients > total:
        raise SettingError(
            "clients.total", f"{counted(num_clients, 'client')}, and only {counted(total, 'example')}"
        )
    by_label = not isinstance(how, settings.Iid | settings.Size | settings.Natural)
    if by_label and target not in BY_TARGET:
        return None, None, []
    targets = classes(BY_TARGET[target](train, names)) if by_label else np.zeros(total, np.int64)
    of_rows = None if train.persons is None else persons.numbered(train.persons)
    parts = persons.split(how, targets, train.owners, of_rows, num_clients, seed)
    people = None if of_rows is None else [len(np.unique(of_rows[part])) for part in parts]
    called = [train.owners[part[0]] for part in parts] if train.owners else []
    return [len(part) for part in parts], people, called
