"""What a site answers to `fedlora survey`: noised counts of its rows, one answer for the rows that it has.

A row adds one to its label, or parts of one where it has several, and one to its length. A person's rows add as
much together as one row. So the counts of two sites that differ in one row, or person, that counts for nothing in
one of them are at most the square root of two apart (in the 2-norm), and Gaussian noise of that scale hides it.

The site's account pays once. The noise follows from the site's own key and the rows, so who asks again gets the
same answer, for nothing. Other rows are another answer, which is paid for again, and needs another survey.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins, seeding
from fedlora.data import notes, reading
from fedlora.data.rows import Rows, as_bytes
from fedlora.deploy.account import Account
from fedlora.deploy.site import Budget, Site, Surveyed, task_of, taught
from fedlora.deploy.state import State
from fedlora.errors import Refusal, SettingError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event

SURVEY = "survey:"  # begins the name of what the account pays for; no run has such a name
ASKED = {"survey": True}  # what is signed in place of a scenario
BOUNDS = (8, 16, 32, 64, 128, 256, 512)  # words of a row; longer ones are counted together
NORM = math.sqrt(2)  # of what one row, or person, adds: 1 among labels, and 1 among lengths
_FINE = 2**20  # parts of one row


@dataclass(frozen=True)
class Counted:
    """The exact counts, which stay at the site.

    Attributes:
        labels: names of the first cells.
        cells: counts of labels, then of lengths, in parts of 2^-20: whole numbers.
        rows: a digest of the rows that were counted.
    """

    labels: Sequence[str]
    cells: NDArray[np.int64]
    rows: bytes


class Counts:
    """The count that was made last, which stands while the site file and the file of rows are as they were."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Site, tuple[int, ...]], Counted] | None = None

    def of(self, site: Site) -> Counted:
        """As `count`; rows that were read are not read again, unless they are images.

        Raises:
            SettingError: they cannot be read.
            OSError: there are none.
        """
        there = Path(site.data.train or "").stat()
        now = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns)
        if self._last is None or self._last[0] != (site, now):
            made = count(site)
            self._last = ((site, now), made) if len(made.cells) > len(made.labels) else None
            return made
        return self._last[1]


def event(told: Surveyed, budget: Budget) -> Event:
    """What an answer costs.

    Raises:
        SettingError: no noise reaches the survey's epsilon.
    """
    noise = accounting.calibrate(told.epsilon, budget.delta, 1.0, 1, budget.accountant)
    return Event(noise_multiplier=noise, sample_rate=1.0, steps=1, clip_norm=NORM)


def answer(
    site: Site, account: Account | None, state: State, asked: str, counts: Counts | None = None
) -> dict[str, Any]:
    """The words of an answer; it is paid for first, unless it was.

    Args:
        site: whose rows are counted.
        account: that pays.
        state: of the site, with its key.
        asked: name of the survey; one name is answered over the same rows alone, so that who once signed a survey
            is not asked for ever.
        counts: what was counted before.

    Raises:
        Refusal: the site file allows no survey, the budget is not enough, or the rows cannot be read.
        SettingError: of the rows, for the owner alone.
    """
    if site.survey is None or site.privacy is None or account is None:
        raise Refusal("it answers no survey: its site file has no section survey")
    counted, cost = (counts or Counts()).of(site), event(site.survey, site.privacy)
    unit = "example" if site.privacy.person is None else "person"
    terms = json.dumps([1, cost.noise_multiplier, counted.rows.hex(), list(counted.labels), BOUNDS, unit])
    key = seeding.key(state.key(), "survey", terms)
    if site.accept.submitters is not None and not state.same_survey(asked, hashlib.sha256(key).hexdigest()):
        raise Refusal("it answered this survey over other rows: ask by another survey")
    name = SURVEY + hashlib.sha256(key).hexdigest()[:12]
    if not account.paid(name):
        account.spend(name, 0, site.client, cost)
    std = cost.noise_multiplier * NORM
    noise = seeding.stream(key, "noise").normal(0.0, std, len(counted.cells))
    cells = np.rint(counted.cells / _FINE + noise)
    told = [int(cell) if cell >= site.survey.floor else None for cell in cells]
    number = len(counted.labels)
    return {
        "client": site.client,
        "name": site.name,
        "task": task_of(site),
        "unit": unit,
        "labels": list(counted.labels),
        "counts": told[:number],
        "lengths": told[number:],
        "noise": std,
        "epsilon": site.survey.epsilon,
        "delta": site.privacy.delta,
        "floor": site.survey.floor,
    }


def count(site: Site) -> Counted:
    """Count the rows that a run may train on.

    Raises:
        SettingError: they cannot be read.
    """
    task, held = plugins.find("tasks", task_of(site)), site.data
    rows, _ = reading.read_site(held, held.labels, taught(site))
    if not rows.texts:
        raise SettingError("data.files.train", f"{held.train}: holds no rows")
    labels = list(held.labels or ()) if task.labelled and task.target != "score" and rows.labels else []
    return Counted(labels, cells_of(rows, labels), _digest(rows))


def cells_of(rows: Rows, labels: Sequence[str]) -> NDArray[np.int64]:
    """The cells of `Counted`: of each label, then of each class of lengths unless the rows are images."""
    number = {label: at for at, label in enumerate(labels)}
    lengths = 0 if isinstance(rows.texts[0], bytes) else len(BOUNDS) + 1
    cells = np.zeros(len(labels) + lengths, np.int64)
    whose = rows.persons or range(len(rows.texts))
    share = Counter(whose)
    added: dict[Any, dict[int, float]] = {}  # of each row or person, by cell
    for at, row in enumerate(rows.texts):
        of = added.setdefault(whose[at], {})
        for cell, part in _cells(row, rows.labels[at] if labels and rows.labels else (), number, len(labels)):
            of[cell] = of.get(cell, 0.0) + part / share[whose[at]]
    for of in added.values():
        _add(cells, of)
    return cells


def _cells(row: Any, label: Any, number: Mapping[str, int], first: int) -> Iterator[tuple[int, float]]:
    """What one row adds, by cell: one among labels, and one among lengths."""
    parts = Counter([label] if isinstance(label, str) else label)
    for name, times in parts.items():
        yield number[name], times / parts.total()
    if not isinstance(row, bytes):
        yield first + int(np.searchsorted(BOUNDS, notes.length(row))), 1.0


def _add(cells: NDArray[np.int64], parts: Mapping[int, float]) -> None:
    """Add what one row, or person, adds, rounded down: never more than one among labels, nor among lengths."""
    for cell, part in parts.items():
        cells[cell] += int(part * (1 - 1e-9) * _FINE) if part < 1 else _FINE


def _digest(rows: Rows) -> bytes:
    made = hashlib.sha256()
    for part in (map(as_bytes, rows.texts), (repr(x).encode() for x in rows.labels or ()), rows.persons or ()):
        for one in part:
            text = one if isinstance(one, bytes) else one.encode("utf-8", "surrogatepass")
            made.update(len(text).to_bytes(8, "big") + text)
        made.update(b"\xff" * 8)
    return made.digest()


def rule(site: Site) -> str:
    """What a survey may learn, in a sentence for the owner."""
    if site.survey is None or site.privacy is None:
        return "may learn no counts of these rows by a survey (survey)"
    try:
        std = event(site.survey, site.privacy).noise_multiplier * NORM
    except SettingError as error:
        return f"may learn nothing by a survey: {error.message}"
    units = "rows" if site.privacy.person is None else "persons"
    return (
        f"may learn by a survey how many {units} have each label and length, to {1.96 * std:,.0f} either way; it "
        f"costs epsilon {site.survey.epsilon:g}, and again where the rows have changed; counts below "
        f"{site.survey.floor} are not told (survey)"
    )
