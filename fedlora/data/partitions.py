"""How clients come to hold examples: split among them, or drawn by each from a seed.

A client is a slice or a draw, never a Python object.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import scenario as settings
from fedlora.errors import SettingError, counted
from fedlora.seeding import Root, generator, key, stream


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


def classes(targets: NDArray[Any]) -> NDArray[np.int64]:
    """The classes of rows, for partitions by label, (rows,).

    Args:
        targets: the number of each row's label, (rows,); or 0 and 1 for its labels, (rows, labels), uint8: of a
            row's labels the one that is rarest in all rows counts, and rows without any are a class of their own,
            the last; or scores, (rows, scores), float32: their mean, in five bins of about as many rows.
    """
    if targets.ndim == 1:
        return targets
    if targets.dtype == np.float32:
        means = targets.mean(axis=1)
        edges = np.quantile(means, [0.2, 0.4, 0.6, 0.8])
        return np.asarray(np.searchsorted(edges, means, side="right"), np.int64)
    counts = targets.sum(axis=0, dtype=np.int64)
    made: NDArray[np.int64] = np.where(targets > 0, counts, len(targets) + 1).argmin(axis=1)
    made[~targets.any(axis=1)] = targets.shape[1]
    return made


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
        raise SettingError(
            "clients.total", f"{counted(num_clients, 'client')}, and only {counted(len(targets), 'example')}"
        )
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
    if isinstance(how, settings.Natural):
        assert owners is not None
        return _by_owner(how.column, owners, num_clients)
    order = generator(seed, "partition").permutation(len(targets))
    if isinstance(how, settings.Iid):  # as IidPartitioner cuts them, at once
        return [np.sort(part) for part in np.array_split(order, num_clients)]

    import datasets
    from flwr_datasets import partitioner as flwr

    partition_seed = int.from_bytes(key(seed, "partitioner"), "big")
    columns: dict[str, Any] = {"row": order, "label": targets[order]}
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
    table = datasets.Dataset.from_dict(columns).with_format("numpy")
    table.__class__ = _whole_columns()
    made.dataset = table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a retry of the draw is no news to the user
            return [
                np.sort(np.asarray(made.load_partition(k).with_format("numpy")[:]["row"], np.int64))
                for k in range(num_clients)
            ]
    except (ValueError, IndexError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(how, settings.Shards):
            reason = f"{num_clients} clients with {how.shards_per_client} shards each need more examples"
        if isinstance(how, settings.Pathological):
            counts = np.unique(targets, return_counts=True)[1]
            reason = (
                f"{num_clients} clients with labels_per_client {how.labels_per_client} share each label out, and "
                f"the rarest has {counts.min()} rows: use fewer clients, or leave rare labels out"
            )
            if how.labels_per_client > len(counts):
                reason = (
                    f"labels_per_client is {how.labels_per_client}, and there are {len(counts)} labels: lower it"
                )
        if isinstance(how, settings.Size):
            reason = f"{how.growth} growth leaves the least of {num_clients} clients no example; use fewer clients"
        if isinstance(how, settings.Dirichlet):
            reason = f"no draw gave every client {how.min_examples} examples: raise alpha, or lower min_examples"
        raise SettingError("data.partition", reason) from error


@cache
def _whole_columns() -> type[Any]:
    """A class of datasets that gives a column at once; those of the library go over it row by row."""
    import datasets

    class Whole(datasets.Dataset):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, str) and self._indices is None:
                return self._data.column(key).to_numpy()
            return super().__getitem__(key)

    return Whole


def _by_owner(column: str, owners: Sequence[str], num_clients: int) -> list[NDArray[np.int64]]:
    """The rows of each value of a column, in the order of the values as text."""
    if len(names := sorted(set(owners))) != num_clients:
        raise SettingError(
            "clients.total", f"column {column!r} has {len(names)} values: set clients.total to that"
        )
    number = {name: client for client, name in enumerate(names)}
    of = np.array([number[owner] for owner in owners])
    return [np.flatnonzero(of == client) for client in range(num_clients)]


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


def keep_back(
    share: float | None, parts: Sequence[NDArray[np.int64]], seed: Root
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The rows of each client to train on, and those that it holds out: `share` of its own.

    Raises:
        SettingError: a client with rows has too few to hold any out.
    """
    trained, held = list(parts), [part[:0] for part in parts]
    if share is not None:
        for client, part in enumerate(parts):
            count = _held_count(share, len(part)) if len(part) else 0
            chance = stream if isinstance(seed, bytes) else generator  # a key is there to be kept from somebody
            mixed = chance(seed, "held-out", client).permutation(part)
            held[client], trained[client] = np.sort(mixed[:count]), np.sort(mixed[count:])
    return trained, held


def _held_count(share: float, examples: int) -> int:
    """How many of its examples a client holds out: one at least, and not all."""
    if examples == 1:
        raise SettingError("data.client_test_share", "a client with one example has none to hold out")
    return min(max(1, round(share * examples)), examples - 1)
