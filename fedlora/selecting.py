"""A sweep of which the best run alone leaves: how many runs there are, what each is, and what that costs.

`fedlora.privacy.selection` has the theorem. So how many runs there are, which point of the grid each takes and its
seed are drawn from the operating system. They stay in the sweep's folder: if it goes on nothing is drawn again.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora import prepare
from fedlora.errors import SettingError, UserError
from fedlora.privacy import ledger, wording
from fedlora.privacy.accounting import Event
from fedlora.privacy.noise import Stream
from fedlora.privacy.selection import epsilon_of_best, number
from fedlora.scenario import Scenario

DRAWN = "drawn.json"


def refuses(search: Mapping[str, Any], stop_early: object) -> str | None:
    """Why a sweep is none of which the best run alone may leave at the price of that; None if it is."""
    if any(not isinstance(given, list) for given in search.values()):
        return "each run draws a point of a grid: write lists of values"
    if any(part.strip() == "seed" for key in search for part in key.split(",")):
        return "each run has a seed of its own: leave seed out of search"
    if stop_early is not None:
        return "a run that ends early tells of the others: leave stop_early out"
    return None


def check(points: Sequence[Scenario]) -> None:
    """Make sure that one promise is asked for at every point, and that scores are of public rows.

    Raises:
        SettingError: it is not, or they are not.
    """
    units = {point.privacy.protects if point.privacy else None for point in points}
    if None in units or len(units) > 1:
        raise SettingError("select", "the best of private runs leaves: give every point privacy, of one unit")
    for point in points:
        assert point.privacy is not None
        if point.data.client_test_share is not None or point.privacy.share_metrics:
            raise SettingError(
                "select",
                "scores are of public rows: leave data.client_test_share and privacy.share_metrics out",
            )
        if point.privacy.example is not None or point.shares_noise:
            raise SettingError("select", "one promise has a price: leave privacy.example and shared noise out")


def drawn(points: Sequence[Mapping[str, Any]], mean: float, folder: Path) -> list[dict[str, Any]]:
    """The settings of each run, drawn once for a folder.

    Args:
        points: of the grid, by single settings.
        mean: number of runs.
        folder: of the sweep.

    Raises:
        UserError: what was drawn is damaged.
    """
    if not (file := folder / DRAWN).exists():
        coins = Stream.fresh()
        picks = coins.integers(0, len(points), number(mean, coins))
        made = [
            {**points[pick], "seed": int(word) >> 1}
            for pick, word in zip(picks, coins.words(len(picks)), strict=True)
        ]
        part = file.with_suffix(".part")
        part.write_text(json.dumps(made))
        os.replace(part, file)
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        if not rows or any(set(row) != {*points[0], "seed"} for row in rows):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: is damaged; name another folder with --out") from error
    return rows


def price(points: Sequence[Scenario], mean: float, runs: Iterable[Path] = ()) -> tuple[float, str]:
    """Epsilon of giving out the best run alone, and what it means in words.

    Args:
        points: of the grid.
        mean: number of runs.
        runs: folders of those that were begun. One that was interrupted, or tried a round again, may have spent
            more than is planned.
    """
    first = points[0].privacy
    assert first is not None
    delta = min(point.privacy.delta for point in points if point.privacy is not None)
    spent = [[*ledger.replay(file).values()] for run in runs if (file := run / "privacy.jsonl").exists()]
    found = epsilon_of_best([*map(planned, points), *filter(None, spent)], mean, delta)
    whom, relation = wording.protected(first.protects, first.person), wording.neighbours(first.protects)
    said = f"({found:.3g}, {delta:g})-differential privacy for each {whom}"
    said = said if math.isfinite(found) else f"no epsilon bounds it at delta {delta:g}"
    return found, (
        f"if the best run alone leaves: {said}; it does not hold against anyone who saw other runs, or how many "
        f"there were; {relation}; by Renyi DP of "
        f"private selection (Papernot and Steinke, 2022), assuming {wording.assumed(first.protects)}, a geometric "
        f"number of runs of mean {mean:g}, and that each draws any point of the grid alike"
    )


def planned(point: Scenario) -> list[list[Event]]:
    """What every holder of a budget may spend in a run, by the noise and the steps that the scenario allows."""
    told, asked = point.clients, point.privacy
    assert asked is not None
    if (whole := prepare.central(point, 0, prepare.known)) is not None:
        once, more = (whole.event(asked.clip_norm, again=again) for again in (False, True))
        return [[replace(once, steps=point.rounds), replace(more, steps=asked.reserve)]]
    setup = prepare.noised(prepare.prepare(point), prepare.known).setup
    assert setup.noise is not None
    bands = setup.bands or dict.fromkeys(setup.noise, 1)
    return [
        [
            Event(
                noise_multiplier=noise,
                sample_rate=min(told.rate(size) * bands[size], 1.0),
                steps=(point.rounds + asked.reserve) * told.local_steps,
                clip_norm=asked.clip_norm,
                bands=bands[size],
            )
        ]
        for size, noise in setup.noise.items()
    ]
