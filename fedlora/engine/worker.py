"""The worker: the resident process that holds the base model and serves clients one after another."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import adapter as adapters
from fedlora import client as clients
from fedlora import wire
from fedlora.adapter import Adapter, Instruction, Layout, Update, fingerprint, weighted_mean
from fedlora.data import Dataset
from fedlora.errors import ContractError
from fedlora.privacy import Event
from fedlora.scenario import Scenario


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker needs to know, as plain data that can be sent to it.

    Attributes:
        scenario: resolved, as `Scenario.model_dump` gives it.
        dataset: folder of the tokenised examples.
        partitions: folder of the partition.
        threads: of torch.
        precision: `fp32` or `bf16`.
        device: a torch device.
        noise: the calibrated noise multiplier for each number of examples; None without privacy.
    """

    scenario: Mapping[str, Any]
    dataset: Path
    partitions: Path
    threads: int = 1
    precision: str = "fp32"
    device: str = "cpu"
    noise: Mapping[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a worker found when it built its model."""

    layout: Layout
    initial: Adapter
    metric: str
    higher_is_better: bool
    test_examples: int
    fingerprint: str  # of the first adapter, bit for bit: workers that differ must not serve one run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one client in one round.

    Attributes:
        client: its id.
        num_examples: that it holds.
        steps: that it took; 0 where it failed.
        bytes_up, bytes_down: of its messages as Flower serialises them.
        seconds: that it took.
        event: the privacy event that it cost, also where it failed after it may have trained.
        error: why it failed; None if it did not.
        metrics: figures that it shares.
    """

    client: int
    num_examples: int
    steps: int
    bytes_up: int
    bytes_down: int
    seconds: float
    event: Event | None = None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Replies:
    """The outcome of a round or a part of it: updates sorted by client, and one report for each client."""

    updates: list[Update]
    reports: list[Report]


class Setter:
    """The settings of a client in a round, from the scenario, the instruction and the calibrated noise."""

    def __init__(self, scenario: Scenario, noise: Mapping[int, float] | None) -> None:
        self.scenario, self.noise = scenario, noise

    def __call__(self, instruction: Instruction, num_examples: int) -> clients.Settings:
        """The settings of a client that holds `num_examples`."""
        told, privacy = self.scenario.clients, self.scenario.privacy
        return clients.Settings(
            round=instruction.round,
            train=instruction.train,
            send=instruction.send,
            local_steps=told.local_steps,
            batch_size=told.batch_size,
            lr=told.lr,
            micro_batch_size=told.micro_batch_size,
            noise_multiplier=None if self.noise is None else self.noise[num_examples],
            clip_norm=privacy.clip_norm if privacy else None,
            share_metrics=privacy.share_metrics if privacy else True,
            config=instruction.config,
        )


class Worker:
    """Builds the task once, then trains, evaluates and exports on demand."""

    def __init__(self, setup: Setup) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        from fedlora import task

        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.scenario = Scenario.model_validate(setup.scenario)
        self.dataset = Dataset.open(setup.dataset, setup.partitions)
        model, told = self.scenario.model, self.scenario.clients
        self.client = clients.load(told.use, told.options)
        self.task = task.load(
            self.scenario.task,
            model.base,
            adapters.Lora(model.adapter.r, model.adapter.alpha, model.adapter.targets),
            labels=self.dataset.labels,
            seed=self.scenario.seed,
            head=model.head,
            pooler=model.pooler,
            revision=model.revision,
            device=setup.device,
            max_length=self.scenario.data.max_length,
            precision="bf16" if setup.precision == "bf16" else "fp32",
        )
        self.settings = Setter(self.scenario, setup.noise)
        self._fingerprints: dict[frozenset[str], str] = {}

    def describe(self) -> Description:
        """What was built."""
        return Description(
            layout=self.task.layout,
            initial=self.task.initial,
            metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            test_examples=len(self.dataset.test),
            fingerprint=fingerprint(self.task.initial),
        )

    def pid(self) -> int:
        """The process that this worker is."""
        return os.getpid()

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run clients one after another; one that raises is a report with an error, never silence."""
        down = wire.instruction_bytes(instruction, self.task.layout)
        updates, reports = [], []
        for client in cohort:
            update, report = self._fit(instruction, client, down)
            reports.append(report)
            if update is not None:
                updates.append(update)
        if partial_sums and len(updates) > 1:
            updates = [merge(updates)]
        return Replies(updates, reports)

    def _fit(self, instruction: Instruction, client: int, down: int) -> tuple[Update | None, Report]:
        began = time.perf_counter()
        partition = self.dataset.partition(client)
        event = None
        try:
            self._agree(instruction)
            settings = self.settings(instruction, len(partition))
            event = self.client.spends(len(partition), settings)
            rng = clients.Rng(self.scenario.seed, instruction.round, client)
            update = self.client.fit(self.task, instruction.adapter, partition, settings, rng)
            check(update, instruction, self.task.layout)
        except Exception as error:  # a client is anybody's code
            return None, Report(
                client=client,
                num_examples=len(partition),
                steps=0,
                bytes_up=0,
                bytes_down=down,
                seconds=time.perf_counter() - began,
                event=event,  # it may have trained: what it meant to spend counts
                error=f"{type(error).__name__}: {error}",
            )
        return update, Report(
            client=client,
            num_examples=len(partition),
            steps=settings.local_steps,
            bytes_up=wire.update_bytes(update, event),
            bytes_down=down,
            seconds=time.perf_counter() - began,
            event=event,
            metrics=update.metrics,
        )

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

    def evaluate(self, adapter: Adapter, start: int, stop: int) -> dict[str, float]:
        """Sums of the metric over test examples `start` to `stop`."""
        return self.task.evaluate(adapter, self.dataset.test, start, stop)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss and metric from sums."""
        return self.task.figures(sums)

    def export(self, adapter: Adapter, folder: Path) -> None:
        """Write the adapter as peft does."""
        self.task.begin(adapter, ())
        self.task.model.save_pretrained(str(folder), save_embedding_layers=False)


def check(update: Update, instruction: Instruction, layout: Layout) -> None:
    """Refuse an update that does not hold what was asked for.

    Raises:
        ContractError: wrong names, shapes, a weight that is no positive number, or values that are not finite.
    """
    if set(update.adapter) != set(instruction.send):
        odd = sorted(set(update.adapter) ^ set(instruction.send))[0]
        raise ContractError(f"the update should hold exactly the tensors asked for, and differs in {odd}")
    if not (update.weight > 0 and np.isfinite(update.weight)):
        raise ContractError(f"an update's weight is a positive number, not {update.weight}")
    for name, tensor in update.adapter.items():
        if tensor.shape != layout[name].shape:
            raise ContractError(f"{name} has shape {tensor.shape}, not {layout[name].shape}")
        if not np.isfinite(tensor).all():
            raise ContractError(f"{name} holds values that are not finite; a lower learning rate may help")


def merge(updates: Sequence[Update]) -> Update:
    """Several updates as one that stands for all of them."""
    weight = sum(u.weight for u in updates)
    shared = set.intersection(*(set(u.metrics) for u in updates))
    return Update(
        adapter=weighted_mean(updates),
        weight=weight,
        clients=tuple(c for u in updates for c in u.clients),
        metrics={k: sum(u.weight * u.metrics[k] for u in updates) / weight for k in sorted(shared)},
    )
