"""What makes a client's noised sums, but the noise, as one digest (`fedlora.privacy.replay`)."""

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlora.adapter import Adapter, Change, Instruction, fingerprint
from fedlora.client import Client, Settings
from fedlora.data.store import Partition
from fedlora.engine.setup import Setup
from fedlora.privacy import replay
from fedlora.scenario import Scenario
from fedlora.scenario.keys import lasting
from fedlora.strategy import Strategy
from fedlora.tasks.contract import Task

UNREAD = "unread"  # in the place of what cannot be read; whose it is fails by itself
KNOWN = 10_000  # clients whose examples' digests are kept


class Sharing(NamedTuple):
    """Those with whom a client shares its passes, itself among them.

    Attributes:
        clients: how many; 0: it makes its own.
        made_of: a digest of what decides their batches, and so the last bits of each other's gradients.
    """

    clients: int = 0
    made_of: str = ""


ALONE = Sharing()


class Digests:
    """The digests of one worker in one run: a round over other inputs draws other noise."""

    def __init__(self, task: Task, client: Client, strategy: Strategy, setup: Setup, scenario: Scenario) -> None:
        """At the start of a run, before anything was merged; the scenario is resolved, as workers have it."""
        self.task, self.client, self.strategy, self.setup, self.scenario = task, client, strategy, setup, scenario
        self._based, self._merges = "", ""
        self._seen: dict[int, str] = {}

    def of(
        self, instruction: Instruction, received: Adapter, partition: Partition, settings: Settings, *more: Any
    ) -> str:
        """Of a client's training in a round."""
        told = dataclasses.asdict(settings)
        parts = (self._base(), self._merges, received, instruction.draw, told, self.examples(partition), more)
        return replay.digest(self.scenario.seed, *parts)

    def merged(self, change: Change) -> None:
        """A change is about to be folded into the base."""
        self._base()  # as it was before any
        self._merges = replay.digest(self.scenario.seed, self._merges, change)

    def _base(self) -> str:
        """Of what stays the same for the life of a worker: weights, scenario, client, device, versions."""
        if not self._based:
            import torch

            on_gpu = self.setup.device.startswith("cuda")
            chip = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
            machine = (platform.machine(), chip, self.setup.device, self.setup.precision, self.setup.threads)
            codes = [replay.code(of) for of in (self.client, self.strategy, self.task, self.task.kind)]
            told = lasting(self.scenario.model_dump(mode="json"))  # with what was found in the data, as weights
            first = (fingerprint(self.task.initial),) if self.scenario.model.begins else ()
            parts = (self.task.base_fingerprint(), replay.versions(), machine, codes, told, *first)
            self._based = replay.digest(self.scenario.seed, *parts)
        return self._based

    def examples(self, partition: Partition) -> str:
        """Of a client's tokens and of what they are judged by."""
        if partition.client not in self._seen:
            if len(self._seen) >= KNOWN:
                self._seen.clear()
            examples, rows = partition.examples, partition.rows
            tokens = np.concatenate([examples.row(int(row)) for row in rows])
            types = np.concatenate([examples.types_of(int(row)) for row in rows])
            prefix = self.task.prefix
            kept = None if prefix is None else prefix.find(examples, rows)  # an input of a pass as they are
            parts: list[Any] = [tokens, types, examples.lengths(rows), examples.targets[rows], rows, kept]
            if examples.marks is not None:
                parts.append(np.concatenate([examples.marks_of(int(row)) for row in rows]))
            if partition.persons is not None:
                parts.append(partition.persons)
            self._seen[partition.client] = replay.digest(self.scenario.seed, *parts)
        return self._seen[partition.client]


def together(worker: Any, instruction: Instruction, who: Sequence[int]) -> Sharing:
    """Of clients that share passes in a round: their examples, and what they kept from the rounds before.

    Args:
        worker: that trains them, a `fedlora.engine.worker.Worker`.
        instruction: as they received it.
        who: their ids, in order.
    """
    if worker.digests is None or not worker.client.private:
        return Sharing(len(who))
    parts: list[Any] = [instruction.steps]
    for client in who:
        parts.append(client)
        try:
            parts.append(worker.digests.examples(worker.dataset.partition(client)))
            parts.append(worker.received(instruction, client, instruction.round) if instruction.keep else {})
            parts.append(worker.optimizers.load(client, instruction.round) if worker.optimizers else {})
        except Exception:  # whatever is wrong with what it holds
            parts.append(UNREAD)
    return Sharing(len(who), replay.digest(worker.scenario.seed, *parts))
