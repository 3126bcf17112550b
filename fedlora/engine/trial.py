"""What a worker takes of its device at most, by trying."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora import client as clients
from fedlora.client import Setter
from fedlora.data.store import Examples, Partition
from fedlora.engine import hardware

if TYPE_CHECKING:
    from fedlora.engine.worker import Worker


def measure(worker: "Worker") -> hardware.Measured:
    """What it takes of its GPU at most."""
    return hardware.measure(lambda: rehearse(worker))


@hardware.on_gpu("a step")
def rehearse(worker: "Worker") -> None:
    """A step on the longest examples, as many at once as there may be, and an evaluation of such."""
    told, ranks = worker.scenario.clients, worker.scenario.clients.possible_ranks(worker.scenario.model.adapter.r)
    most = told.batch(max(worker.dataset.unit_sizes()))
    at_once = (3 * told.micro_batch_size - 1) // 2  # `Task.micro_batches` gives less than half as many again
    if not worker.client.private:
        at_once = min(at_once, most)
    longest = _longest(worker.dataset.train, at_once)
    rows = np.tile(longest, -(-most // len(longest)))
    instruction = worker.strategy.instruct(1, dict(worker.task.initial), ranks)
    noise = {len(rows): max(worker.settings.noise.values())} if worker.settings.noise else None
    settings = replace(
        Setter(worker.scenario, noise)(instruction, len(rows)),
        local_steps=1,
        sample_rate=None,
        batch_size=len(rows),  # every one of them, for a private client too
        micro_batch_size=len(longest),
    )
    partition = Partition(-1, worker.dataset.train, rows)  # no client's
    worker.task.become(ranks[-1], instruction.draw)
    received, rng = instruction.at(ranks[-1]).adapter, clients.Rng(worker.scenario.seed, 0, 0)
    one = (worker.task, received, partition, settings, rng)
    if worker.fused is not None and isinstance(worker.client, clients.Stepwise):
        worker.fused.run(ranks[-1], [worker.client.passes(*one) for _ in range(worker.scenario.engine.fused)])
    else:
        worker.client.fit(*one)
    worker.task.become()
    for held in filter(len, (worker.dataset.test, worker.dataset.validation)):
        width = int(held.lengths(_longest(held, 1))[0])
        worker.task.evaluate(worker.task.initial, held, _longest(held, worker.task.at_once(width)))


def _longest(examples: Examples, count: int) -> NDArray[np.int64]:
    return np.argsort(examples.lengths(np.arange(len(examples))), kind="stable")[-count:]
