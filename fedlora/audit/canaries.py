"""Canaries: per-example gradients in directions of their own, which a client's data holds or does not.

A canary stands for the worst example that the mechanism allows: one whose gradient lies in a direction that
no other example uses, and is ten times as long as the clipping bound. Three in four lie over all trained tensors
together, one in four in a single tensor, spread over the tensors in turn: noise that one tensor lacks shows there.
The directions are columns of orthonormal matrices, cosine transforms with random signs, so that the gradients of
text look like little noise along each of them. Canaries pass through the client's own sampling rate, clipping,
noise and scaling: they are added to the per-example gradients that Opacus's optimizer is about to clip. Where
persons are protected a canary is a person, whose rows, however many, all have its gradient: it is added to the
means of persons.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora import client as clients
from fedlora.adapter import Adapter, Update
from fedlora.client import Client, Rng, Settings
from fedlora.data.store import Partition
from fedlora.errors import ContractError, UserError
from fedlora.privacy.accounting import Event
from fedlora.seeding import generator, stream

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Task

LOUDNESS = 10.0  # of a canary's gradient over the clipping bound: a mechanism that does not clip shows
ALONE = 1 / 4  # of the canaries lie in one tensor each


@dataclass(frozen=True)
class Canaries:
    """`count` canaries, given to the clients in turn.

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
        return stream(self.seed, "audit", "included").random(self.count) < 0.5

    def of(self, client: int) -> NDArray[np.int64]:
        """The canaries that could be in a client's data."""
        return np.arange(client, self.count, self.clients)

    def turn(self, canaries: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
        """The group of each of some canaries among those of its client, where groups take turns."""
        return canaries // self.clients % groups

    def within(self, sizes: tuple[int, ...]) -> "Directions":
        """Their directions in tensors of those sizes.

        Raises:
            UserError: there are more canaries than directions.
        """
        return _directions(self.seed, self.count, sizes)


@dataclass(frozen=True)
class Directions:
    """Of each canary a unit vector, orthogonal to those of all others, over tensors laid end to end.

    The numbers are split into groups: the first lies over all tensors, each other in one. Within a group the
    directions are columns of a cosine transform with random signs.

    Attributes:
        sizes: of the tensors.
        groups: for each group the places of its numbers, ascending.
        signs: one for each number, (size,).
        home: the group of each canary, (count,).
        column: of each canary in its group's transform, (count,).
        shares: of each group's squared length what lies in each tensor, (groups, tensors).
    """

    sizes: tuple[int, ...]
    groups: tuple[NDArray[np.int64], ...]
    signs: NDArray[np.float32]
    home: NDArray[np.int64]
    column: NDArray[np.int64]
    shares: NDArray[np.float64]

    def rows(self, canaries: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of some canaries, (canaries, size)."""
        from scipy.fft import idct

        made = np.zeros((len(canaries), sum(self.sizes)), np.float32)
        for group in np.unique(self.home[canaries]):
            here, places = np.flatnonzero(self.home[canaries] == group), self.groups[group]
            units = np.zeros((len(here), len(places)), np.float32)
            units[np.arange(len(here)), self.column[canaries[here]]] = 1.0
            made[here[:, None], places] = self.signs[places] * idct(units, norm="ortho", axis=1)
        return made

    def along(self, vector: NDArray[np.float32], canaries: NDArray[np.int64]) -> NDArray[np.float64]:
        """The inner product of each tensor's part of a vector with canaries' directions, (tensors, canaries)."""
        from scipy.fft import dct

        made = np.zeros((len(self.sizes), len(canaries)))
        signed, ends = (self.signs * vector).astype(np.float64), np.cumsum(self.sizes)
        for group in np.unique(self.home[canaries]):
            here, places = self.home[canaries] == group, self.groups[group]
            tensors = np.searchsorted(ends, places, side="right")
            for tensor in np.flatnonzero(self.shares[group]):
                part = np.where(tensors == tensor, signed[places], 0.0)
                made[tensor, here] = dct(part, norm="ortho")[self.column[canaries[here]]]
        return made


@lru_cache(maxsize=4)
def _directions(seed: int, count: int, sizes: tuple[int, ...]) -> Directions:
    size = sum(sizes)
    if count > size:
        raise UserError(f"--canaries: {count} directions do not fit {size} trained numbers; ask for fewer")
    rng = generator(seed, "audit", "basis", size)
    held = np.zeros(len(sizes) + 1, int)  # canaries of each group
    while (left := int(ALONE * count) - held[1:].sum()) > 0:
        room = np.flatnonzero(held[1:] < np.array(sizes) // 2)  # half of a tensor's numbers at most
        if not len(room):
            break
        held[1 + room[:left]] += 1
    held[0] = count - held[1:].sum()
    signs = (2 * rng.integers(0, 2, size) - 1).astype(np.float32)
    whole, groups = [], []
    for start, numbers, canaries in zip(np.cumsum((0, *sizes)), sizes, held[1:], strict=False):
        places = start + rng.permutation(numbers)
        own = min(canaries * size // count, numbers)  # as many numbers to a canary as elsewhere
        groups.append(np.sort(places[:own]))
        whole.append(places[own:])
    groups.insert(0, np.sort(np.concatenate(whole)))
    home = rng.permutation(np.repeat(np.arange(len(held)), held))
    column = np.zeros(count, int)
    for group, places in enumerate(groups):
        column[home == group] = rng.permutation(len(places))[: held[group]]
    tensors = np.repeat(np.arange(len(sizes)), sizes)
    shares = np.array([np.bincount(tensors[p], minlength=len(sizes)) / max(len(p), 1) for p in groups])
    return Directions(sizes, tuple(groups), signs, home, column, shares)


class Canaried(Client):
    """A client as it is, with the included canaries among its examples; only for audits."""

    def __init__(self, inner: str, options: Mapping[str, Any], seed: int, canaries: int, among: int) -> None:
        self.inner = clients.load(inner, options)
        self.private, self.clips, self.banded = self.inner.private, self.inner.clips, self.inner.banded
        self.persons = self.inner.persons
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
        share = settings.batch_size / partition.units if settings.sample_rate is None else settings.sample_rate
        coins, rate = rng("canaries"), min(settings.bands * share, 1.0)
        bound = settings.clip_norm or 1.0
        if settings.clip == "automatic":  # long beside its constant too
            bound = max(bound, 1.0)
        length = LOUDNESS * bound
        steps = 0

        def gradients(parameters: "list[torch.Tensor]") -> "list[torch.Tensor]":
            """Of the canaries that this step draws, as Opacus holds per-example gradients."""
            nonlocal steps
            turn = (rng.first + steps) % settings.bands
            steps += 1
            sent = [p for p in parameters if names[id(p)] in settings.send]
            sent.sort(key=lambda p: settings.send.index(names[id(p)]))
            drawn = mine[(coins.random(len(mine)) < rate) & (self.canaries.turn(mine, settings.bands) == turn)]
            rows = self.canaries.within(tuple(p.numel() for p in sent)).rows(drawn)
            made = {id(p): p.new_zeros((len(drawn), *p.shape)) for p in parameters}
            start = 0
            for p in sent:
                part = length * rows[:, start : start + p.numel()]
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
