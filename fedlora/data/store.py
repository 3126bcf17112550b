"""Datasets on disk: encoded once, memory-mapped, shared by every worker.

What is on disk is flat: one array of tokens, one of offsets, one of targets, and for the partitions one
array of row numbers and one of offsets; or nothing but the seed, where clients draw their examples.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora import scenario as settings
from fedlora.data import persons as people
from fedlora.data.cache import cache_folder, cached
from fedlora.data.examples import Encode as Encode
from fedlora.data.examples import Encoded as Encoded
from fedlora.data.examples import Examples as Examples
from fedlora.data.examples import Partition as Partition
from fedlora.data.examples import Targets as Targets
from fedlora.data.examples import label_counts as label_counts
from fedlora.data.examples import majority as majority
from fedlora.data.notes import slips
from fedlora.data.partitions import Drawn, Stored, classes, draw
from fedlora.data.reading import NOTHING, Input, Rows, as_bytes, check_labels, label_names, read, set_aside
from fedlora.errors import counted
from fedlora.seeding import Root

_DRAWN = "drawn.json"  # in the place of a partition's arrays
_NAMES = "names.json"  # what clients are called, by a natural column

logger = logging.getLogger(__name__)

INPUTS = ("train", "test", "validation", "labels", "tokenizer", "clients")
"""What a dataset is made of: rows of each part, names of labels, how rows are encoded, and who holds which."""

_FORMAT = "3"  # raise it when what is cached changes its meaning


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and is judged on."""

    folder: Path
    partition_folder: Path
    train: Examples
    test: Examples
    validation: Examples  # that choose the best round; none unless the scenario asks for some
    labels: tuple[str, ...]  # names of classes, or of scores, in order; empty for causal_lm
    holdings: Stored | Drawn
    cut: int = 0  # test rows that lost something that is judged to `data.max_length`
    empty: int = 0  # rows of any part that the tokenizer made nothing of
    names: tuple[str, ...] = ()  # of clients, by their natural column; none elsewhere
    persons: people.Persons | None = None  # of the training rows, where they are protected
    inputs: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what it was made of, by `INPUTS`

    @classmethod
    def open(cls, folder: Path, partition_folder: Path) -> Self:
        """Map what `prepare` wrote; reads nothing yet."""
        meta = json.loads((folder / "meta.json").read_text())
        drawn, names = partition_folder / _DRAWN, ("rows", "offsets", "held_rows", "held_offsets")
        return cls(
            folder=folder,
            partition_folder=partition_folder,
            train=_examples(folder, "train"),
            test=_examples(folder, "test"),
            validation=_examples(folder, "validation"),
            labels=tuple(meta["labels"]),
            holdings=Drawn(**json.loads(drawn.read_text()))
            if drawn.exists()
            else Stored(*(_map(partition_folder / f"{name}.npy") for name in names)),
            cut=meta.get("cut", 0),
            empty=meta.get("empty", 0),
            names=tuple(json.loads((partition_folder / _NAMES).read_text(encoding="utf-8")))
            if (partition_folder / _NAMES).exists()
            else (),
            persons=people.Persons.open(partition_folder),
        )

    @property
    def fingerprint(self) -> str:
        """Differs where any text, label, token or holding does: folders are named by what is in them."""
        return self.partition_folder.name

    @property
    def num_clients(self) -> int:
        """Clients that hold examples."""
        return self.holdings.num_clients

    @property
    def largest_token(self) -> int:
        """The highest token id of any example."""
        return max(int(part.tokens.max(initial=0)) for part in (self.train, self.test, self.validation))

    def num_examples(self, client: int) -> int:
        """Examples that a client trains on."""
        return self.holdings.num_examples(client)

    def sizes(self) -> dict[int, int]:
        """How many clients train on each number of examples, from the fewest."""
        return self.holdings.sizes()

    def units(self, client: int) -> int:
        """Of how many a client samples, each of which epsilon is for: its persons, or else its examples."""
        return self.num_examples(client) if self.persons is None else int(self.persons.counts[client])

    def unit_sizes(self) -> dict[int, int]:
        """How many clients train on each number of persons, or else of examples, from the fewest."""
        return self.sizes() if self.persons is None else self.persons.sizes()

    def partition(self, client: int) -> Partition:
        """One client's examples to train on."""
        return self._partition(client, self.holdings.of(client)[0])

    def held_out(self, client: int) -> Partition:
        """The examples that a client keeps to judge its own model by; none without `data.client_test_share`."""
        return self._partition(client, self.holdings.of(client)[1])

    def _partition(self, client: int, rows: NDArray[np.int64]) -> Partition:
        return Partition(client, self.train, rows, None if self.persons is None else self.persons.of_rows[rows])

    def histogram(self, client: int) -> NDArray[np.int64]:
        """How many examples of each label a client trains on, (labels,); of scores how many there are."""
        if not self.labels or self.scored:
            return np.array([self.num_examples(client)])
        counts = label_counts(self.train.targets[self.partition(client).rows])
        return np.pad(counts, (0, len(self.labels) - len(counts)))

    @property
    def scored(self) -> bool:
        """Whether examples have scores and no classes."""
        return np.float32 in (self.train.targets.dtype, self.test.targets.dtype)

    @property
    def majority(self) -> float | None:
        """What always saying the commonest label comes to on the test examples, as `Examples.majority`."""
        return self.test.majority if self.labels else None


def prepare(
    data: settings.Data,
    task: str,
    num_clients: int,
    seed: int,
    encode: Encode,
    encoding: str,
    person: str | None = None,
) -> Dataset:
    """Read, tokenise and partition, or find it all done by an earlier run.

    Args:
        data: what to read and how to split it.
        task: of the scenario.
        num_clients: partitions to make.
        seed: of the partition, where `data.partition` has none. The test set does not depend on it.
        encode: turns rows of text into tokens.
        encoding: a fingerprint of `encode`; another tokenizer gives another cache entry.
        person: the column of the persons who are protected; of names only who is who is kept, as numbers.

    Raises:
        SettingError: a source, column, label or partition is not as the settings say.
    """
    train, test = read(data, task, person)
    names = label_names(data, train, task)
    check_labels("data", test, names, "the test set has labels that the training set has not")
    test, validation = set_aside(data, task, test)
    check_labels("data", validation, names, "the validation set has labels that the training set has not")
    for note in slips(train, test, validation, names, plugins.find("tasks", task).target):
        logger.warning("%s", note)
    seed = seed if data.partition.seed is None else data.partition.seed
    folder, inputs = _tokenised(data, task, train, test, validation, names, encode, encoding)
    how = f"{data.partition.model_dump_json(exclude={'seed'})} {data.client_test_share}"
    owners = _fingerprint(*train.owners) if train.owners else ""
    of_rows = None if train.persons is None else people.numbered(train.persons)

    def write(to: Path) -> None:
        targets = _examples(folder, "train").targets
        if isinstance(data.partition, settings.Sampled):
            drawn = draw(data.partition, len(targets), data.client_test_share, num_clients, seed)
            (to / _DRAWN).write_text(json.dumps(asdict(drawn)))
            return
        parts = people.split(data.partition, classes(targets), train.owners, of_rows, num_clients, seed)
        _write_partitions(to, data.client_test_share, parts, seed, of_rows)
        if train.owners is not None:
            (to / _NAMES).write_text(json.dumps([train.owners[part[0]] for part in parts]), encoding="utf-8")

    key = _fingerprint(_FORMAT, _NAMES if owners else "", how, owners, str(num_clients), str(seed), *_who(of_rows))
    return _opened(folder, cached(folder.with_name(f"{folder.name}-{key}"), write), {**inputs, "clients": key})


def hold(
    data: settings.Data,
    task: str,
    num_clients: int,
    seed: Root,
    encode: Encode,
    encoding: str,
    labels: Sequence[str],
    *,
    train: Rows = NOTHING,
    test: Rows = NOTHING,
    validation: Rows = NOTHING,
    client: int = 0,
) -> Dataset:
    """A dataset of which this machine holds a part: the test rows, or one client's.

    Args:
        data: how rows are cut, and what share of them a client keeps to judge by.
        task: of the scenario.
        num_clients: of the run; all but one hold nothing here.
        seed: of the rows that are held out: the run's, or a key that a site keeps to itself.
        encode: turns rows of text into tokens.
        encoding: a fingerprint of `encode`.
        labels: of the run, in order.
        train: the client's rows, in their order in its partition.
        test: rows to judge by.
        validation: rows to choose the best round by.
        client: whose the training rows are.

    Raises:
        SettingError: a row has another label, or a client with rows has too few to hold any out.
    """
    for rows in (train, validation):
        check_labels("data", rows, labels, f"there are labels beside the run's own {list(labels)}")
    folder, inputs = _tokenised(data, task, train, test, validation, labels, encode, encoding)
    parts = [np.arange(len(train.texts) if c == client else 0) for c in range(num_clients)]
    of_rows = None if train.persons is None else people.numbered(train.persons)

    def write(to: Path) -> None:
        _write_partitions(to, data.client_test_share, parts, seed, of_rows)

    told = seed.hex() if isinstance(seed, bytes) else str(seed)
    more = _who(of_rows)
    key = _fingerprint(_FORMAT, "held", str(data.client_test_share), str(client), str(num_clients), told, *more)
    return _opened(folder, cached(folder.with_name(f"{folder.name}-{key}"), write), {**inputs, "clients": key})


def _opened(folder: Path, partition_folder: Path, inputs: Mapping[str, str]) -> Dataset:
    """As `Dataset.open`; says how many rows hold nothing that a model could read."""
    found = replace(Dataset.open(folder, partition_folder), inputs=inputs)
    if found.empty:
        logger.warning(
            "the tokenizer makes nothing of %s: read as the token that stands for an empty text",
            counted(found.empty, "row"),
        )
    return found


def _tokenised(
    data: settings.Data,
    task: str,
    train: Rows,
    test: Rows,
    validation: Rows,
    names: Sequence[str],
    encode: Encode,
    encoding: str,
) -> tuple[Path, dict[str, str]]:
    """The folder of the encoded rows, and fingerprints of what they were made of."""
    parts = {"train": train, "test": test} | ({"validation": validation} if validation.texts else {})
    contents = {part: content(rows) for part, rows in parts.items()}
    key = _fingerprint(_FORMAT, task, encoding, str(data.max_length), *contents.values(), *names)
    made = cached(cache_folder() / "tokens" / key, lambda to: _write(to, parts, names, encode))
    return made, {**contents, "labels": _fingerprint(*names), "tokenizer": encoding}


def _write(folder: Path, parts: Mapping[str, Rows], names: Sequence[str], encode: Encode) -> None:
    meta: dict[str, Any] = {"labels": list(names)}
    for half, rows in parts.items():
        encoded = encode(rows) if rows.texts else Encoded([], [])
        lengths = np.fromiter(map(len, encoded.tokens), np.int64, len(encoded.tokens))
        np.save(folder / f"{half}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        if rows.texts and isinstance(encoded.tokens[0], np.ndarray):
            flat = np.concatenate(encoded.tokens)
        else:
            flat = np.fromiter((t for row in encoded.tokens for t in row), np.int32, int(lengths.sum()))
        np.save(folder / f"{half}.tokens.npy", flat)
        np.save(folder / f"{half}.targets.npy", encoded.held)
        if encoded.types is not None:
            kinds = np.fromiter((t for row in encoded.types for t in row), np.uint8, int(lengths.sum()))
            np.save(folder / f"{half}.types.npy", kinds)
        if encoded.marks is not None:
            marks = np.fromiter((m for row in encoded.marks for m in row), np.int32, int(lengths.sum()))
            np.save(folder / f"{half}.marks.npy", marks)
        if encoded.empty:
            meta["empty"] = meta.get("empty", 0) + encoded.empty
        if half == "test" and encoded.cut:  # of others nobody is told
            meta["cut"] = encoded.cut
    (folder / "meta.json").write_text(json.dumps(meta))


def _who(persons: NDArray[np.int64] | None) -> list[bytes]:
    """What of persons a fingerprint is made of: which rows are of one."""
    return [] if persons is None else [persons.tobytes()]


def _write_partitions(
    folder: Path,
    held_share: float | None,
    parts: list[NDArray[np.int64]],
    seed: Root,
    persons: NDArray[np.int64] | None,
) -> None:
    """The rows of each client to train on, and those that it holds out; and which person each row is of."""
    trained, held = people.keep_back(held_share, parts, persons, seed)
    if persons is not None:
        people.write(folder, persons, trained)
    for name, pieces in (("", trained), ("held_", held)):
        ends = np.cumsum([len(piece) for piece in pieces])
        np.save(folder / f"{name}rows.npy", np.concatenate(pieces).astype(np.int64))
        np.save(folder / f"{name}offsets.npy", np.concatenate([[0], ends]).astype(np.int64))


def _examples(folder: Path, half: str) -> Examples:
    """The examples of a part of a dataset; none where it has no such part."""
    if not (folder / f"{half}.offsets.npy").exists():
        return Examples(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    tokens, offsets, targets = (_map(folder / f"{half}.{what}.npy") for what in ("tokens", "offsets", "targets"))
    more = ((folder / f"{half}.{what}.npy") for what in ("types", "marks"))
    return Examples(tokens, offsets, targets, *(_map(file) if file.exists() else None for file in more))


def _map(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode=None if path.stat().st_size < 1024 else "r", allow_pickle=False)
    return np.asarray(array)


def content(rows: Rows) -> str:
    """Differs where a text or a label of some rows does."""
    labels = (label if isinstance(label, str) else json.dumps(label) for label in rows.labels or ())
    return _fingerprint(*rows.texts, "\0labels", *labels)


def _fingerprint(*parts: Input) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = as_bytes(part)
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]
