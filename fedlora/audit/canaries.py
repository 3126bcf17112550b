"""Canaries: per-example gradients in directions of their own, which a client's data holds or does not.

A canary stands for the worst example that the mechanism allows: one whose gradient lies in a direction that
no other example uses, and is ten times as long as the clipping bound. The directions are columns of an
orthonormal matrix, a cosine transform with random signs, so that the gradients of text look like little noise
along each of them. Canaries pass through the client's own sampling rate, clipping, noise and scaling:
they are added to the per-example gradients that Opacus's optimizer is about to clip.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora import client as clients
from fedlora.adapter import Adapter, Update
from fedlora.client import Client, Rng, Settings
from fedlora.data import Partition
from fedlora.errors import ContractError, UserError
from fedlora.privacy import Event
from fedlora.seeding import generator

if TYPE_CHECKING:
    import torch

    from fedlora.task import Task

LOUDNESS = 10.0  # of a canary's gradient over the clipping bound: a mechanism that does not clip shows


@dataclass(frozen=True)
class Canaries:
    """`count` canaries, dealt to the clients in turn.

    Attributes:
        seed: what their coins and directions are drawn from.
        count: how many there are over all clients.
        clients: how many clients there are.
    """

    seed: int
    count: int
    clients: int

    @cached_property
    def included(self) -> NDArray[np.bool_]:
        """What the auditor has to guess, (count,): whether the fair coin put a canary into the data."""
        return generator(self.seed, "audit", "included").random(self.count) < 0.5

    def of(self, client: int) -> NDArray[np.int64]:
        """The canaries that could be in a client's data."""
        return np.arange(client, self.count, self.clients)

    def directions(self, canaries: NDArray[np.int64], size: int) -> NDArray[np.float32]:
        """Orthonormal vectors, (canaries, size)."""
        from scipy.fft import idct

        columns, signs = self._basis(size)
        units = np.zeros((len(canaries), size), np.float32)
        units[np.arange(len(canaries)), columns[canaries]] = 1.0
        made: NDArray[np.float32] = signs * idct(units, norm="ortho", axis=1)
        return made

    def along(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        """The inner product of a vector with the direction of each canary, (count,)."""
        from scipy.fft import dct

        columns, signs = self._basis(len(vector))
        products: NDArray[np.float64] = dct((signs * vector).astype(np.float64), norm="ortho")[columns]
        return products

    def fits(self, size: int) -> None:
        """Refuse more canaries than there are directions.

        Raises:
            UserError: there are.
        """
        if self.count > size:
            raise UserError(
                f"--canaries: {self.count} directions do not fit {size} trained numbers; ask for fewer"
            )

    def _basis(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rng = generator(self.seed, "audit", "basis", size)
        signs = (2 * rng.integers(0, 2, size) - 1).astype(np.float32)
        return rng.permutation(size)[: self.count], signs


class Canaried(Client):
    """A client as it is, with the included canaries among its examples; only for audits."""

    def __init__(self, inner: str, options: Mapping[str, Any], seed: int, canaries: int, among: int) -> None:
        self.inner = clients.load(inner, options)
        self.private = self.inner.private
        self.canaries = Canaries(seed, canaries, among)

    def spends(self, num_examples: int, settings: Settings) -> Event | None:
        """What the client claims, which is what is audited."""
        return self.inner.spends(num_examples, settings)

    def fit(self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng) -> Update:
        """Train with canaries.

        Raises:
            ContractError: the client takes its steps without Opacus's optimizer.
        """
        mine = self.canaries.of(partition.client)
        mine = mine[self.canaries.included[mine]]
        names = dict(zip(map(id, task.begin(adapter, settings.train)), settings.train, strict=True))
        coins, rate = rng("canaries"), settings.batch_size / len(partition)
        steps = 0

        def gradients(parameters: "list[torch.Tensor]") -> "list[torch.Tensor]":
            """Of the canaries that this step draws, as Opacus holds per-example gradients."""
            nonlocal steps
            steps += 1
            sent = [p for p in parameters if names[id(p)] in settings.send]
            sent.sort(key=lambda p: settings.send.index(names[id(p)]))
            drawn = mine[coins.random(len(mine)) < rate]
            rows = self.canaries.directions(drawn, sum(p.numel() for p in sent))
            made = {id(p): p.new_zeros((len(drawn), *p.shape)) for p in parameters}
            start = 0
            for p in sent:
                part = LOUDNESS * (settings.clip_norm or 1.0) * rows[:, start : start + p.numel()]
                made[id(p)] = p.new_tensor(part).view(len(drawn), *p.shape)
                start += p.numel()
            return [made[id(p)] for p in parameters]

        with _inserted(gradients):
            update = self.inner.fit(task, adapter, partition, settings, rng)
        if steps != settings.local_steps:
            raise ContractError(
                f"{type(self.inner).__name__} took {steps} of {settings.local_steps} steps with Opacus's "
                "DPOptimizer, where canaries are inserted: it cannot be audited"
            )
        return update


@contextlib.contextmanager
def _inserted(gradients: Any) -> Iterator[None]:
    """Let every step of Opacus's optimizer find further per-example gradients beside those of its batch."""
    import torch
    from opacus.optimizers import DPOptimizer

    original = DPOptimizer.pre_step

    def pre_step(self: Any, closure: Any = None) -> Any:
        if not self._check_skip_next_step(pop_next=False):  # the last pass of a step
            for p, more in zip(self.params, gradients(self.params), strict=True):
                p.grad_sample = torch.cat([self._get_flat_grad_sample(p), more.to(p.grad_sample.dtype)])
        return original(self, closure)

    DPOptimizer.pre_step = pre_step
    try:
        yield
    finally:
        DPOptimizer.pre_step = original
