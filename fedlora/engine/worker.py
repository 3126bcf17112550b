"""The worker: the resident process that holds the base model and serves clients one after another."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import client as clients
from fedlora import starting, suitability, traffic
from fedlora import strategy as strategies
from fedlora.adapter import Adapter, Change, Instruction, Sum, Update, fingerprint
from fedlora.client import Setter
from fedlora.data.store import Dataset, Partition
from fedlora.engine import hardware
from fedlora.engine.base import Figures
from fedlora.engine.beyond import more
from fedlora.engine.digests import ALONE, Digests, Sharing, together
from fedlora.engine.intake import Intake, check_tensors
from fedlora.engine.replies import Deed, Replies, Report
from fedlora.engine.representations import NUCLEAR
from fedlora.engine.setup import Description, Half, Setup
from fedlora.engine.transport import Transport
from fedlora.errors import ContractError, Refusal
from fedlora.metrics import confusion
from fedlora.metrics import contract as metrics
from fedlora.metrics.contract import Evaluation
from fedlora.optimizers import averaged
from fedlora.passes import alone
from fedlora.passes.fused import Fused
from fedlora.passes.kept import Kept, Piece, pays
from fedlora.privacy import replay
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import central
from fedlora.privacy.mechanisms.bands import Past
from fedlora.privacy.noise import fresh_key
from fedlora.rounds.checkpoint import Personal
from fedlora.scenario import Scenario


class Worker:
    """Builds the task once, then trains, evaluates and exports on demand.

    Attributes:
        pay: called with the round, the client and the event right before private training begins, whatever asked
            for it; it may raise a `Refusal`, and then nothing is trained. It gives the steps alike that were paid
            for before. None: the round loop pays, before it uses what it got.
    """

    pay: Callable[[int, int, Event], int] | None = None

    def __init__(self, setup: Setup) -> None:
        hardware.settle()
        import torch

        from fedlora.tasks import loading, weights

        torch.set_num_threads(setup.threads)
        device = hardware.device(setup.device)
        self.setup = setup = replace(setup, device=device, precision=hardware.precision(setup.precision, device))
        self.scenario = Scenario.model_validate(setup.scenario)
        self.dataset = Dataset.open(setup.dataset, setup.partitions)
        model = self.scenario.model
        self.client = clients.load(self.scenario.clients.use, self.scenario.clients.options)
        strategy = strategies.load(self.scenario.strategy.use, self.scenario.strategy.options)
        start = starting.read(self.scenario, self.dataset.labels) if device != "meta" else None
        with hardware.on_gpu("a worker"):
            self.task = loading.load(
                self.scenario.task,
                str(setup.base or model.base),
                suitability.kind_of(strategy, self.scenario),
                labels=self.dataset.labels,
                seed=self.scenario.seed,
                head=model.head,
                pooler=model.pooler,
                pooling=model.pooling,
                revision=None if setup.base else model.revision,
                quantize=model.quantize,
                device=setup.device,
                max_length=self.scenario.data.max_length,
                private=self.client.private,
                precision="bf16" if setup.precision == "bf16" else "fp32",
                start=start.saved if start is not None else None,
                scale=(score.low, score.high) if (score := self.scenario.data.score) is not None else None,
                beta=asked.beta if (asked := self.scenario.preference) is not None else None,
                checkpointing=model.checkpointing,
            )
        loading.check(self.task, self.scenario, self.dataset)
        weights.weigh(self.task, self.scenario, self.dataset.labels)
        self.kept: Kept | None = None
        if self.task.prefix is not None and pays(self.scenario, self.dataset):
            self.kept = Kept(self.task, self.dataset, setup.kept, setup.threads)
            self.task.prefix.kept = self.kept.of
        self.fused = Fused(self.task) if self.scenario.engine.fused > 1 else None
        self.settings = Setter(self.scenario, setup.noise, setup.bands)
        self.metrics = metrics.find_all(self.scenario.metrics, self.task.target)
        self.serve(strategy, setup.personal)

    def serve(self, strategy: strategies.Strategy, personal: Path | None) -> None:
        """Be a worker of a strategy, at the start of a run.

        Args:
            strategy: for the kind of adapter that was built.
            personal: folder of what stays with each client; None where nothing does.
        """
        strategy.bind(self.task.layout, self.task.kind, self.task.initial, self.client.private)
        self.strategy, self.merged = strategy, 0
        # Noise is drawn again where a round is: in a simulation, not in a rehearsal without weights.
        repeats = not self.setup.secret and self.setup.device != "meta"
        self.digests = Digests(self.task, self.client, strategy, self.setup, self.scenario) if repeats else None
        self.past = Past(None if self.setup.secret else self.scenario.seed)
        self.intake = Intake(self.scenario, strategy, self.dataset.num_examples)
        self.personal = Personal(personal) if personal else None
        self.transport = Transport(self.scenario, strategy, Personal(personal / "left_out") if personal else None)
        self._fingerprints: dict[tuple[frozenset[str], int], str] = {}  # of the last that were asked for
        keeps = personal if self.scenario.clients.keeps_state else None
        self.optimizers = Personal(keeps / "optimizer") if keeps else None

    def describe(self) -> Description:
        """What was built."""
        return Description(
            layout=self.task.layout,
            initial=self.task.initial,
            metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            test_examples=len(self.dataset.test),
            validation_examples=len(self.dataset.validation),
            kind=self.task.kind,
            weights=self.task.weights,
            fingerprint=fingerprint(self.task.initial),
            device=self.setup.device,
            precision=self.setup.precision,
            wanted=self.kept.wanted if self.kept is not None else None,
        )

    def fill(self, to: Path, piece: Piece) -> None:
        """Pass some examples through the layers below all factors, into the arrays of a folder."""
        assert self.kept is not None
        self.task.begin(self.task.initial, ())
        self.kept.fill(to, piece)

    def base_fingerprint(self) -> str:
        """Of the base model's own weights, before any merge."""
        return self.task.base_fingerprint()

    def pid(self) -> int:
        """The process that this worker is."""
        return os.getpid()

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run clients in their order; one that raises is a report with an error, never silence."""
        ranks = [self.scenario.rank(client, instruction.round) for client in cohort]
        asked = {rank: instruction.at(rank) for rank in set(ranks)}
        received = {rank: self.transport.received(asked[rank], rank) for rank in asked}
        down = {rank: self._bytes_down(asked[rank]) for rank in asked}
        total, updates, reports = Sum(), [], []
        for rank, (update, report) in zip(ranks, self._fits(cohort, ranks, received, down), strict=True):
            if update is not None and self.transport.used:
                try:
                    update = self.transport.arrived(self.transport.passed(update, asked[rank]), asked[rank])
                    update = self.intake.check(update, asked[rank])
                except ContractError as error:
                    update = None
                    report = replace(report, steps=0, error=f"{type(error).__name__}: {error}", metrics={})
            reports.append(report)
            if update is None:
                continue
            if partial_sums:
                total.add(update)
            else:
                updates.append(update)
        return Replies(total.updates() if partial_sums else updates, reports)

    def _fits(
        self,
        cohort: Sequence[int],
        ranks: Sequence[int],
        received: Mapping[int, Instruction],
        down: Mapping[int, int],
    ) -> Iterator[tuple[Update | None, Report]]:
        """What becomes of each client, in their order.

        Of as many in a row as `engine.fused` says those of one rank share their passes, whoever fails beside them:
        who shares with whom depends on the cohort alone.
        """
        if self.fused is None:
            for client, rank in zip(cohort, ranks, strict=True):
                yield self._alone(received[rank], client, rank, down[rank])
            return
        size = self.scenario.engine.fused
        for start in range(0, len(cohort), size):
            group = range(start, min(start + size, len(cohort)))
            made: dict[int, tuple[Update | None, Report]] = {}
            for rank in {ranks[i] for i in group}:
                mine = [i for i in group if ranks[i] == rank]
                sharing = together(self, received[rank], [cohort[i] for i in mine])
                fits = [self._fit(received[rank], cohort[i], rank, down[rank], sharing) for i in mine]
                made |= zip(mine, self.fused.run(rank, fits), strict=True)
            yield from (made[i] for i in group)

    def _bytes_down(self, instruction: Instruction) -> int:
        return traffic.instruction_bytes(instruction, self.task.layout, self.transport.down)

    def fit(self, instruction: Instruction, client: int) -> tuple[Update | None, Report]:
        """Run one client, by an instruction as it received it.

        Returns:
            What it sends, as `Transport.outgoing` has it; None where it failed. And what became of it.
        """
        rank = self.scenario.rank(client, instruction.round)
        return self._alone(instruction, client, rank, self._bytes_down(instruction))

    def _alone(self, *told: Any) -> tuple[Update | None, Report]:
        """`_fit` of a client that asks for no passes: it makes them itself."""
        try:
            next(self._fit(*told))
        except StopIteration as end:
            made: tuple[Update | None, Report] = end.value
            return made
        raise AssertionError("a client alone asks for no passes")

    def _fit(
        self, instruction: Instruction, client: int, rank: int, down: int, sharing: Sharing = ALONE
    ) -> clients.Passes[tuple[Update | None, Report]]:
        """Run one client.

        Args:
            instruction: as the client received it.
            client: its id.
            rank: its rank.
            down: bytes of the instruction.
            sharing: those that share passes, which then are asked for.

        Raises:
            Refusal: it may not train.
        """
        began = time.perf_counter()
        partition = self.dataset.partition(client)
        deed = Deed()

        def report(began: float, **more: Any) -> Report:
            return Report(
                client=client,
                num_examples=len(partition),
                bytes_down=down,
                seconds=(time.perf_counter() - began) / max(sharing.clients, 1),
                event=deed.event,
                digest=deed.digest,
                draw=deed.draw,
                **more,
            )

        try:
            update = yield from self._answer(instruction, partition, rank, sharing, deed)
            if update.clients != (client,):
                raise ContractError(f"client {client} speaks for clients {update.clients}")
            update = self.intake.check(update, instruction)
            if (bound := instruction.config.get(central.CLIP_NORM)) is not None:
                assert self.scenario.privacy is not None
                shares = self.scenario.privacy.share_metrics
                update = central.clip(update, instruction.adapter, bound, shares)
            update = self.transport.outgoing(update, instruction)
        except Refusal:
            raise
        except (
            Exception
        ) as error:  # a client is anybody's code, and may have trained: what it meant to spend counts
            return None, report(began, steps=0, bytes_up=0, error=hardware.reason(error))
        return update, report(
            began,
            steps=deed.steps,
            bytes_up=traffic.update_bytes(update, deed.event, self.transport.up),
            metrics={k: v for k, v in update.metrics.items() if k != central.WITHIN},
        )

    def _answer(
        self,
        instruction: Instruction,
        partition: Partition,
        rank: int,
        sharing: Sharing,
        deed: Deed,
    ) -> clients.Passes[Update]:
        """What a client sends in a trip: it trains in the first, and answers from what it kept in the others."""
        client, round, strategy = partition.client, instruction.round, self.strategy
        kind, layout = self.task.kind, self.task.layout
        if not 1 <= instruction.trip <= strategy.trips:
            raise ContractError(f"a round of this strategy has {strategy.trips} trips, and no {instruction.trip}")
        if instruction.trip > 1:
            assert self.personal is not None
            trained, weight = self.personal.load_trip(client, round)
            return Update(
                adapter=strategy.reply(instruction, trained),
                weight=weight,
                clients=(client,),
                scaling=kind.scaling(rank),
            )
        plain = type(strategy).reply is strategies.Strategy.reply
        settings = self.settings(instruction, partition.units, client)
        averages = self.scenario.clients.averages_state and len(instruction.moments) > 0
        if self.optimizers is not None:
            settings = replace(settings, state=self.optimizers.load(client, before=round))
        elif averages:
            settings = replace(settings, state=dict(zip(instruction.send, instruction.moments, strict=True)))
        wanted = tuple(sorted({*settings.send, *instruction.keep} if plain else layout))
        update = yield from self._train(instruction, partition, settings, wanted, rank, sharing, deed)
        clients.check_returned(self.client, update)
        clients.check_kept(self.client)
        if self.optimizers is not None:
            self.optimizers.save(client, round, update.state)
        if averages and not update.state.keys() >= set(instruction.send):
            raise ContractError(f"{type(self.client).__name__} gives no state back, as `Steps.kept` has it")
        moments = averaged.rows(update.state, instruction.send if averages else ())
        update = replace(update, state={}, moments=moments)
        if plain and not instruction.keep:  # all of it is sent, and checked when it comes in
            return replace(update, scaling=kind.scaling(rank))
        check_tensors(update.adapter, {n: kind.shape(layout[n], rank) for n in wanted})  # before it is kept
        if instruction.keep and self.personal is not None:
            kept = {name: update.adapter[name] for name in instruction.keep}
            self.personal.save(client, round, {**self.personal.load(client, before=round), **kept})
        if strategy.trips > 1 and self.personal is not None:
            self.personal.save_trip(client, round, update.adapter, update.weight)
        return replace(update, adapter=strategy.reply(instruction, update.adapter), scaling=kind.scaling(rank))

    def _train(
        self,
        instruction: Instruction,
        partition: Partition,
        settings: clients.Settings,
        wanted: tuple[str, ...],
        rank: int,
        sharing: Sharing,
        deed: Deed,
    ) -> clients.Passes[Update]:
        """Pay, and train: the one place where a client's training begins, whatever asked for it.

        Args:
            instruction: as the client received it.
            partition: its examples.
            settings: of this round, whose event is paid for.
            wanted: the tensors that its update is to have.
            rank: its rank.
            sharing: those that share its passes.
            deed: is told what the training costs, and which draw of its noise it takes.

        Raises:
            Refusal: the one who pays does not allow it.
            RoundError: it would need another draw, and no epsilon is left for that.
        """
        client, received = partition.client, self.received(instruction, partition.client, instruction.round)
        self.task.become(rank, instruction.draw)
        self._agree(instruction)
        event = clients.spends(self.client, partition.units, settings)
        if event is not None and self.setup.secret:  # the tensors are somebody else's
            if unfit := alone.mingle(self.task, received):
                raise Refusal(f"with the tensors that came, examples would not be bounded one by one: {unfit}")
        first = 0
        if event is not None and self.pay is not None:
            first = self.pay(settings.round, client, event)
        deed.event, deed.steps = event, settings.local_steps
        if event is not None and self.digests is not None:
            deed.digest = self.digests.of(instruction, received, partition, settings, (rank, sharing))
            drawn = instruction.drawn.get(client, replay.Drawn())
            if not drawn.may(deed.digest):
                deed.event = None  # it will not train
            deed.draw = drawn.draw(deed.digest)
            first = drawn.first(deed.draw) if event.bands > 1 else 0
        root = fresh_key() if self.setup.secret else self.scenario.seed
        rng = clients.Rng(root, settings.round, client, deed.draw, first, self.past)
        told = (self.task, received, partition, replace(settings, send=wanted), rng)
        if sharing.clients and isinstance(self.client, clients.Stepwise):
            return (yield from self.client.passes(*told))
        return self.client.fit(*told)

    def received(self, instruction: Instruction, client: int, before: int) -> Adapter:
        """The tensors that a client has before a round: those sent, and those that it kept."""
        if instruction.keep and self.personal is not None:
            return {**instruction.adapter, **self.personal.load(client, before)}
        return instruction.adapter

    def _agree(self, instruction: Instruction) -> None:
        """Make sure that the tensors that did not travel are what the server has.

        Raises:
            ContractError: they are not; an average over different A would mean nothing.
        """
        sent = (frozenset(instruction.adapter), instruction.draw)
        if sent not in self._fingerprints:
            kept = {n: t for n, t in self.task.drawn(instruction.draw).items() if n not in instruction.adapter}
            self._fingerprints = {sent: fingerprint(kept)}
        if instruction.frozen not in ("", self._fingerprints[sent]):
            raise ContractError("the tensors that stay frozen are not the server's: another seed, base or torch")

    @hardware.on_gpu("the test set")
    def evaluate(self, adapter: Adapter, half: Half, start: int, stop: int) -> Evaluation:
        """Examples `start` to `stop` of those that report, or of those that choose; by row where metrics ask."""
        self.task.become()
        rows, examples = np.arange(start, stop), getattr(self.dataset, half)
        rowwise = bool(self.metrics) or (half == "test" and confusion.tells(self.task.target, self.dataset.labels))
        found = self.task.evaluation(adapter, examples, rows, rowwise)
        return replace(found, sums={**found.sums, **more(self.scenario, self.task, half, examples, rows)})

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """Figures of each client's own model on the examples that it holds out, or on those of the test set.

        Args:
            instruction: with the tensors that the server holds after a round, for every rank.
            cohort: client ids.
            test: judge by the test set.
        """
        found, rows = {}, Partition(-1, self.dataset.test, np.arange(len(self.dataset.test)))
        for client in cohort:
            rank = self.scenario.rank(client, instruction.round)
            adapter = self.received(instruction.at(rank), client, instruction.round + 1)
            self.task.become(rank, instruction.draw)
            held = rows if test else self.dataset.held_out(client)
            made = self.task.evaluation(adapter, held.examples, held.rows, bool(self.metrics))
            told = self.task.figures(made.sums)
            found[client] = made.figures(told, self.metrics, self.dataset.labels)
        return found

    def merge(self, change: Change) -> None:
        """Fold the next of the run's merges into the base."""
        if self.digests is not None and self.client.private:
            self.digests.merged(change)
        self.task.merge(change)
        self.merged += 1

    def figures(self, found: Mapping[Half, Evaluation]) -> dict[Half, Figures]:
        """Loss and metrics of the rows that report and of those that choose; of the first also their confusion."""
        labels, sums = self.dataset.labels, self.task.by_half({half: these.sums for half, these in found.items()})
        told: dict[Half, Figures] = {
            half: these.figures(sums[half], self.metrics, labels) for half, these in found.items()
        }
        if found["test"].outputs is not None and confusion.tells(self.task.target, labels):
            told["test"][confusion.CONFUSION] = confusion.confusion(found["test"], len(labels))
        if (norm := found["test"].sums.get(NUCLEAR)) is not None:
            told["test"][NUCLEAR] = norm
        return told

    def export(self, adapter: Adapter, folder: Path, merged: Change | None) -> None:
        """As `Task.export`."""
        self.task.export(adapter, folder, merged)
