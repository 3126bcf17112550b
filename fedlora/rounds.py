"""The round loop: sample, send, collect, account, aggregate, evaluate, record, save."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import checkpoint, wire
from fedlora.adapter import Adapter, Change, Instruction, Update, fingerprint
from fedlora.central import CLIP_NORM, Central
from fedlora.checkpoint import Checkpoint, Merges
from fedlora.client import Client
from fedlora.data import Dataset
from fedlora.engine import Engine, Replies
from fedlora.engine.worker import Setter
from fedlora.errors import ContractError, RoundError
from fedlora.ledger import Holder, Ledger
from fedlora.privacy import Event, epsilon
from fedlora.scenario import Privacy, Scenario
from fedlora.seeding import generator
from fedlora.strategy import Merged, Strategy

JUDGED = 100  # clients whose own models are evaluated, at most

logger = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass
class Progress:
    """How far a run is; what a checkpoint keeps."""

    round: int
    adapter: Adapter
    bytes_up: int = 0
    bytes_up_head: int = 0
    bytes_down: int = 0
    failures: int = 0
    trained: int = 0  # clients that trained, over all rounds
    seconds: float = 0.0
    last: Line = field(default_factory=dict)  # the last loss and metric measured
    merges: int = 0  # that are in the base
    clip_norm: float | None = None  # of the next round, where clients are protected whole
    merges_seen: dict[str, int] = field(default_factory=dict)  # how many of them each client was sent

    def words(self) -> dict[str, Any]:
        """All but the tensors."""
        return {k: v for k, v in vars(self).items() if k not in ("round", "adapter")}


class Stopwatch:
    """Where the time of a round goes.

    Attributes:
        phases: seconds by the name of the phase.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last call was spent on `phase`."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


@dataclass(kw_only=True)
class Loop:
    """Everything that a round touches."""

    scenario: Scenario
    strategy: Strategy
    client: Client
    engine: Engine
    data: Dataset
    ledger: Ledger
    merges: Merges
    central: Central | None
    settings: Setter
    folder: Path
    on_round: Callable[[Line], None]
    repeatable: bool = True  # whether a round that runs again draws the same noise
    stop: Callable[[], bool] = lambda: False

    def run(self, now: Progress) -> Progress:
        """Rounds until the last, or until nobody may go on.

        Raises:
            RoundError: no client of a round replied.
            KeyboardInterrupt: `stop` said so; `now` holds what was finished.
        """
        for round in range(now.round + 1, self.scenario.rounds + 1):
            if self.stop():
                raise KeyboardInterrupt
            watch = Stopwatch()
            instruction = self.strategy.instruct(round, now.adapter, self._ranks)
            kept = {n: t for n, t in now.adapter.items() if n not in instruction.adapter}
            instruction = replace(instruction, frozen=fingerprint(kept))
            instruction = self._bounded(instruction, now)
            cohort, resting = self._within_budget(round, instruction)
            if not cohort and (self.central is None or resting):
                now.last["stopped"] = f"after round {round - 1}: another would pass every client's epsilon"
                break
            watch.lap("account")
            replies = self._exchange(instruction, cohort)
            watch.lap("train")
            self._catch_up(replies, now)
            before = {name: now.adapter[name] for name in self.strategy.held}
            updates = self._released(instruction, replies.updates, now)
            made = self.strategy.aggregate(before, updates)
            made = made if isinstance(made, Merged) else Merged(made, {})
            after = {**before, **made.adapter}
            self._check(before, after, made.base)
            adapter = {**now.adapter, **after}
            if made.base:
                self.engine.merge(self.merges.append(made.base))
            watch.lap("aggregate")
            figures = self._figures(round, adapter)
            watch.lap("evaluate")
            if not self._summed:
                figures |= self.strategy.diagnose(before, updates, after, made.base)
            watch.lap("diagnose")
            figures["resting"] = resting
            self._record(round, adapter, replies, figures, now, watch)
        return now

    def _exchange(self, instruction: Instruction, cohort: list[int]) -> Replies:
        """Send, train, collect and account; then the further trips of the round, if the strategy makes any.

        Raises:
            RoundError: nobody replied, or in a later trip nobody did any more.
        """
        round, sums = instruction.round, self.strategy.partial_sums or self._summed
        replies = self.engine.train(instruction, cohort, sums)
        self._spend(instruction, replies)
        if not cohort:
            return replies
        for trip in range(1, self.strategy.trips + 1):
            if not replies.updates:
                raise RoundError(f"round {round}: all {len(cohort)} clients failed; {_first_error(replies)}")
            if trip < self.strategy.trips:
                down = self.strategy.relay(trip + 1, replies.updates)
                there = [c for update in replies.updates for c in update.clients]
                asked = replace(instruction, adapter=down, ranked={}, trip=trip + 1)
                replies = replies.then(self.engine.train(asked, there, sums))
        return replies

    def _catch_up(self, replies: Replies, now: Progress) -> None:
        """Count what each client was sent to bring its base to the run's: the merges since it last took part."""
        if not self.merges:
            return
        for i, report in enumerate(replies.reports):
            missed = self.merges.bytes_since(now.merges_seen.get(str(report.client), 0))
            replies.reports[i] = replace(report, bytes_down=report.bytes_down + missed)
            now.merges_seen[str(report.client)] = len(self.merges)

    def _figures(self, round: int, adapter: Adapter) -> Line:
        """Loss and metric after a round, and those of clients' own models where they hold examples out."""
        metric = self.engine.description.metric
        if round % self.scenario.eval_every and round != self.scenario.rounds:
            return {"loss": None, metric: None}
        figures = {} if self.strategy.personal else dict(self.engine.evaluate(adapter))
        if self.scenario.data.client_test_share is not None:
            told = self.strategy.instruct(round, adapter, self._ranks)
            local = self.engine.judge(told, self._judged)
            figures |= {f"local_{key}": value for key, value in local.items()}
            if self.strategy.personal:
                figures |= local
        return figures

    @property
    def _ranks(self) -> list[int]:
        return self.scenario.clients.possible_ranks(self.scenario.model.adapter.r)

    @property
    def _judged(self) -> list[int]:
        """The clients whose own models are judged: all, or the same hundred each time."""
        total = self.scenario.clients.total
        if total <= JUDGED:
            return list(range(total))
        chosen = generator(self.scenario.seed, "judged").choice(total, size=JUDGED, replace=False)
        return [int(c) for c in np.sort(chosen)]

    @property
    def _summed(self) -> bool:
        """Whether the server may see no more of the updates than their sum."""
        return self.central is not None or self.scenario.secure_aggregation is not None

    def _bounded(self, instruction: Instruction, now: Progress) -> Instruction:
        """The instruction, with the bound on a client's change where clients are protected whole."""
        if self.central is None:
            return instruction
        if now.clip_norm is None:
            assert self.scenario.privacy is not None
            now.clip_norm = self.scenario.privacy.clip_norm
        return replace(instruction, config={**instruction.config, CLIP_NORM: now.clip_norm})

    def _released(self, instruction: Instruction, updates: list[Update], now: Progress) -> list[Update]:
        """What the strategy may see: the updates, or where clients are protected whole their noised mean."""
        if self.central is None:
            return updates
        received = {name: instruction.adapter[name] for name in instruction.send}
        bound = instruction.config[CLIP_NORM]
        released, now.clip_norm = self.central.release(instruction.round, received, updates, bound)
        return [released]

    def _draw(self, round: int) -> list[int]:
        """The cohort, ascending: from the seed and the round alone."""
        if self.central is not None:
            return self.central.cohort(round)
        told = self.scenario.clients
        chosen = generator(self.scenario.seed, round, "cohort").choice(
            told.total, size=told.cohort_size, replace=False
        )
        return [int(c) for c in np.sort(chosen)]

    def _within_budget(self, round: int, instruction: Instruction) -> tuple[list[int], int]:
        """Those of the cohort whose epsilon stays within the budget if they train, and how many do not."""
        cohort, paid = self._draw(round), self._paid(round)
        whole, privacy = self.scenario.client_privacy, self.scenario.example_privacy
        if self.central is not None and whole is not None and whole.epsilon is not None:
            event = self.central.event(instruction.config[CLIP_NORM])
            if self._would_pass(None, event, paid, whole):
                return [], self.scenario.clients.total
        if privacy is None or privacy.epsilon is None:
            return cohort, 0
        allowed = []
        for client in cohort:
            if not (held := self.data.num_examples(client)):  # a site, which counts for itself
                allowed.append(client)
                continue
            spends = self.client.spends(held, self.settings(instruction, held))
            if not self._would_pass(client, spends, paid, privacy):
                allowed.append(client)
        if resting := sorted(set(cohort) - set(allowed)):
            names = ", ".join(map(str, resting))
            logger.warning("round %d: another round would pass the epsilon of clients %s; they rest", round, names)
        return allowed, len(cohort) - len(allowed)

    def _would_pass(
        self, holder: Holder, event: Event | None, paid: Mapping[Holder, Event], privacy: Privacy
    ) -> bool:
        """Whether a budget's epsilon would be passed by an event, unless it is paid already."""
        more = [event] if event and paid.get(holder) != event else []
        events = [*self.ledger.events.get(holder, []), *more]
        assert privacy.epsilon is not None
        return epsilon(events, privacy.delta, privacy.accountant) > privacy.epsilon * (1 + 1e-9)

    def _spend(self, instruction: Instruction, replies: Replies) -> None:
        """Put the spend on disk before what it bought is used.

        A round that is run again after an interruption draws the same noise over the same examples: it
        gives the same updates, and costs nothing more, unless its noise or steps are other than before, or
        the noise is nobody's to draw again.
        """
        round, paid = instruction.round, self._paid(instruction.round)
        for privacy, events in self._costs(instruction, replies):
            new = {holder: event for holder, event in events.items() if paid.get(holder) != event}
            terms = {"delta": privacy.delta, "unit": privacy.unit, "accountant": privacy.accountant}
            self.ledger.spend(round, new, **terms)

    def _paid(self, round: int) -> Mapping[Holder, Event]:
        """What need not be paid again if a round runs again."""
        return self.ledger.spent(round) if self.repeatable else {}

    def _costs(
        self, instruction: Instruction, replies: Replies
    ) -> Iterator[tuple[Privacy, Mapping[Holder, Event]]]:
        """What a round costs whom, for each guarantee."""
        if (example := self.scenario.example_privacy) is not None:
            yield example, {r.client: r.event for r in replies.reports if r.event}
        if self.central is not None and (whole := self.scenario.client_privacy) is not None:
            yield whole, {None: self.central.event(instruction.config[CLIP_NORM])}

    def _check(self, before: Mapping[str, Any], after: Mapping[str, Any], merge: Change) -> None:
        what = type(self.strategy).__name__
        for module, sides in merge.items():
            if (sides[0].shape[:1] + sides[1].shape[1:]) != self.merges.shapes.get(module):
                raise ContractError(f"{what} merges into {module}, which is no layer of that shape with factors")
            if not all(np.isfinite(side).all() for side in sides):
                raise ContractError(f"{what} merges what is not finite into {module}; try a lower lr")
        for name, tensor in after.items():
            if name not in before or tensor.shape != before[name].shape:
                raise ContractError(f"{what} gave {name} another shape, or made it up")
            if not np.isfinite(tensor).all():
                raise ContractError(f"{what} made {name} not finite; try a lower lr")

    def _record(
        self, round: int, adapter: Adapter, replies: Replies, figures: Line, now: Progress, watch: Stopwatch
    ) -> None:
        """Count, write the lines of the round, save."""
        privacy, whole, reports = self.scenario.example_privacy, self.scenario.client_privacy, replies.reports
        spent = {
            r.client: epsilon(self.ledger.events.get(r.client, []), privacy.delta, privacy.accountant)
            for r in reports
            if privacy is not None
        }
        failed = sum(r.error is not None for r in reports)
        shared = [r for r in reports if "train_loss" in r.metrics]
        up, down = sum(r.bytes_up for r in reports), sum(r.bytes_down for r in reports)
        if figures["loss"] is not None:
            measured = ("loss", self.engine.description.metric, "exact_match")
            now.last.update({key: figures[key] for key in measured if key in figures})
        now.round, now.adapter, now.merges = round, adapter, len(self.merges)
        now.failures, now.trained = now.failures + failed, now.trained + len(reports) - failed
        now.bytes_up, now.bytes_down = now.bytes_up + up, now.bytes_down + down
        now.bytes_up_head += (len(reports) - failed) * self._head_bytes(round)
        watch.lap("account")
        seconds = sum(watch.phases.values())
        now.seconds += seconds
        loss = sum(r.metrics["train_loss"] for r in shared) / len(shared) if shared else None
        now.last["epsilon"] = max([now.last.get("epsilon") or 0.0, *spent.values()]) if privacy else None
        if whole is not None:
            now.last["epsilon"] = epsilon(self.ledger.events.get(None, []), whole.delta, whole.accountant)
        line: Line = {
            "round": round,
            "clients": len(reports) - failed,
            "failures": failed,
            **figures,
            "train_loss": loss,
            "bytes_up": up,
            "bytes_down": down,
            "epsilon": now.last["epsilon"],
            "seconds": round_to(seconds),
            "phases": {phase: round_to(took) for phase, took in watch.phases.items()},
        }
        self.ledger.clients(
            {
                "round": round,
                "client": r.client,
                "num_examples": r.num_examples,
                "steps": r.steps,
                "bytes_up": r.bytes_up,
                "bytes_down": r.bytes_down,
                "epsilon": spent.get(r.client),
                "seconds": round_to(r.seconds),
                "error": r.error,
                **r.metrics,
            }
            for r in reports
        )
        self.ledger.metrics(line)
        checkpoint.save(
            self.folder / "checkpoint",
            Checkpoint(round=round, adapter=now.adapter, strategy=self.strategy.state(), words=now.words()),
        )
        self.on_round(line)

    def _head_bytes(self, round: int) -> int:
        layout = self.strategy.layout
        sent = set(self.strategy.trains(round, layout)) & set(self.strategy.sends(round, layout))
        return wire.tensor_bytes(
            sorted(n for n in sent if layout[n].role == "head" and layout[n].trainable), layout
        )


def round_to(seconds: float) -> float:
    """Seconds as a record holds them."""
    return round(seconds, 4)


def _first_error(replies: Replies) -> str:
    bad = next(r for r in replies.reports if r.error is not None)
    return f"client {bad.client}: {bad.error}"
