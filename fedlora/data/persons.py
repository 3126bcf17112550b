"""Which person each row is of, where `privacy.person` protects persons: all rows of one stay together.

Names end here: what is kept is numbers, in the order in which persons first occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedlora import scenario as settings
from fedlora.data import partitions
from fedlora.errors import SettingError, counted
from fedlora.seeding import Root

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Persons:
    """Persons on disk.

    Attributes:
        of_rows: of each training row the number of its person, (rows,).
        counts: how many persons each client trains on, (clients,).
    """

    of_rows: Numbers
    counts: Numbers

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """What `write` wrote; None where it did not."""
        if not (folder / "persons.npy").exists():
            return None
        return cls(*(np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("persons", "counts")))

    def sizes(self) -> dict[int, int]:
        """How many clients train on each number of persons, from the fewest."""
        sizes, clients = np.unique(self.counts, return_counts=True)
        return dict(zip(sizes.tolist(), clients.tolist(), strict=True))


def write(folder: Path, persons: Numbers, trained: Sequence[Numbers]) -> None:
    """Keep the persons of all rows, and how many each client trains on."""
    np.save(folder / "persons.npy", persons)
    np.save(folder / "counts.npy", np.array([len(np.unique(persons[rows])) for rows in trained], np.int64))


def numbered(names: Sequence[str]) -> Numbers:
    """A number for each name, from 0, in the order in which they first occur, (rows,)."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in names], np.int64)


def split(
    how: settings.Partition,
    targets: Numbers,
    owners: Sequence[str] | None,
    persons: Numbers | None,
    num_clients: int,
    seed: int,
) -> list[Numbers]:
    """The rows of each client, as `partitions.split` has them; of persons all rows, by their commonest label.

    Raises:
        SettingError: the rows cannot be split so, or a person is of two owners.
    """
    if persons is None:
        return partitions.split(how, targets, owners, num_clients, seed)
    if isinstance(how, settings.Natural):
        parts = partitions.split(how, targets, owners, num_clients, seed)
        if sum(len(np.unique(persons[part])) for part in parts) > persons.max() + 1:
            raise SettingError(
                "privacy.person",
                f"a person has rows of two values of {how.column!r}, and an epsilon is for what one client holds: "
                "take another data.partition, or a column that names persons anew with each",
            )
        return parts
    if num_clients > (count := int(persons.max()) + 1):
        few = f"{counted(num_clients, 'client')}, and only {counted(count, 'person')}"
        raise SettingError("clients.total", few)
    parts = partitions.split(how, _commonest(targets, persons), None, num_clients, seed)
    return [np.flatnonzero(np.isin(persons, part)) for part in parts]


def keep_back(
    share: float | None, parts: Sequence[Numbers], persons: Numbers | None, seed: Root
) -> tuple[list[Numbers], list[Numbers]]:
    """As `partitions.keep_back`; of persons a share, with all of their rows.

    Raises:
        SettingError: a client has too few to hold any out.
    """
    if persons is None or share is None:
        return partitions.keep_back(share, parts, seed)
    halves = partitions.keep_back(share, [np.unique(persons[part]) for part in parts], seed)

    def rows(half: Sequence[Numbers]) -> list[Numbers]:
        return [part[np.isin(persons[part], who)] for part, who in zip(parts, half, strict=True)]

    return rows(halves[0]), rows(halves[1])


def _commonest(targets: Numbers, persons: Numbers) -> Numbers:
    """The label that most rows of each person have, the first of equals, (persons,)."""
    (who, label), counts = np.unique(np.stack([persons, targets]), axis=1, return_counts=True)
    order = np.lexsort((label, -counts, who))
    _, first = np.unique(who[order], return_index=True)
    found: Numbers = label[order][first]
    return found
