"""The round loop: sample, send, collect, account, aggregate, evaluate, record, save."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import returned, traffic
from fedlora.adapter import Adapter, Change, Instruction, Update, fingerprint
from fedlora.data.store import Dataset
from fedlora.engine import Engine, Replies, Report
from fedlora.engine.intake import Intake
from fedlora.engine.transport import Transport
from fedlora.errors import RoundError
from fedlora.metrics import confusion
from fedlora.optimizers import averaged
from fedlora.privacy import cohorts
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms.central import CLIP_NORM, Central
from fedlora.rounds import checkpoint
from fedlora.rounds.checkpoint import Checkpoint, Merges
from fedlora.rounds.choice import Choice
from fedlora.rounds.diagnostics import Diagnostics
from fedlora.rounds.folder import TEST, write_json
from fedlora.rounds.known_noise import KnownNoise
from fedlora.rounds.lines import Counts, added, client_line, first_error, means, round_line
from fedlora.rounds.pace import Pace
from fedlora.rounds.progress import Line, Progress, Stopwatch
from fedlora.rounds.server import ServerOptimizer
from fedlora.rounds.shrink import Shrinker
from fedlora.rounds.turning import Turning
from fedlora.scenario import Scenario
from fedlora.schedules.contract import redrawn
from fedlora.seeding import generator
from fedlora.strategy import Strategy

JUDGED = 100  # clients whose own models are evaluated, at most
FEW = 10  # clients whose own models meet the test set in every evaluated round; those of more at the end alone

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Loop:
    """Everything that a round touches."""

    scenario: Scenario
    strategy: Strategy
    engine: Engine
    data: Dataset
    budget: Budget
    ledger: Ledger
    merges: Merges
    central: Central | None
    folder: Path
    on_round: Callable[[Line], None]
    server: ServerOptimizer | None = None  # the stage after the aggregate, where that is a mean
    turning: Turning | None = None  # by a schedule of the adapter itself
    noise: KnownNoise | None = None  # in that mean, where somebody asks for it
    shrinker: Shrinker | None = None  # by that noise, before the server steps
    diagnostics: Diagnostics | None = None
    choice: Choice | None = None  # of the best round, where somebody asks for it
    origin: Mapping[str, Any] = field(default_factory=dict)  # the scenario and the versions, for checkpoints
    stop: Callable[[], bool] = lambda: False
    _beside: Callable[[], Line] | None = None  # gives the figures of `Progress.unjudged`
    _names: set[str] = field(default_factory=set)  # of all figures that evaluations gave
    _own: dict[int, Line] = field(default_factory=dict)  # those that clients tell of themselves, by client

    def run(self, now: Progress) -> Progress:
        """Rounds until the last, or until nobody may go on.

        Raises:
            RoundError: too few clients of a round replied, in every attempt at it.
            KeyboardInterrupt: `stop` said so; `now` holds what was finished.
        """
        try:
            self._rounds(now)
        except (RoundError, KeyboardInterrupt):
            self._judge(now)
            raise
        self._judge(now)
        return now

    def _rounds(self, now: Progress) -> None:
        for round in range(now.round + 1, self.scenario.rounds + 1):
            if self.stop():
                raise KeyboardInterrupt
            if self.choice is not None and self.choice.ends(now):
                break
            watch = Stopwatch()
            instruction = self._instruct(round, now.adapter, now.layers)
            drawn = self._redrawn(instruction.draw)
            self.strategy.initial = {**self.strategy.initial, **drawn}
            kept = {n: t for n, t in {**now.adapter, **drawn}.items() if n not in instruction.adapter}
            instruction = replace(instruction, frozen=fingerprint(kept))
            instruction = self._bounded(instruction, now)
            if self.scenario.clients.averages_state:
                instruction = replace(instruction, moments=averaged.rows(now.moments, instruction.send))
            watch.lap("account")
            if (gathered := self._gather(instruction, now)) is None:
                now.last["stopped"] = f"after round {round - 1}: another would pass every client's epsilon"
                break
            replies, noted = gathered
            watch.lap("train")
            self._judge(now)
            watch.lap("evaluate")
            self._catch_up(replies, now)
            before = {name: now.adapter[name] for name in self.strategy.held}
            updates = self._released(instruction, replies, now)
            if self.turning is not None:
                updates = self.turning.meant(round, before, updates)
            made = self.strategy.aggregated(before, updates)
            mean = after = {**before, **made.adapter}
            self._check(before, mean, made.base)  # nothing that is not finite gets into what follows
            noise = self.noise.of(instruction, updates, replies.reports) if self.noise else {}
            moved = made.adapter
            if self.shrinker is not None:
                moved, noted["singular_values_left"] = self.shrinker.step(before, moved, noise)
            if self.server is not None and not (self.turning and self.turning.schedule.measures(round)):
                moved = self.server.step(round, before, moved)
            if moved is not made.adapter:
                self._check(before, after := {**before, **moved}, {})
            adapter, base = {**now.adapter, **after}, made.base
            if len(instruction.moments):
                now.moments |= averaged.mean(instruction.send, replies.updates)
            if self.turning is not None:
                adapter, base = self.turning.turned(round, adapter, now, self.server)
                self._check(now.adapter, adapter, base)
            if base:
                self.engine.merge(self.merges.append(base))
            watch.lap("aggregate")
            figures = self._figures(round, adapter)
            watch.lap("evaluate")
            if not self._summed:
                told = self.strategy.diagnose(before, updates, mean, made.base)
                figures |= returned.figures(returned.who(self.strategy, "diagnose"), told)
            if self.diagnostics is not None:
                figures |= self.diagnostics.of(before, mean, adapter, noise, self.merges.total())
                if not self._summed:
                    figures |= self.diagnostics.alike({**now.adapter, **drawn, **before}, updates)
            watch.lap("diagnose")
            self._record(round, adapter, replies, figures | noted, now, watch)

    def _instruct(
        self, round: int, adapter: Adapter, layers: list[str] | None = None, after: bool = False
    ) -> Instruction:
        """What clients receive of the adapter before a round, or after it to be judged."""
        told = self.strategy.instruct(round, adapter, self.scenario.ranks(round))
        return told if self.turning is None else self.turning.asked(told, layers, after)

    def _redrawn(self, draw: int) -> Adapter:
        """The frozen parts that clients begin a round from, where these are not of the first draw."""
        if not draw:
            return {}
        shapes = self.engine.description.weights
        return redrawn(self.strategy.kind, self.strategy.layout, self.scenario.seed, shapes, draw)

    def _gather(self, instruction: Instruction, now: Progress) -> tuple[Replies, Line] | None:
        """The replies of a cohort, or of another while too few reply, and how many rest; None if too many do.

        Raises:
            RoundError: too few replied in the last attempt too.
        """
        if self._pace is not None and not self._pace.in_step:
            may_train = partial(self.budget.allows, instruction)
            return self._pace.arrivals(instruction, now, may_train, self._train_and_spend)
        round, told = instruction.round, self.scenario.clients
        before: list[Report] = []
        why = ""
        for attempt in range(told.retries + 1):
            cohort, resting = self.budget.within(instruction, self._draw(round, attempt, now), attempt)
            if resting and len(cohort) < told.min_replies:
                if attempt == 0:
                    return None
                why += "; too few others have epsilon left"
                break
            replies = self._exchange(instruction, cohort, attempt, now)
            count = sum(len(update.clients) for update in replies.updates)
            nobody = self.central is not None and all(r.late for r in replies.reports)  # then noise is released
            if count >= told.min_replies or len(cohort) < self._least or nobody:
                return replace(replies, reports=added(before, replies.reports)), {"resting": resting}
            few = f"{count} of {len(cohort)} clients replied and {told.min_replies} must"
            none = f"all {len(cohort)} clients failed" if len(cohort) > 1 else "its only client failed"
            why = f"round {round}: {few if count else none}; {first_error(replies)}"
            logger.warning("%s (attempt %d of %d)", why, attempt + 1, told.retries + 1)
            unused = [replace(r, error=r.error or f"was not used: {few}", steps=0) for r in replies.reports]
            before = added(before, unused)
        raise RoundError(why)

    def _exchange(self, instruction: Instruction, cohort: list[int], attempt: int, now: Progress) -> Replies:
        """Send, train, collect and account; then the further trips of the round, if the strategy makes any."""
        alike = len(self.scenario.ranks(instruction.round)) == 1
        sums = (alike and self.strategy.partial_sums) or self._summed
        instruction = self.budget.again(instruction, cohort)
        if self._pace is not None:
            race = self._pace.race(instruction, cohort, now, partial(self._missed, now))
            replies = race.told(self._train(race.instruction, race.used, sums))
        else:
            replies = self._train(instruction, cohort, sums)
        replies = replace(replies, draw=self.budget.spend(instruction, replies, attempt))
        for trip in range(2, self.strategy.trips + 1):
            if not replies.updates:
                break
            made = self.strategy.relay(trip, replies.updates)
            down = returned.tensors(returned.who(self.strategy, "relay"), made)
            there = [c for update in replies.updates for c in update.clients]
            asked = replace(instruction, adapter=down, ranked={}, trip=trip)
            replies = replies.then(self._train(asked, there, sums))
        return replies

    def _train(self, instruction: Instruction, cohort: list[int], sums: bool) -> Replies:
        """What clients made of an instruction, without what may not be used."""
        return self._intake.admit(instruction, cohort, self.engine.train(instruction, cohort, sums))

    def _train_and_spend(self, instruction: Instruction, cohort: list[int], lost: list[Report]) -> Replies:
        """The same where rounds are not in step, with the reports of clients that will not arrive."""
        instruction = self.budget.again(instruction, cohort)
        replies = self._train(instruction, cohort, sums=False)
        replies = Replies(replies.updates, [*replies.reports, *lost])
        self.budget.spend(instruction, replies)
        return replies

    @cached_property
    def _intake(self) -> Intake:
        return Intake(self.scenario, self.strategy, self.data.num_examples)

    @cached_property
    def _pace(self) -> Pace | None:
        """The virtual clock of a simulated world; None without one."""
        if self.scenario.world is None:
            return None
        return Pace(
            scenario=self.scenario,
            strategy=self.strategy,
            data=self.data,
            intake=self._intake,
            spends=self.budget.event,
        )

    def _catch_up(self, replies: Replies, now: Progress) -> None:
        """Count what each client was sent to bring its base to the run's: the merges since it last took part."""
        if not self.merges:
            return
        for i, report in enumerate(replies.reports):
            if report.late:  # counted by its world; it may not have them, and is sent them again
                continue
            missed = self._missed(now, report.client)
            replies.reports[i] = replace(report, bytes_down=report.bytes_down + missed)
            now.merges_seen[str(report.client)] = len(self.merges)

    def _missed(self, now: Progress, client: int) -> int:
        """Bytes of the merges since a client last took part."""
        return self.merges.bytes_since(now.merges_seen.get(str(client), 0)) if self.merges else 0

    def _figures(self, round: int, adapter: Adapter) -> Line:
        """Loss and metrics after a round, and those of clients' own models where they hold examples out."""
        metric, self._own = self.engine.description.metric, {}
        if round % self.scenario.eval_every and round != self.scenario.rounds:
            return {"loss": None, metric: None}
        judges = self.scenario.data.client_test_share is not None
        waits = self.scenario.stop is not None  # whether there is a next round depends on the figures
        if round < self.scenario.rounds and not (self.strategy.personal or judges or waits):
            if (beside := self.engine.beside(adapter)) is not None:
                self._beside = beside
                return {"loss": None, metric: None}
        figures: Line = {} if self.strategy.personal else self._seen(self.engine.evaluate(adapter))
        if self.strategy.tested:
            last = round == self.scenario.rounds or self.scenario.clients.total <= FEW
            figures = self.tested(round, adapter) if last else {"loss": None, metric: None}
        if judges:
            told = self._instruct(round, adapter, after=True)
            each = self.engine.judge(told, self._judged)
            local = means([*each.values()]) or {"loss": None, metric: None}
            figures |= {f"local_{key}": value for key, value in local.items()}
            if (asked := self.scenario.privacy) is None or asked.share_metrics:
                self._own = {c: {f"local_{key}": v for key, v in own.items()} for c, own in each.items()}
            if self.strategy.personal and not self.strategy.tested:
                figures |= self._seen(local)
        return figures

    def _seen(self, figures: Line) -> Line:
        """The figures of an evaluation; a line says so where a metric is none for the first time."""
        asked = {use.rpartition(":")[2] for use in self.scenario.metrics} - self._names
        for name in sorted(name for name in asked if name in figures and figures[name] is None):
            logger.warning("%s is null: it says nothing of these rows, as where all have one label", name)
        self._names |= set(figures)
        return dict(figures)

    def evaluated(self, now: Progress) -> Line:
        """The figures of the adapter at hand, with `test.json` written."""
        return self._without_confusion(self._seen(self.engine.evaluate(now.adapter)), now)

    def _without_confusion(self, line: Line, now: Progress) -> Line:
        """The line, with the confusion in it in `test.json` instead, if it is of the round that may be kept."""
        counts = line.pop(confusion.CONFUSION, None)
        kept = now.best.round if self.choice and self.choice.keeps and now.best else now.round
        if counts is not None and kept == now.round:
            write_json(self.folder / TEST, confusion.told(now.round, self.data.labels, counts))
        return line

    def tested(self, round: int, adapter: Adapter) -> Line:
        """Means over clients' own models on the test set after a round, and the metric's least and most."""
        told, metric = self._instruct(round, adapter, after=True), self.engine.description.metric
        found = [*self.engine.judge(told, self._judged, test=True).values()]
        each = [figures[metric] for figures in found]
        least, most = (None, None) if None in each or not each else (min(each), max(each))
        ends = {f"{metric}_least": least, f"{metric}_most": most}
        return {"loss": None, metric: None} | self._seen(means(found)) | ends

    @property
    def _judged(self) -> list[int]:
        """The clients whose own models are judged: all, or the same hundred each time."""
        total = self.scenario.clients.total
        if total <= JUDGED:
            return list(range(total))
        chosen = generator(self.scenario.seed, "judged").choice(total, size=JUDGED, replace=False)
        return [int(c) for c in np.sort(chosen)]

    @property
    def _least(self) -> int:
        """The clients of a cohort that something can come of; a Poisson cohort may be smaller."""
        return cohorts.LEAST if self.central is not None and self.scenario.secure_aggregation is not None else 1

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
        return replace(instruction, config={**instruction.config, **self.central.words(now.clip_norm)})

    def _released(self, instruction: Instruction, replies: Replies, now: Progress) -> list[Update]:
        """What the strategy may see: the updates, or where clients are protected whole their noised mean."""
        if self.central is None:
            return replies.updates
        received = {name: instruction.adapter[name] for name in instruction.send}
        bound = instruction.config[CLIP_NORM]
        released, now.clip_norm = self.central.release(
            instruction.round, received, replies.updates, bound, carried=replies.carried, draw=replies.draw
        )
        return [released]

    def _draw(self, round: int, attempt: int, now: Progress) -> list[int]:
        """The cohort, ascending: from the seed, the round and the attempt alone, and in a world from the clock."""
        if self.central is not None:
            cohort = self.central.cohort(round)
            return cohort if self._pace is None else self._pace.present(cohort, now)
        if self._pace is not None:
            return self._pace.draw(now, round, attempt)
        told = self.scenario.clients
        path = (round, "cohort", attempt) if attempt else (round, "cohort")
        chosen = generator(self.scenario.seed, *path).choice(told.total, size=told.cohort_size, replace=False)
        return [int(c) for c in np.sort(chosen)]

    def _check(self, before: Mapping[str, Any], after: Mapping[str, Any], merge: Change) -> None:
        returned.check(type(self.strategy).__name__, before, after, merge, self.merges.shapes)

    def _record(
        self, round: int, adapter: Adapter, replies: Replies, figures: Line, now: Progress, watch: Stopwatch
    ) -> None:
        """Count, write the lines of the round, save."""
        privacy, whole, reports = self.scenario.example_privacy, self.scenario.client_privacy, replies.reports
        spent = {r.client: self.budget.spent(r.client, privacy) for r in reports} if privacy else {}
        told = Counts.of(reports)
        now.round, now.adapter, now.merges = round, adapter, len(self.merges)
        now.failures, now.trained = now.failures + told.failed, now.trained + told.trained
        now.bytes_up, now.bytes_down = now.bytes_up + told.bytes_up, now.bytes_down + told.bytes_down
        now.bytes_down += self.engine.greeted()
        now.bytes_up_head += told.trained * self._head_bytes(round)
        watch.lap("account")
        now.seconds += sum(watch.phases.values())
        now.last["epsilon"] = max([now.last.get("epsilon") or 0.0, *spent.values()]) if privacy else None
        if whole is not None:
            now.last["epsilon"] = self.budget.spent(None, whole)
        elapsed = now.virtual_seconds if self._pace else None
        line = round_line(round, told, figures, now.last["epsilon"], elapsed, watch.phases)
        lines = [client_line(round, r, spent.get(r.client)) | self._own.pop(r.client, {}) for r in reports]
        if named := self.data.names:
            lines = [{**told, "name": named[told["client"]]} for told in lines]
        lines += ({"round": round, "client": client, **own} for client, own in self._own.items())
        self.ledger.clients(lines)
        if self._beside is None:
            self._measure(line, now)
        else:
            now.unjudged = line
        checkpoint.save(
            self.folder / "checkpoint",
            Checkpoint(
                round=round,
                adapter=now.adapter,
                strategy={
                    **returned.mapping(returned.who(self.strategy, "state"), self.strategy.state(), "values"),
                    **(self.server.state() if self.server else {}),
                },
                words=now.words(),
                under_way=now.tensors(),
                best=now.best.adapter if now.best else {},
                moments=now.moments,
                origin={**self.origin, "ledger": self.ledger.position},
            ),
        )
        if now.unjudged is None:
            self.on_round(line)

    def _judge(self, now: Progress) -> None:
        """Write the line of a round that was evaluated beside the next, or was to be but for an interruption."""
        if (line := now.unjudged) is None:
            return
        line |= self._seen(self.engine.evaluate(now.adapter) if self._beside is None else self._beside())
        self._beside = now.unjudged = None
        self._measure(line, now)
        self.on_round(line)

    def _measure(self, line: Line, now: Progress) -> None:
        """Write the line of a round, and remember what was measured."""
        if line["loss"] is not None:
            metric = self.engine.description.metric
            names = self._names | {"loss", metric, f"{metric}_least", f"{metric}_most"}
            names -= {confusion.CONFUSION}
            now.last.update({key: value for key, value in line.items() if key in names})
            if self.choice is not None:
                self.choice.see(line, now)
            self._without_confusion(line, now)
        self.ledger.metrics(line)

    def _head_bytes(self, round: int) -> int:
        layout = self.strategy.layout
        sent = set(self.strategy.trains(round, layout)) & set(self.strategy.sends(round, layout))
        heads = sorted(n for n in sent if layout[n].role == "head" and layout[n].trainable)
        return traffic.tensor_bytes(heads, layout, Transport(self.scenario, self.strategy).up)
