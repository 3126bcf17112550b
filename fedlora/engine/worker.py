"""The worker: the resident process that holds the base model and serves clients one after another."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import adapter as adapters
from fedlora import client as clients
from fedlora import factors, wire
from fedlora import strategy as strategies
from fedlora.adapter import PREFIX, Adapter, Change, Instruction, Kind, Layout, Sum, Update, fingerprint
from fedlora.data.store import Dataset, Examples, Partition
from fedlora.engine import hardware
from fedlora.engine.intake import Intake, Replies, Report, check_tensors
from fedlora.engine.transport import Transport
from fedlora.errors import ContractError, Refusal
from fedlora.passes.fused import Fused
from fedlora.privacy import central, replay
from fedlora.privacy.accounting import Event
from fedlora.privacy.noise import fresh_key
from fedlora.rounds.checkpoint import Personal
from fedlora.scenario import Scenario

KNOWN = 10_000  # clients whose examples' digests a worker keeps


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker needs to know, as plain data that can be sent to it.

    Attributes:
        scenario: resolved, as `Scenario.model_dump` gives it.
        dataset: folder of the tokenised examples.
        partitions: folder of the partition.
        threads: of torch.
        precision: `fp32`, `bf16`, or `auto`: as the worker finds its device.
        device: a torch device, or `auto`: a GPU where there is one.
        noise: the calibrated noise multiplier for each number of examples; None without privacy.
        personal: folder of what stays with each client; None where nothing does.
        secret: whether noise is drawn from the operating system and not from the scenario's seed.
    """

    scenario: Mapping[str, Any]
    dataset: Path
    partitions: Path
    threads: int = 1
    precision: str = "fp32"
    device: str = "cpu"
    noise: Mapping[int, float] | None = None
    personal: Path | None = None
    secret: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a worker found when it built its model."""

    layout: Layout
    initial: Adapter
    metric: str
    higher_is_better: bool
    test_examples: int
    kind: Kind
    weights: Mapping[str, tuple[int, ...]]  # the shape of each layer with factors, (out, in)
    fingerprint: str  # of the first adapter, bit for bit: workers that differ must not serve one run
    device: str  # that it is on: `cpu` or `cuda`
    precision: str  # of training


@dataclass
class Deed:
    """What a client's training costs, once it has begun; all at rest where it has not.

    Attributes:
        event: that it was or will be paid for.
        steps: that it takes.
        digest: of all that makes its update (`fedlora.privacy.replay`).
        draw: which draw of its noise it takes.
    """

    event: Event | None = None
    steps: int = 0
    digest: str = ""
    draw: int = 0


class Setter:
    """The settings of a client in a round, from the scenario, the instruction and the calibrated noise."""

    def __init__(self, scenario: Scenario, noise: Mapping[int, float] | None) -> None:
        self.scenario, self.noise = scenario, noise

    def __call__(self, instruction: Instruction, num_examples: int, client: int | None = None) -> clients.Settings:
        """The settings of a client that holds `num_examples`; which one matters where some take fewer steps."""
        told, privacy = self.scenario.clients, self.scenario.example_privacy
        first, pace = told.pace(instruction.round, self.scenario.rounds)
        lrs = {role: first * lr for role, lr in told.rates.items()}
        return clients.Settings(
            round=instruction.round,
            train=instruction.train,
            send=instruction.send,
            local_steps=told.local_steps if client is None else instruction.steps.get(client, told.local_steps),
            batch_size=told.batch_size,
            lr=max(lrs.values()) if isinstance(told.lr, dict) else first * told.lr,
            micro_batch_size=told.micro_batch_size,
            noise_multiplier=None if self.noise is None else self.noise[num_examples],
            clip_norm=privacy.clip_norm if privacy else None,
            share_metrics=privacy.share_metrics if privacy else True,
            lrs=lrs,
            pace=pace,
            optimizer={} if told.optimizer is None else told.optimizer.model_dump(),
            config=instruction.config,
        )


class Worker:
    """Builds the task once, then trains, evaluates and exports on demand.

    Attributes:
        pay: called with the round, the client and the event right before private training begins, whatever asked
            for it; it may raise a `Refusal`, and then nothing is trained. None: the round loop pays, before it
            uses what it got.
    """

    pay: Callable[[int, int, Event], None] | None = None

    def __init__(self, setup: Setup) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")  # rows have a length of their own each: at 1,024, gigabytes in time
        import torch

        from fedlora.tasks import contract as task

        torch.set_num_threads(setup.threads)
        _keep_memory()
        device = hardware.device(setup.device)
        self.setup = setup = replace(setup, device=device, precision=hardware.precision(setup.precision, device))
        self.scenario = Scenario.model_validate(setup.scenario)
        self.dataset = Dataset.open(setup.dataset, setup.partitions)
        model, told = self.scenario.model, self.scenario.clients
        self.client = clients.load(told.use, told.options)
        strategy = strategies.load(self.scenario.strategy.use, self.scenario.strategy.options)
        with hardware.on_gpu("a worker"):
            self.task = task.load(
                self.scenario.task,
                model.base,
                kind(self.scenario, strategy),
                labels=self.dataset.labels,
                seed=self.scenario.seed,
                head=model.head,
                pooler=model.pooler,
                revision=model.revision,
                quantize=model.quantize,
                device=setup.device,
                max_length=self.scenario.data.max_length,
                private=self.client.private,
                precision="bf16" if setup.precision == "bf16" else "fp32",
            )
        self.fused = Fused(self.task) if self.scenario.engine.fused > 1 else None
        self.settings = Setter(self.scenario, setup.noise)
        self.serve(strategy, setup.personal)

    def serve(self, strategy: strategies.Strategy, personal: Path | None) -> None:
        """Be a worker of a strategy, at the start of a run.

        Args:
            strategy: for the kind of adapter that was built.
            personal: folder of what stays with each client; None where nothing does.
        """
        strategy.bind(self.task.layout, self.task.kind, self.task.initial, self.client.private)
        self.strategy, self.merged = strategy, 0
        self._based, self._merges = "", ""
        self._seen: dict[int, str] = {}
        self.intake = Intake(self.scenario, strategy, self.dataset.num_examples)
        self.personal = Personal(personal) if personal else None
        self.transport = Transport(self.scenario, strategy, Personal(personal / "left_out") if personal else None)
        self._fingerprints: dict[frozenset[str], str] = {}
        told = self.scenario.clients.optimizer
        keeps = personal is not None and told is not None and told.state == "kept"
        self.optimizers = Personal(personal / "optimizer") if keeps and personal else None

    def describe(self) -> Description:
        """What was built."""
        return Description(
            layout=self.task.layout,
            initial=self.task.initial,
            metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            test_examples=len(self.dataset.test),
            kind=self.task.kind,
            weights=self.task.weights,
            fingerprint=fingerprint(self.task.initial),
            device=self.setup.device,
            precision=self.setup.precision,
        )

    def base_fingerprint(self) -> str:
        """Of the base model's own weights, before any merge."""
        return self.task.base_fingerprint()

    def pid(self) -> int:
        """The process that this worker is."""
        return os.getpid()

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run clients in their order; one that raises is a report with an error, never silence."""
        ranks = [self._rank(client) for client in cohort]
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
                fits = [self._fit(received[rank], cohort[i], rank, down[rank], len(mine)) for i in mine]
                made |= zip(mine, self.fused.run(rank, fits), strict=True)
            yield from (made[i] for i in group)

    def _rank(self, client: int) -> int:
        return self.scenario.clients.rank(client, self.scenario.seed, self.scenario.model.adapter.r)

    def _bytes_down(self, instruction: Instruction) -> int:
        return wire.instruction_bytes(instruction, self.task.layout, self.transport.down)

    def fit(self, instruction: Instruction, client: int) -> tuple[Update | None, Report]:
        """Run one client.

        Args:
            instruction: as the client received it.
            client: its id.

        Returns:
            What it sends, as `Transport.outgoing` has it; None where it failed. And what became of it.
        """
        return self._alone(instruction, client, self._rank(client), self._bytes_down(instruction))

    def _alone(self, *told: Any) -> tuple[Update | None, Report]:
        """`_fit` of a client that asks for no passes: it makes them itself."""
        try:
            next(self._fit(*told))
        except StopIteration as end:
            made: tuple[Update | None, Report] = end.value
            return made
        raise AssertionError("a client alone asks for no passes")

    def _fit(
        self, instruction: Instruction, client: int, rank: int, down: int, sharing: int = 0
    ) -> clients.Passes[tuple[Update | None, Report]]:
        """Run one client.

        Args:
            instruction: as the client received it.
            client: its id.
            rank: its rank.
            down: bytes of the instruction.
            sharing: clients that share passes, which then are asked for; 0: it makes its own.

        Raises:
            Refusal: it may not train.
        """
        began = time.perf_counter()
        partition = self.dataset.partition(client)
        deed = Deed()
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
        except Exception as error:  # a client is anybody's code
            return None, Report(
                client=client,
                num_examples=len(partition),
                steps=0,
                bytes_up=0,
                bytes_down=down,
                seconds=(time.perf_counter() - began) / max(sharing, 1),
                event=deed.event,  # it may have trained: what it meant to spend counts
                digest=deed.digest,
                draw=deed.draw,
                error=hardware.reason(error),
            )
        return update, Report(
            client=client,
            num_examples=len(partition),
            steps=deed.steps,
            bytes_up=wire.update_bytes(update, deed.event, self.transport.up),
            bytes_down=down,
            seconds=(time.perf_counter() - began) / max(sharing, 1),
            event=deed.event,
            digest=deed.digest,
            draw=deed.draw,
            metrics={k: v for k, v in update.metrics.items() if k != central.WITHIN},
        )

    def _answer(
        self,
        instruction: Instruction,
        partition: Partition,
        rank: int,
        sharing: int,
        deed: Deed,
    ) -> clients.Passes[Update]:
        """What a client sends in a trip: it trains in the first, and answers from what it kept in the others.

        Training begins here, and nowhere else; `deed` is told what that costs.
        """
        client, round, strategy = partition.client, instruction.round, self.strategy
        if not 1 <= instruction.trip <= strategy.trips:
            raise ContractError(
                f"a round of this strategy has trips 1 to {strategy.trips}, not {instruction.trip}"
            )
        if instruction.trip > 1:
            assert self.personal is not None
            trained, weight = self.personal.load_trip(client, round)
            return Update(
                adapter=strategy.reply(instruction, trained),
                weight=weight,
                clients=(client,),
                scaling=self.task.kind.scaling(rank),
            )
        received = self._received(instruction, client)
        plain = type(strategy).reply is strategies.Strategy.reply
        settings = self.settings(instruction, len(partition), partition.client)
        if self.optimizers is not None:
            settings = replace(settings, state=self.optimizers.load(client, before=round))
        wanted = tuple(sorted({*settings.send, *instruction.keep} if plain else self.task.layout))
        self.task.become(rank, instruction.draw)
        self._agree(instruction)
        self._begin(deed, instruction, partition, settings, (rank, sharing))
        rng = clients.Rng(fresh_key() if self.setup.secret else self.scenario.seed, round, client, deed.draw)
        passes = settings.local_steps * settings.batch_size
        with self.task.knowing(partition, passes, settings.micro_batch_size):
            told = (self.task, received, partition, replace(settings, send=wanted), rng)
            if sharing and isinstance(self.client, clients.Stepwise):
                update = yield from self.client.passes(*told)
            else:
                update = self.client.fit(*told)
        clients.check_kept(self.client)
        if self.optimizers is not None:
            self.optimizers.save(client, round, update.state)
        if update.state:
            update = replace(update, state={})
        kind, layout = self.task.kind, self.task.layout
        if plain and not instruction.keep:  # all of it is sent, and checked when it comes in
            return replace(update, scaling=kind.scaling(rank))
        check_tensors(
            update.adapter, {name: kind.shape(layout[name], rank) for name in wanted}
        )  # before it is kept
        if instruction.keep and self.personal is not None:
            self.personal.save(client, round, {name: update.adapter[name] for name in instruction.keep})
        if strategy.trips > 1 and self.personal is not None:
            self.personal.save_trip(client, round, update.adapter, update.weight)
        return replace(update, adapter=strategy.reply(instruction, update.adapter), scaling=kind.scaling(rank))

    def _begin(
        self,
        deed: Deed,
        instruction: Instruction,
        partition: Partition,
        settings: clients.Settings,
        how: tuple[int, int],
    ) -> None:
        """Pay for the training that begins now, and find which draw of its noise it takes.

        Raises:
            Refusal: whoever pays does not allow it.
            RoundError: it would need another draw, and no epsilon is left for that.
        """
        event = self.client.spends(len(partition), settings)
        if event is not None and self.setup.secret:  # the tensors are somebody else's
            if unfit := self.task.mingles(self._received(instruction, partition.client)):
                raise Refusal(f"with the tensors that came, examples would not be bounded one by one: {unfit}")
        if event is not None and self.pay is not None:
            self.pay(settings.round, partition.client, event)
        deed.event, deed.steps = event, settings.local_steps
        if event is not None and self._repeats:
            deed.digest = self._digest(instruction, partition, settings, how)
            drawn = instruction.drawn.get(partition.client, replay.Drawn())
            if not drawn.may(deed.digest):
                deed.event = None  # it will not train
            deed.draw = drawn.draw(deed.digest)

    def _received(self, instruction: Instruction, client: int) -> Adapter:
        """The tensors that a client trains from: those sent, and those that it kept."""
        if instruction.keep and self.personal is not None:
            return {**instruction.adapter, **self.personal.load(client, before=instruction.round)}
        return instruction.adapter

    @property
    def _repeats(self) -> bool:
        """Whether noise is drawn again where a round is: in a simulation, not in a rehearsal without weights."""
        return not self.setup.secret and self.setup.device != "meta"

    def _digest(
        self, instruction: Instruction, partition: Partition, settings: clients.Settings, *more: Any
    ) -> str:
        """Of all that makes a client's noised sums, but the noise (`fedlora.privacy.replay`)."""
        received, told = self._received(instruction, partition.client), dataclasses.asdict(settings)
        parts = (self._base(), self._merges, received, instruction.draw, told, self._examples(partition), more)
        return replay.digest(self.scenario.seed, *parts)

    def _base(self) -> str:
        """Of what stays the same for the life of a worker: weights, client, device, versions."""
        if not self._based:
            import torch

            on_gpu = self.setup.device.startswith("cuda")
            chip = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
            machine = (platform.machine(), chip, self.setup.device, self.setup.precision, self.setup.threads)
            own = (replay.code(self.client), self.scenario.clients.options, replay.code(self.strategy))
            parts = (self.base_fingerprint(), replay.versions(), machine, own, self.scenario.engine.fused)
            self._based = replay.digest(self.scenario.seed, *parts)
        return self._based

    def _examples(self, partition: Partition) -> str:
        """Of a client's tokens and targets."""
        if partition.client not in self._seen:
            if len(self._seen) >= KNOWN:
                self._seen.clear()
            examples, rows = partition.examples, partition.rows
            tokens = np.concatenate([examples.row(int(row)) for row in rows])
            types = np.concatenate([examples.types_of(int(row)) for row in rows])
            parts = (tokens, types, examples.lengths(rows), examples.targets[rows], rows)
            self._seen[partition.client] = replay.digest(self.scenario.seed, *parts)
        return self._seen[partition.client]

    @hardware.on_gpu("a step")
    def rehearse(self) -> None:
        """A step on the longest examples, as many at once as there may be, and an evaluation of such."""
        told, ranks = self.scenario.clients, self.scenario.clients.possible_ranks(self.scenario.model.adapter.r)
        at_once = (3 * told.micro_batch_size - 1) // 2  # `Task.micro_batches` gives less than half as many again
        if not self.client.private:
            at_once = min(at_once, told.batch_size)
        longest = _longest(self.dataset.train, at_once)
        rows = np.tile(longest, -(-told.batch_size // len(longest)))
        instruction = self.strategy.instruct(1, dict(self.task.initial), ranks)
        noise = {len(rows): max(self.settings.noise.values())} if self.settings.noise else None
        settings = replace(
            Setter(self.scenario, noise)(instruction, len(rows)),
            local_steps=1,
            batch_size=len(rows),  # every one of them, for a private client too
            micro_batch_size=len(longest),
        )
        partition = Partition(-1, self.dataset.train, rows)  # no client's
        self.task.become(ranks[-1], instruction.draw)
        received, rng = instruction.at(ranks[-1]).adapter, clients.Rng(self.scenario.seed, 0, 0)
        with self.task.knowing(partition, len(rows), len(longest)):
            one = (self.task, received, partition, settings, rng)
            if self.fused is not None and isinstance(self.client, clients.Stepwise):
                self.fused.run(ranks[-1], [self.client.passes(*one) for _ in range(self.scenario.engine.fused)])
            else:
                self.client.fit(*one)
        self.task.become()
        test = self.dataset.test
        width = int(test.lengths(_longest(test, 1))[0])
        self.task.evaluate(self.task.initial, test, _longest(test, self.task.at_once(width)))

    def _agree(self, instruction: Instruction) -> None:
        """Make sure that the tensors that did not travel are what the server has.

        Raises:
            ContractError: they are not; an average over different A would mean nothing.
        """
        sent = frozenset(instruction.adapter)
        if sent not in self._fingerprints:
            kept = {n: t for n, t in self.task.initial.items() if n not in sent}
            self._fingerprints[sent] = fingerprint(kept)
        if instruction.frozen not in ("", self._fingerprints[sent]):
            raise ContractError("the tensors that stay frozen are not the server's: another seed, base or torch")

    @hardware.on_gpu("the test set")
    def evaluate(self, adapter: Adapter, start: int, stop: int) -> dict[str, float]:
        """Sums of the metric over test examples `start` to `stop`."""
        from fedlora.tasks.contract import CausalLM, load_tokenizer

        self.task.become()
        rows, test, asked = np.arange(start, stop), self.dataset.test, self.scenario.exact_match
        sums = self.task.evaluate(adapter, test, rows)
        if asked and start < asked.examples and isinstance(self.task, CausalLM):
            model = self.scenario.model
            tokenizer = load_tokenizer(model.base, model.revision)
            sums |= self.task.match(
                tokenizer, test, rows[rows < asked.examples], asked.max_new_tokens, asked.pattern
            )
        return sums

    def judge(self, instruction: Instruction, cohort: Sequence[int]) -> dict[str, float]:
        """Sums over clients of the figures of each one's own model on the examples that it holds out.

        Args:
            instruction: with the tensors that the server holds after a round, for every rank.
            cohort: client ids.
        """
        sums: dict[str, float] = {}
        for client in cohort:
            rank = self._rank(client)
            adapter = instruction.at(rank).adapter
            if instruction.keep and self.personal is not None:
                adapter = {**adapter, **self.personal.load(client, before=instruction.round + 1)}
            self.task.become(rank, instruction.draw)
            held = self.dataset.held_out(client)
            for key, value in self.task.figures(self.task.evaluate(adapter, held.examples, held.rows)).items():
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def merge(self, change: Change) -> None:
        """Fold the next of the run's merges into the base."""
        if self.client.private and self._repeats:
            self._base()  # as it was before any
            self._merges = replay.digest(self.scenario.seed, self._merges, change)
        self.task.merge(change)
        self.merged += 1

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss and metric from sums."""
        return self.task.figures(sums)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None) -> None:
        """Write an ordinary LoRA adapter of the untouched base, as peft reads it.

        Args:
            adapter: every tensor of the layout.
            folder: to make.
            merged: all that was folded into the base; it becomes part of the adapter, whose rank grows.
        """
        from safetensors.numpy import save_file

        layout, kind, config = self.task.layout, self.task.kind, self.task.model.peft_config["default"]
        tensors = {n: t for n, t in adapter.items() if layout[n].role in ("A", "B", "head")}
        if merged or not kind.ordinary:
            plain: dict[str, factors.Factors] = {}
            for module, (b, a) in kind.change(layout, adapter).items():
                parts = [
                    (kind.scaling(), b, a),
                    *([(1.0, *merged[module])] if merged and module in merged else []),
                ]
                plain[module] = factors.shorten(*factors.stack(parts))
            rank = max(1, *(right.shape[0] for _, right in plain.values()))
            config = dataclasses.replace(config, r=rank, lora_alpha=rank)
            tensors = {n: t for n, t in tensors.items() if layout[n].role == "head"}
            for module, (left, right) in plain.items():
                pad = rank - right.shape[0]
                tensors[f"{PREFIX}{module}.lora_A.weight"] = np.pad(right, ((0, pad), (0, 0))).astype(np.float32)
                tensors[f"{PREFIX}{module}.lora_B.weight"] = np.pad(left, ((0, 0), (0, pad))).astype(np.float32)
        folder.mkdir(parents=True)
        config.save_pretrained(str(folder))
        whole = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
        save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _longest(examples: Examples, count: int) -> NDArray[np.int64]:
    return np.argsort(examples.lengths(np.arange(len(examples))), kind="stable")[-count:]


def _keep_memory() -> None:
    """Keep what a step frees for the next one: else glibc gives it back, and each step pays for its pages anew."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        adjust = ctypes.CDLL(None).mallopt
        adjust(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the most it takes
        adjust(-1, 2**30)  # M_TRIM_THRESHOLD


def kind(scenario: Scenario, strategy: strategies.Strategy) -> Kind:
    """The kind of adapter that a scenario and its strategy ask for."""
    told = scenario.model.adapter
    name = strategy.kinds[0] if told.kind == "auto" else told.kind
    return adapters.KINDS[name](told.r, told.alpha, told.targets, told.layers)
