"""Datasets on disk: encoded once, memory-mapped, shared by every worker.

What is on disk is flat: one array of tokens, one of offsets, one of targets, and for the partitions one
array of row numbers and one of offsets; or nothing but the seed, where clients draw their examples.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora import scenario as settings
from fedlora.data.notes import notes
from fedlora.data.partitions import Drawn, Stored, classes, draw, keep_back, split
from fedlora.data.reading import NOTHING, Input, Rows, as_bytes, check_labels, label_names, read, set_aside
from fedlora.errors import UserError, counted
from fedlora.seeding import Root

_ELSEWHERE = "name a folder that can be written, FEDLORA_CACHE=/some/folder"
_DRAWN = "drawn.json"  # in the place of a partition's arrays
_NAMES = "names.json"  # what clients are called, by a natural column
Targets = NDArray[np.int64] | NDArray[np.uint8] | NDArray[np.float32]

logger = logging.getLogger(__name__)

_FORMAT = "3"  # raise it when what is cached changes its meaning


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, in the order of the rows.

    Attributes:
        tokens: of each row its tokens, or the pixels of an image, channels first.
        targets: of each row the number of its class, or for causal_lm how many leading tokens are not scored; or
            an array of 0 and 1, (rows, labels), uint8, or of scores from 0 to 1, (rows, scores), float32, or of
            where parts of a row lie, (rows, places), int64.
        types: of each token which text of a pair it is of; None where there are no pairs.
        marks: of each token the number of what it is judged by, 0 in a task without labels, -100 where it is not
            scored; None: a row is judged as a whole, or from its target on.
        cut: how many rows lost something that is judged, or what goes before it, to `max_length`.
        empty: of how many the tokenizer made nothing, so that they are a token that stands for no text.
    """

    tokens: Sequence[Sequence[int] | NDArray[np.uint8]]
    targets: list[int] | Targets
    types: Sequence[Sequence[int]] | None = None
    marks: Sequence[Sequence[int]] | None = None
    cut: int = 0
    empty: int = 0

    @property
    def held(self) -> Targets:
        """The targets as they are kept."""
        return self.targets if isinstance(self.targets, np.ndarray) else np.asarray(self.targets, np.int64)


Encode = Callable[[Rows], Encoded]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, memory-mapped. Row i holds `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: of all rows one after another, (total tokens,), or all pixels.
        offsets: where each row begins, (rows + 1,).
        targets: of each row, (rows,); of those with several labels, scores or places (rows, of each).
        types: which text of a pair each token is of, (total tokens,); None where there are no pairs.
        marks: what each token is judged by, (total tokens,), -100 where it is not scored; None: whole rows are, or
            what follows their targets.
    """

    tokens: NDArray[np.int32 | np.uint8]  # (total tokens,), or all pixels
    offsets: NDArray[np.int64]  # (rows + 1,)
    targets: Targets  # (rows,) or (rows, labels, scores or places)
    types: NDArray[np.uint8] | None = None  # which text of a pair each token is of, (total tokens,)
    marks: NDArray[np.int32] | None = None  # what each token is judged by, (total tokens,)

    def __len__(self) -> int:
        return len(self.targets)

    def row(self, index: int) -> NDArray[np.int32 | np.uint8]:
        """The tokens, or the pixels, of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def types_of(self, index: int) -> NDArray[np.uint8]:
        """Of each token of one example, which text of the pair it is of; zeros where there are no pairs."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return np.zeros(here.stop - here.start, np.uint8) if self.types is None else self.types[here]

    def marks_of(self, index: int) -> NDArray[np.int32]:
        """Of each token of one example, what it is judged by; none where examples are judged as wholes."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return np.zeros(0, np.int32) if self.marks is None else self.marks[here]

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens in each of the rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @property
    def majority(self) -> float | None:
        """Of examples, or of scored tokens, as the function of that name has it."""
        return majority(self.targets if self.marks is None else self.marks[self.marks >= 0])


@dataclass(frozen=True)
class Partition:
    """One client's examples: rows of the shared training set.

    Attributes:
        client: its id.
        examples: of all clients.
        rows: the numbers of its own, (num_examples,).
    """

    client: int
    examples: Examples
    rows: NDArray[np.int64]  # (num_examples,)

    def __len__(self) -> int:
        return len(self.rows)


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

    def partition(self, client: int) -> Partition:
        """One client's examples to train on."""
        return Partition(client, self.train, self.holdings.of(client)[0])

    def held_out(self, client: int) -> Partition:
        """The examples that a client keeps to judge its own model by; none without `data.client_test_share`."""
        return Partition(client, self.train, self.holdings.of(client)[1])

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


def label_counts(targets: Targets | NDArray[np.int32]) -> NDArray[np.int64]:
    """How many rows have each label, up to the last that any has; a row may have several."""
    return targets.sum(axis=0, dtype=np.int64) if targets.ndim == 2 else np.bincount(targets)


def majority(targets: Targets | NDArray[np.int32]) -> float | None:
    """What always saying the commonest label comes to, in [0, 1]; None of scores, and of no rows.

    That is its share of the rows. Where rows have several labels it is the micro F1, 2 c / (n + p), of c rows with
    that label among n rows that have p labels together.
    """
    if not len(targets) or targets.dtype == np.float32:
        return None
    counts = label_counts(targets)
    return float(2 * counts.max() / (len(targets) + counts.sum()))


def cache_folder() -> Path:
    """Where tokenised data is kept: `$FEDLORA_CACHE`, else `$XDG_CACHE_HOME/fedlora`, else `~/.cache/fedlora`."""
    if given := os.environ.get("FEDLORA_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "fedlora"
    try:
        return Path.home() / ".cache" / "fedlora"
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep tokenised data in: {_ELSEWHERE}") from error


def prepare(data: settings.Data, task: str, num_clients: int, seed: int, encode: Encode, encoding: str) -> Dataset:
    """Read, tokenise and partition, or find it all done by an earlier run.

    Args:
        data: what to read and how to split it.
        task: of the scenario.
        num_clients: partitions to make.
        seed: of the partition, where `data.partition` has none. The test set does not depend on it.
        encode: turns rows of text into tokens.
        encoding: a fingerprint of `encode`; another tokenizer gives another cache entry.

    Raises:
        SettingError: a source, column, label or partition is not as the settings say.
    """
    train, test = read(data, task)
    names = label_names(data, train, task)
    check_labels("data", test, names, "the test set has labels that the training set has not")
    test, validation = set_aside(data, task, test)
    check_labels("data", validation, names, "the validation set has labels that the training set has not")
    for note in notes(train, test, validation, names, plugins.find("tasks", task).target):
        logger.warning("%s", note)
    seed = seed if data.partition.seed is None else data.partition.seed
    folder = _tokenised(data, task, train, test, validation, names, encode, encoding)
    how = f"{data.partition.model_dump_json(exclude={'seed'})} {data.client_test_share}"
    owners = _fingerprint(*train.owners) if train.owners else ""

    def write(to: Path) -> None:
        targets = _examples(folder, "train").targets
        if isinstance(data.partition, settings.Sampled):
            drawn = draw(data.partition, len(targets), data.client_test_share, num_clients, seed)
            (to / _DRAWN).write_text(json.dumps(asdict(drawn)))
            return
        parts = split(data.partition, classes(targets), train.owners, num_clients, seed)
        _write_partitions(to, data.client_test_share, parts, seed)
        if train.owners is not None:
            (to / _NAMES).write_text(json.dumps([train.owners[part[0]] for part in parts]), encoding="utf-8")

    key = _fingerprint(_FORMAT, _NAMES if owners else "", how, owners, str(num_clients), str(seed))
    return _opened(folder, cached(folder.with_name(f"{folder.name}-{key}"), write))


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
    folder = _tokenised(data, task, train, test, validation, labels, encode, encoding)
    parts = [np.arange(len(train.texts) if c == client else 0) for c in range(num_clients)]

    def write(to: Path) -> None:
        _write_partitions(to, data.client_test_share, parts, seed)

    told = seed.hex() if isinstance(seed, bytes) else str(seed)
    key = _fingerprint(_FORMAT, "held", str(data.client_test_share), str(client), str(num_clients), told)
    return _opened(folder, cached(folder.with_name(f"{folder.name}-{key}"), write))


def _opened(folder: Path, partition_folder: Path) -> Dataset:
    """As `Dataset.open`; says how many rows hold nothing that a model could read."""
    found = Dataset.open(folder, partition_folder)
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
) -> Path:
    parts = {"train": train, "test": test} | ({"validation": validation} if validation.texts else {})
    contents = map(content, parts.values())
    key = _fingerprint(_FORMAT, task, encoding, str(data.max_length), *contents, *names)
    return cached(cache_folder() / "tokens" / key, lambda to: _write(to, parts, names, encode))


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


def _write_partitions(folder: Path, held_share: float | None, parts: list[NDArray[np.int64]], seed: Root) -> None:
    """The rows of each client to train on, and those that it holds out."""
    trained, held = keep_back(held_share, parts, seed)
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


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made once: it appears whole or not at all, also when two runs make it at once.

    Args:
        folder: to make.
        make: writes into a folder that takes its place.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        what = f"{folder.parent}: tokenised data cannot be kept there: {error.strerror or error}"
        raise UserError(f"{what}: {_ELSEWHERE}") from error
    try:
        make(temporary)
        temporary.chmod(0o700)
        temporary.replace(folder)
    except OSError:
        if not folder.exists():  # else another run was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
