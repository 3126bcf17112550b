"""A world of devices: who is there, how fast they are, and who vanishes, on a virtual clock.

Everything here is a function of the seed, the client and the time or the round, so that a run is the same however
it is spread over workers, and goes on from a checkpoint with nothing kept but the clock. Times are in virtual
seconds since the run began.
"""

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora.errors import SettingError
from fedlora.scenario import Diurnal, Markov, Scenario, Tier, Trace
from fedlora.seeding import generator

HOUR, DAY = 3600.0, 86400.0
MEGABIT = 125_000  # bytes
PAUSE = 600.0  # seconds after which a server that finds nobody looks again
PATIENCE = 7 * DAY  # seconds that it looks for

Until = Callable[[int, float], float]
"""When a client that is there at a time will go; that time itself where it is not there."""


@dataclass(frozen=True, kw_only=True)
class Journey:
    """A client's way through a round.

    Attributes:
        client: its id.
        round: whose adapter it takes.
        start, trains, sends, arrives: when it is asked, has received, has trained, and has sent.
        gone: when it vanishes, or is given up.
        steps: local steps that it takes.
        bytes_down, bytes_up: of its tensors, both ways.
    """

    client: int
    round: int
    start: float
    trains: float
    sends: float
    arrives: float
    gone: float
    steps: int
    bytes_down: int
    bytes_up: int

    @property
    def comes(self) -> bool:
        """Whether its update reaches the server."""
        return self.arrives <= self.gone

    @property
    def ends(self) -> float:
        """When the server hears from it, or no longer waits for it."""
        return min(self.arrives, self.gone)

    def sent(self, time: float) -> tuple[int, int]:
        """Bytes down and up by a time, where it never arrives."""
        time = min(time, self.gone)
        down = _share(time, self.start, self.trains) * self.bytes_down
        return int(down), int(_share(time, self.sends, self.arrives) * self.bytes_up)


def _share(time: float, begin: float, end: float) -> float:
    return min(max((time - begin) / (end - begin), 0.0), 1.0) if end > begin else float(time >= end)


class World:
    """The devices of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        """Of a scenario with a `world`.

        Raises:
            SettingError: its trace cannot be read.
        """
        assert scenario.world is not None
        self.told, self.clients, self.seed = scenario.world, scenario.clients, scenario.seed
        self._until = _availability(self.told.availability, self.seed)

    def is_there(self, client: int, time: float) -> bool:
        """Whether a client can be asked."""
        return self._until(client, time) > time

    def look(self, count: int, time: float, *path: int | str) -> list[int]:
        """Up to `count` clients that are there, in the order of a draw; of many clients not all are looked at."""
        total = self.clients.total
        order = generator(self.seed, *path).choice(total, size=min(total, max(1000, 20 * count)), replace=False)
        found: list[int] = []
        for client in order:
            if len(found) == count:
                break
            if self.is_there(int(client), time):
                found.append(int(client))
        return found

    def journey(
        self,
        client: int,
        round: int,
        start: float,
        *,
        num_examples: int,
        bytes_down: int,
        bytes_up: int,
        num_units: int | None = None,
    ) -> Journey:
        """How a client fares that is asked at a time.

        Its speed in a round is its tier's times `exp(spread * N(0, 1))`. With `partial_work` it takes as many
        steps as leave time to send them before the deadline, and at least one. Of `num_units` persons a step takes
        as many as `batch_size`, with as many rows as a person has in the mean.
        """
        told, tier = self.told, self.clients.tier(client, self.seed) or Tier(share=1)
        rng = generator(self.seed, round, client, "device")
        slow, chance, when = math.exp(told.spread * rng.standard_normal()), rng.random(), rng.random()
        units = num_units or num_examples
        batch = self.clients.batch(units) * num_examples / units
        step = min(batch, num_examples) * tier.seconds_per_example * slow
        down = bytes_down / (tier.megabits_down * MEGABIT)
        up = bytes_up / (tier.megabits_up * MEGABIT)
        deadline = math.inf if told.deadline is None else told.deadline
        steps = self.clients.local_steps
        if told.partial_work and down + steps * step + up > deadline:
            steps = min(steps, max(1, math.floor((deadline - down - up) / step)))
        arrives = start + down + steps * step + up
        gone = min(start + deadline, self._until(client, start))
        if chance < told.dropout:
            gone = min(gone, start + when * (arrives - start))
        return Journey(
            client=client,
            round=round,
            start=start,
            trains=start + down,
            sends=start + down + steps * step,
            arrives=arrives,
            gone=gone,
            steps=steps,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
        )


def _availability(told: Diurnal | Markov | Trace | None, seed: int) -> Until:
    match told:
        case Diurnal():
            return _diurnal(told, seed)
        case Markov():
            return _markov(told, seed)
        case Trace():
            return _trace(told)
    return lambda client, time: math.inf


def _diurnal(told: Diurnal, seed: int) -> Until:
    """Each hour by a coin, whose chance goes up and down over the day as a cosine does."""

    def there(client: int, hour: int) -> bool:
        swing = (1 + math.cos(2 * math.pi * (hour % 24 - told.peak_hour) / 24)) / 2
        chance = told.low + (told.high - told.low) * swing
        return bool(generator(seed, client, hour, "there").random() < chance)

    def until(client: int, time: float) -> float:
        first = hour = int(time // HOUR)
        while hour < first + 48 and there(client, hour):
            hour += 1
        return hour * HOUR if hour > first else time

    return until


def _markov(told: Markov, seed: int) -> Until:
    """On and off for times that are exponential; each day begins again, with the share of time that is on."""

    def until(client: int, time: float) -> float:
        day = int(time // DAY)
        rng, now = generator(seed, client, day, "there"), day * DAY
        on = bool(rng.random() < told.on / (told.on + told.off))
        while now <= time:
            now += rng.exponential(told.on if on else told.off)
            on = not on
        ends = min(now, (day + 1) * DAY)
        return time if on else ends  # it was turned over once more

    return until


def _trace(told: Trace) -> Until:
    """Rows of a file, over and over."""
    spans = _spans(told)
    period = told.period or max((end for rows in spans.values() for _, end in rows), default=1.0)

    def until(client: int, time: float) -> float:
        rows = spans.get(client, ())
        base, at = divmod(time, period)
        place = bisect_right(rows, (at, math.inf)) - 1
        return base * period + rows[place][1] if place >= 0 and rows[place][1] > at else time

    return until


def _spans(told: Trace) -> Mapping[int, Sequence[tuple[float, float]]]:
    spans: dict[int, list[tuple[float, float]]] = {}
    try:
        with open(told.file, newline="", encoding="utf-8") as stream:
            for number, row in enumerate(csv.DictReader(stream), 2):
                start, end = float(row["start"]), float(row["end"])
                if not 0 <= start < end < math.inf:
                    raise ValueError(f"line {number}: start and end are not in order")
                spans.setdefault(int(row["client"]), []).append((start, end))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise SettingError(
            "world.availability.file",
            f"{told.file}: is no table of client, start and end in seconds: {error}",
        ) from error
    return {client: sorted(rows) for client, rows in spans.items()}
