"""Calibrations on disk, so that a run which goes on, is tried again or belongs to a sweep need not search again.

A file is named by all that a search depends on, and holds what it found, exactly. It is trusted no further than
that: what a run spends is counted from the noise that it adds, and held to the budget, whoever found that noise.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from fedlora.privacy import accounting
from fedlora.privacy.accounting import Accountant, Event

_FORMAT = 1  # raise it when a search finds other noise, or a file means something else
_SEARCHERS = ("dp-accounting", "opacus", "scipy", "numpy")

Search = Callable[..., list[float]]
"""What `accounting.calibrations` does: target, delta, sample rates, steps, accountant and what was spent before to
noise multipliers."""


def calibrations(
    folder: Path,
    target: float,
    delta: float,
    sample_rates: Sequence[float],
    steps: int,
    accountant: Accountant,
    before: tuple[Event, ...] = (),
) -> list[float]:
    """As `accounting.calibrations`, from the folder where it has been searched for.

    Args:
        folder: made where it is not there; where nothing can be written, nothing is kept.
        target: epsilon.
        delta: of the target.
        sample_rates: of a step.
        steps: how many.
        accountant: that counts.
        before: what is spent beside these steps.

    Raises:
        SettingError: as `accounting.calibrations`.
    """
    versions = {name: version(name) for name in _SEARCHERS}
    beside = [[event.to_json() for event in before]] if before else []
    key = json.dumps([_FORMAT, versions, target, delta, list(sample_rates), steps, accountant, *beside])
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if (found := _read(file, key, len(sample_rates))) is None:
        found = accounting.calibrations(target, delta, sample_rates, steps, accountant, before)
        with contextlib.suppress(OSError):
            _write(file, key, found)
    return found


def _checksum(key: str, noise: Sequence[float]) -> str:
    return hashlib.sha256(json.dumps([key, *noise]).encode()).hexdigest()


def _read(file: Path, key: str, count: int) -> list[float] | None:
    """What was found; None where nothing was, or the file is damaged."""
    try:
        told = json.loads(file.read_bytes())
        noise = [float(value) for value in told["noise"]]
        whole = told["key"] == key and told["checksum"] == _checksum(key, noise)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return noise if whole and len(noise) == count and all(0 < z < math.inf for z in noise) else None


def _write(file: Path, key: str, noise: Sequence[float]) -> None:
    """The file appears whole or not at all, also when two runs write it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".making-", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as made:
            json.dump({"key": key, "noise": list(noise), "checksum": _checksum(key, noise)}, made)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
