"""Rounds on the virtual clock of a simulated world: in step, or each update as it comes.

In step, the server asks `over_select` times as many clients as a round needs, and the round ends with the last
of the first that it needs, or at the deadline. The others are dropped; those that had begun to train have paid in
privacy all the same.

Not in step (FedBuff: Nguyen et al., 2022, https://arxiv.org/abs/2106.06639), `concurrency` clients are always
under way. Each K = `per_round` updates that arrive make the next adapter

    x_{v+1} = x_v + sum_i w_i (1 + s_i)^-1/2 change_i / sum_i w_i,

with change_i what client i trained since the adapter that it was sent, s_i adapters ago. A client trains at once
with that adapter; only its arrival waits. It starts once for each adapter at most: it would train the same again.
Second moments that are averaged are no changes: those of client i count (1 + s_i)^-1/2, and the server's the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlora import traffic
from fedlora.adapter import Instruction, Update
from fedlora.data.store import Dataset
from fedlora.engine import Replies, Report
from fedlora.engine.intake import Intake
from fedlora.engine.transport import Transport
from fedlora.errors import RoundError
from fedlora.privacy.accounting import Event
from fedlora.rounds.progress import Progress, UnderWay
from fedlora.rounds.world import DAY, PATIENCE, PAUSE, Journey, World
from fedlora.scenario import Scenario
from fedlora.strategy import Strategy

Train = Callable[[Instruction, list[int], list[Report]], Replies]
"""The replies of clients, paid for together with those of the reports given."""


@dataclass(frozen=True)
class Race:
    """How a round in step goes.

    Attributes:
        instruction: of the round, with the steps of those who take fewer.
        used: the clients whose updates are used, ascending.
        lost: reports of the others.
        seconds: virtual, that each of those used took.
    """

    instruction: Instruction
    used: list[int]
    lost: list[Report]
    seconds: Mapping[int, float]

    def told(self, replies: Replies) -> Replies:
        """The replies of those used, with reports of all."""
        timed = [replace(r, virtual_seconds=self.seconds[r.client]) for r in replies.reports]
        return replace(replies, reports=sorted([*timed, *self.lost], key=lambda report: report.client))


@dataclass(kw_only=True)
class Pace:
    """Who takes part in a round, and when it ends.

    Attributes:
        scenario, strategy, data: of the run.
        intake: knows the shapes of what clients send.
        spends: what training costs a client.
    """

    scenario: Scenario
    strategy: Strategy
    data: Dataset
    intake: Intake
    spends: Callable[[Instruction, int], Event | None]

    def __post_init__(self) -> None:
        self.world = World(self.scenario)
        self.transport = Transport(self.scenario, self.strategy)
        self._sizes: tuple[int, dict[int, tuple[int, int]]] = (0, {})  # by rank, of a round

    @property
    def in_step(self) -> bool:
        """Whether rounds are."""
        return self.world.told.concurrency is None

    # In step.

    def draw(self, now: Progress, round: int, *path: int | str) -> list[int]:
        """The clients that a round asks, ascending; the clock goes on while too few are there.

        Raises:
            RoundError: they do not come.
        """
        told = self.scenario.clients
        count = min(told.total, round_up(told.cohort_size * self.world.told.over_select))
        for turn in self._patiently(now, round):
            found = self.world.look(count, now.virtual_seconds, round, "cohort", *path, turn)
            if len(found) >= told.min_replies:
                return sorted(found)
        raise RoundError(self._nobody(round))

    def present(self, cohort: list[int], now: Progress) -> list[int]:
        """Those of a cohort that are there."""
        return [client for client in cohort if self.world.is_there(client, now.virtual_seconds)]

    def race(
        self, instruction: Instruction, cohort: list[int], now: Progress, missed: Callable[[int], int]
    ) -> "Race":
        """Let the clients of a round go; the clock goes on to its end.

        Args:
            instruction: of the round.
            cohort: who is asked.
            now: has the clock.
            missed: bytes that a client is sent to bring its base to the run's.
        """
        start, told = now.virtual_seconds, self.world.told
        ways = [self._journey(instruction, client, start, missed(client)) for client in cohort]
        needed = min(self.scenario.clients.cohort_size, len(ways)) if told.over_select > 1 else len(ways)
        first = sorted((way for way in ways if way.comes), key=lambda way: (way.arrives, way.client))[:needed]
        end = first[-1].arrives if len(first) == needed and first else start + (told.deadline or 0.0)
        now.virtual_seconds = end
        used = {way.client for way in first}
        lost = [self._lost(instruction, way, end) for way in ways if way.client not in used]
        took = {way.client: way.arrives - start for way in first}
        return Race(self._steps(instruction, first), sorted(used), lost, took)

    # Each as it comes.

    def arrivals(
        self, instruction: Instruction, now: Progress, may_train: Callable[[int], bool], train: Train
    ) -> tuple[Replies, dict[str, Any]] | None:
        """The next K updates that arrive, with reports of all that trained meanwhile.

        Args:
            instruction: of the round.
            now: has the clock, and who is under way.
            may_train: whether a client can afford to.
            train: runs clients, and pays.

        Returns:
            Replies whose updates are as the strategy may take their mean; how many clients rest, and the mean
            staleness. None where all rest.

        Raises:
            RoundError: nobody comes.
        """
        round, reports = instruction.round, list[Report]()
        used: list[UnderWay] = []
        asked: set[int] = set()
        resting: set[int] = set()
        waiting: list[Journey] = []  # that have started with this adapter, and are to train

        def start() -> None:
            assert self.world.told.concurrency is not None
            free = self.world.told.concurrency - len(now.under_way) - len(waiting)
            if free <= 0:
                return
            busy = {one.journey.client for one in now.under_way} | {way.client for way in waiting}
            path = (round, "cohort", len(asked))
            out = asked | busy | resting
            for client in self.world.look(free + len(out), now.virtual_seconds, *path):
                if free == 0 or client in out:
                    continue
                if not may_train(client):
                    resting.add(client)
                    continue
                asked.add(client)
                waiting.append(self._journey(instruction, client, now.virtual_seconds, 0))
                free -= 1

        def send() -> None:
            """Train those who wait."""
            come = sorted((way for way in waiting if way.comes), key=lambda way: way.client)
            gone = [way for way in waiting if not way.comes]
            lost = [self._lost(instruction, way, way.gone) for way in gone]
            replies = train(self._steps(instruction, come), [way.client for way in come], lost)
            changes = {u.clients[0]: self._change(instruction, u) for u in replies.updates}
            took = {way.client: way.arrives - way.start for way in come}
            reports.extend(
                replace(r, virtual_seconds=took.get(r.client, r.virtual_seconds)) for r in replies.reports
            )
            now.under_way += [UnderWay(way, changes.get(way.client)) for way in waiting]
            waiting.clear()

        needed, turns = self.scenario.clients.cohort_size, self._patiently(now, round)
        while len(used) < needed:
            start()
            if waiting and (not now.under_way or _first(waiting) < min(_order(o.journey) for o in now.under_way)):
                send()
            if not now.under_way:
                if used:
                    break  # whoever is there has answered
                if len(asked | resting) == self.scenario.clients.total or next(turns, None) is None:
                    if resting:
                        return None
                    raise RoundError(self._nobody(round))
                continue
            one = min(now.under_way, key=lambda o: _order(o.journey))
            now.under_way.remove(one)
            now.virtual_seconds = max(now.virtual_seconds, one.journey.ends)
            if one.change is not None:
                used.append(one)
        if waiting:
            send()
        used.sort(key=lambda one: (one.journey.client, one.journey.round))
        stale = [round - one.journey.round for one in used]
        updates = [self._arrived(instruction, one, s) for one, s in zip(used, stale, strict=True)]
        reports.sort(key=lambda report: report.client)
        return Replies(updates, reports), {"resting": len(resting), "staleness": sum(stale) / len(stale)}

    def _change(self, instruction: Instruction, update: Update) -> Update:
        adapter = {name: tensor - instruction.adapter[name] for name, tensor in update.adapter.items()}
        return replace(update, adapter=adapter)

    def _arrived(self, instruction: Instruction, one: UnderWay, staleness: int) -> Update:
        assert one.change is not None
        weight = (1 + staleness) ** -0.5
        adapter = {
            name: (instruction.adapter[name] + weight * change).astype(change.dtype)
            for name, change in one.change.adapter.items()
        }
        moments = (1 - weight) * instruction.moments + weight * one.change.moments
        return replace(one.change, adapter=adapter, moments=moments.astype(np.float32))

    # Both.

    def _patiently(self, now: Progress, round: int) -> Iterator[int]:
        """Looks at who is there, with the clock going on between them."""
        for turn in range(int(PATIENCE / PAUSE)):
            if turn:
                now.virtual_seconds += PAUSE
            yield turn

    def _nobody(self, round: int) -> str:
        return f"round {round}: nobody came within {PATIENCE / DAY:g} days of virtual time; see world.availability"

    def _journey(self, instruction: Instruction, client: int, start: float, missed: int) -> Journey:
        rank = self.scenario.rank(client, instruction.round)
        down, up = self._bytes(instruction, rank)
        held = self.data.num_examples(client)
        return self.world.journey(
            client,
            instruction.round,
            start,
            num_examples=held,
            num_units=self.data.units(client),
            bytes_down=down + missed,
            bytes_up=up,
        )

    def _bytes(self, instruction: Instruction, rank: int) -> tuple[int, int]:
        """Of an instruction, and of the tensors of its answer, at a rank."""
        if self._sizes[0] != instruction.round:
            self._sizes = (instruction.round, {})
        sizes = self._sizes[1]
        if rank not in sizes:
            told = instruction.at(rank)
            shapes = self.intake.expected(told, rank)
            down = traffic.instruction_bytes(told, self.strategy.layout, self.transport.down)
            sizes[rank] = (down, traffic.arrays_bytes(shapes, self.transport.up))
        return sizes[rank]

    def _steps(self, instruction: Instruction, ways: list[Journey]) -> Instruction:
        whole = self.scenario.clients.local_steps
        return replace(instruction, steps={way.client: way.steps for way in ways if way.steps < whole})

    def _lost(self, instruction: Instruction, way: Journey, end: float) -> Report:
        """What became of a client whose update is not used: it has paid if it began to train before the end."""
        given_up = way.start + (self.world.told.deadline or float("inf"))
        vanished = not way.comes and way.gone <= end and way.gone < given_up
        down, up = way.sent(end)
        began = way.trains <= min(end, way.gone)
        return Report(
            client=way.client,
            num_examples=self.data.num_examples(way.client),
            steps=0,
            bytes_up=up,
            bytes_down=down,
            seconds=0.0,
            event=self.spends(self._steps(instruction, [way]), way.client) if began else None,
            error="vanished" if vanished else "late",
            virtual_seconds=min(end, way.ends) - way.start,
            late=True,
        )


def _order(way: Journey) -> tuple[float, int]:
    return way.ends, way.client


def _first(ways: list[Journey]) -> tuple[float, int]:
    return min(map(_order, ways))


def round_up(number: float) -> int:
    """The next whole number, but for what floating point adds."""
    return -int(-(number - 1e-9) // 1)
