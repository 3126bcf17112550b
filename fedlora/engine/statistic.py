"""A client's part of a statistic round: what its examples say of the base, added up and noised.

The same code runs in a simulation, where the server pays for its clients, and at a site, which pays for itself.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.store import Partition
from fedlora.engine.replies import Sums
from fedlora.engine.worker import Worker
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.contract import under
from fedlora.passes import alone
from fedlora.passes.statistic import Collector
from fedlora.privacy.mechanisms.statistic import StatisticGaussian
from fedlora.privacy.noise import Stream
from fedlora.tasks import smaller

if TYPE_CHECKING:
    from fedlora.tasks.contract import Batch


class Taker:
    """Takes the statistic of clients whose examples a worker has; the worker trains nobody afterwards.

    Attributes:
        collector: of the worker's model.
        own: of each layer that is to be cut and has a statistic, the name of the sum which that is.
    """

    def __init__(self, worker: Worker, layers: Collection[str]) -> None:
        """See which layers of the model have a statistic.

        Args:
            worker: of the whole base.
            layers: names of those that are to be cut, as the base alone has them.

        Raises:
            SettingError: no layer has a statistic, there is no such block, or examples of a pass move each other.
        """
        assert worker.scenario.statistics is not None
        self.worker, self.asked, task = worker, worker.scenario.statistics, worker.task
        if task.prefix is not None:
            task.prefix.forget()  # all blocks are passed
        held = dict(task.model.get_base_model().named_modules())
        named = smaller.paired([*layers], [name for name, module in held.items() if _linear(module)])
        for block in self.asked.layers or ():
            if not any(under(f"{name}.", str(block)) for name in named):
                raise SettingError("statistics.layers", f"no layer {block} is cut; the first is 0")
        if (blocks := self.asked.layers) is not None:
            named = {n: m for n, m in named.items() if any(under(f"{n}.", str(block)) for block in blocks)}
        modules = {name: held[name] for name in named.values()}
        trial = task.batch(task.trial, np.arange(len(task.trial)))
        count = len(trial["targets"])

        def tried() -> int:
            self._pass(trial)
            return count

        sequences = len(trial["input_ids"]) // count if "input_ids" in trial else 1
        task.begin(task.initial, ())
        task.model.eval()
        try:
            with task.precisely(False):
                self.collector = Collector(modules, self.asked.kind, task.low_rank.find, tried, sequences)
        except ContractError as error:
            what = f"{self.asked.kind} cannot be taken of this base: {error}"
            raise SettingError("statistics.kind", what) from error
        if task.private and (unfit := alone.mingle(task, task.initial)):
            raise SettingError("statistics", f"examples would not be bounded one by one: {unfit}")
        shared = self.collector.shared
        self.own = {name: shared[module] for name, module in named.items() if module in shared}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each sum, by name: symmetric (in, in), or (in,)."""
        return {name: total.shape for name, total in self.collector.sums.items()}

    def sums(self, client: int, coins: Stream) -> Sums:
        """What the examples of a client add up to, without noise.

        Args:
            client: whose.
            coins: to toss for each example, or person.
        """
        partition = self.worker.dataset.partition(client)
        return self._added(
            partition, dict(weighed(partition, mechanism(self.asked.share, partition.units).taken(coins)))
        )

    def row_seconds(self, client: int) -> float:
        """Of a row, by a few of a client's; the first pass is slower, and not counted."""
        partition = self.worker.dataset.partition(client)
        few = [int(row) for row in partition.rows[: self.worker.scenario.clients.micro_batch_size]]
        took = 0.0
        for _ in range(2):
            began = time.perf_counter()
            self._added(partition, dict.fromkeys(few, 1.0))
            took = time.perf_counter() - began
        return took / len(few)

    def _added(self, partition: Partition, weights: Mapping[int, float]) -> Sums:
        """What rows of a client add up to, each times its weight."""
        task, rows = self.worker.task, np.array(sorted(weights), np.int64)
        task.begin(task.initial, ())
        task.model.eval()
        with task.precisely(False):
            if not len(rows):  # coins took none
                return self.collector.take()
            size = self.worker.scenario.clients.micro_batch_size
            for batch, part in task.micro_batches(partition.examples, rows, size):
                mask = batch["attention_mask"] if task.packing is None and "attention_mask" in batch else None
                with self.collector.adding([weights[int(row)] for row in part], mask):
                    self._pass(batch)
        return self.collector.take()

    def _pass(self, batch: "Batch") -> None:
        """Forward, and for gradients back, with the adapter that the seed stands for, which changes nothing."""
        import torch

        task = self.worker.task
        if self.asked.kind != "row_fisher":
            with torch.no_grad():
                task.logits(batch)
            return
        table = task.model.get_base_model().get_input_embeddings()
        handle = table.register_forward_hook(lambda module, given, out: out.requires_grad_(True))
        try:
            task.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            handle.remove()


def mechanism(share: float, units: int, noise_multiplier: float = 1.0) -> StatisticGaussian:
    """The one sum of a client that holds as many examples, or persons."""
    return StatisticGaussian(noise_multiplier=noise_multiplier, sample_rate=share, total=units)


def weighed(partition: Partition, taken: NDArray[np.bool_]) -> Iterator[tuple[int, float]]:
    """The rows that are taken, each with its weight: those of a person together weigh 1.

    Args:
        partition: of a client.
        taken: which of its persons, or examples, (units,).
    """
    if partition.persons is None:
        yield from ((int(row), 1.0) for row in partition.rows[taken])
        return
    _, places, counts = np.unique(partition.persons, return_inverse=True, return_counts=True)
    for row, place in zip(partition.rows, places, strict=True):
        if taken[place]:
            yield int(row), 1.0 / int(counts[place])


def _linear(module: Any) -> bool:
    """Whether a module of a wrapped model stands for one linear layer of the base: itself, or one with factors."""
    from fedlora.kinds.targets import is_linear

    return is_linear(module) or (hasattr(module, "get_base_layer") and is_linear(module.get_base_layer()))
