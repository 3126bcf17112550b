"""A rehearsal of a run: the real round loop, worker, strategy and messages, with clients that do not train.

They send tensors of the right shapes, and the model has shapes without weights; what is sent and spent is what the
run will count.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora import prepare, suitability
from fedlora import scenario as scenarios
from fedlora import strategy as strategies
from fedlora.adapter import Adapter, Change, Instruction, Layout, Tensor, Update
from fedlora.client import Client, Rng, Setter, Settings
from fedlora.data.store import Partition
from fedlora.engine import Replies, Setup
from fedlora.engine.base import Figures
from fedlora.engine.inline import InlineEngine
from fedlora.engine.secure import exchanged, size
from fedlora.errors import SettingError
from fedlora.privacy import accounting, cohorts
from fedlora.privacy.accounting import Event
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Holder, Ledger
from fedlora.privacy.mechanisms import central
from fedlora.rounds.checkpoint import Merges
from fedlora.rounds.loop import Loop
from fedlora.rounds.progress import Line, Progress, Stopwatch
from fedlora.rounds.turning import Turning
from fedlora.scenario import Scenario
from fedlora.schedules import contract as schedules
from fedlora.seeding import generator

if TYPE_CHECKING:
    from fedlora.tasks.contract import Task


class Stage:
    """Where strategies are rehearsed: a worker for each kind of adapter, of shapes without weights."""

    def __init__(
        self, scenario: Scenario, setup: Setup, ready: prepare.Prepared, metrics: Mapping[str, float]
    ) -> None:
        self.scenario, self.setup, self.ready, self.metrics = scenario, setup, ready, metrics
        self.engines: dict[str, _Engine] = {}

    def rehearse(self, use: str, options: Mapping[str, Any], rounds: int) -> "Rehearsal":
        """The first rounds of a strategy.

        Raises:
            FedloraError: it cannot do what the scenario asks for.
        """
        part = scenarios.Strategy(use=use, **options)
        asked = self.scenario.strategy.model_copy(update={"use": use})  # with its server
        told = self.scenario.clients.model_copy(update={"max_norm": None})  # what a stand-in sends is no change
        scenario = self.scenario.model_copy(update={"strategy": part, "rounds": rounds, "clients": told})
        strategy = strategies.load(use, options)
        suitability.check(strategy, self.scenario.model_copy(update={"strategy": asked}))
        engine = self._engine(scenario, strategy)
        found, worker, real = engine.description, engine.worker, self.ready.client
        strategy.bind(found.layout, found.kind, found.initial, real.private)
        suitability.check_bound(strategy)
        vars(strategy)["diagnose"] = lambda *told: {}  # how far averages are off says nothing of stand-ins
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            ledger, whole = _Memory(folder), prepare.central(scenario, scenario.seed, prepare.known)
            if (event := prepare.statistic(scenario, prepare.known)) is not None:
                ledger.spend(0, {c: event for c in range(scenario.clients.total) if self.ready.data.units(c)})
            worker.client = real
            worker.serve(strategies.load(use, options), folder)
            worker.client = _StandIn(real, self.metrics, found.layout)
            budget = _Budget(
                scenario=scenario,
                client=real,
                settings=Setter(scenario, self.setup.noise, self.setup.bands),
                data=self.ready.data,
                central=whole,
                ledger=ledger,
                repeatable=False,  # nothing is drawn
            )
            turning = None
            if (scheduled := schedules.load(scenario.model.adapter.schedule)) is not None:
                scheduled.bind(found.layout, found.kind, scenario.seed, found.weights)
                turning = Turning(schedule=scheduled, scenario=scenario)
            loop = Rehearsal(
                scenario=scenario,
                turning=turning,
                strategy=strategy,
                engine=engine,
                data=self.ready.data,
                budget=budget,
                ledger=ledger,
                central=whole,
                merges=Merges(folder / "merges", found.weights),
                folder=folder,
                on_round=lambda line: None,
            )
            end = loop.run(Progress(round=0, adapter=dict(found.initial)))
        loop.stopped = end.last.get("stopped")
        return loop

    def base_parameters(self) -> int:
        """Numbers in the base model, without what the adapter adds."""
        held = next(iter(self.engines.values())).worker.task.model.named_parameters()
        return sum(p.numel() for n, p in held if "lora_" not in n and ".modules_to_save." not in n)

    def _engine(self, scenario: Scenario, strategy: strategies.Strategy) -> "_Engine":
        name = type(suitability.kind_of(strategy, scenario)).__name__
        if name not in self.engines:
            self.engines[name] = _Engine(scenario.clients.total)
            self.engines[name].start(replace(self.setup, scenario=scenario.model_dump(), device="meta"))
        return self.engines[name]


class _Engine(InlineEngine):
    """Nothing is evaluated, and the base stays as it is."""

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        replies = self._masked(instruction, super().train(instruction, cohort, partial_sums))
        if central.SUM_NOISE not in instruction.config:
            return replies
        return replace(replies, carried=1.0)  # nobody drops out

    def _masked(self, instruction: Instruction, replies: Replies) -> Replies:
        """With the bytes of masked vectors, and of the keys and shares that take their masks off."""
        asked, many = self.worker.scenario.secure_aggregation, len(replies.reports)
        if asked is None or many < cohorts.LEAST:
            return replies
        up, down = map(round, exchanged(many))
        up += 4 * (size(instruction) - 1)
        told = [replace(r, bytes_up=up, bytes_down=r.bytes_down + down) for r in replies.reports]
        return replace(replies, reports=told)

    def evaluate(self, adapter: Adapter) -> Figures:
        return {"loss": 0.0, self.description.metric: 0.0}

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        return dict.fromkeys(cohort, self.evaluate({}))

    def merge(self, change: Change) -> None:
        pass


class _StandIn(Client):
    """Sends tensors of the right shapes: random, so that no strategy meets a rank below the full one.

    Numbers of large tensors are large, so that a choice of layers falls on the largest.
    """

    def __init__(self, real: Client, metrics: Mapping[str, float], layout: Layout) -> None:
        self.real, self.metrics, self.private = real, metrics, real.private
        rng = generator(0, "stand-in")
        self.tensors: dict[str, Tensor] = {
            name: (rng.standard_normal(slot.shape) * 1e-5 * math.prod(slot.shape) ** 0.5).astype(np.float32)
            for name, slot in layout.items()
        }

    def spends(self, num_examples: int, settings: Settings) -> Event | None:
        return self.real.spends(num_examples, settings)

    def fit(self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng) -> Update:
        sent = {}
        for name in settings.send:
            shape = task.kind.shape(task.layout[name], task.rank)
            whole = self.tensors[name][tuple(slice(size) for size in shape)]
            sent[name] = np.roll(whole, partition.client, range(whole.ndim))  # clients' directions differ
        return Update(
            adapter=sent, weight=1.0, clients=(partition.client,), metrics=self.metrics, state=settings.state
        )


class _Memory(Ledger):
    """A ledger that writes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.spent_by: dict[Holder, list[tuple[int, Event]]] = {}  # rounds and events of each holder

    def spend(
        self,
        round: int,
        events: Mapping[Holder, Event],
        attempt: int = 0,
        drawn: Mapping[Holder, tuple[str, int]] | None = None,
        **guarantee: Any,
    ) -> None:
        for holder, event in events.items():
            self.events[holder] = accounting.added(self.events.get(holder, ()), event)
            self.spent_by.setdefault(holder, []).append((round, event))


class _Budget(Budget):
    """Where noise is calibrated to a budget nobody passes it."""

    def within(self, instruction: Instruction, cohort: list[int], attempt: int = 0) -> tuple[list[int], int]:
        asked = (self.scenario.client_privacy, self.scenario.example_privacy)
        if all(a is None or a.noise_multiplier is None for a in asked):
            return cohort, 0
        return super().within(instruction, cohort, attempt)


@dataclass(kw_only=True)
class Rehearsal(Loop):
    """The round loop without a disk.

    Attributes:
        ledger: who spent what.
        lines: `round, clients, bytes_up, bytes_down` of each round; in a world also `late, virtual_seconds`.
        stopped: why it ended before its last round; None if it did not.
    """

    ledger: _Memory
    lines: list[Line] = field(default_factory=list)
    stopped: str | None = None

    def _record(
        self, round: int, adapter: Adapter, replies: Replies, figures: Line, now: Progress, watch: Stopwatch
    ) -> None:
        now.round, now.adapter, now.merges = round, adapter, len(self.merges)
        reports = replies.reports
        if failed := next((r.error for r in reports if r.error and not r.late), None):
            raise SettingError("strategy.use", failed)
        sizes = {f"bytes_{way}": sum(getattr(r, f"bytes_{way}") for r in reports) for way in ("up", "down")}
        late = sum(r.late for r in reports)
        clock = {"late": late, "virtual_seconds": now.virtual_seconds} if self._pace else {}
        self.lines.append({"round": round, "clients": len(reports) - late, **sizes, **clock})
