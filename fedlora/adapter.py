"""The adapter: the named low-rank tensors (and head) that federate, as plain data.

Names are those of peft's state dict, so that an adapter on disk is what `PeftModel.from_pretrained`
reads. What a tensor is for is the `role` of its slot, which its kind says (`fedlora.kinds`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError
from fedlora.factors import Factors
from fedlora.privacy.replay import Drawn

Tensor = NDArray[np.float32]
Adapter = dict[str, Tensor]
Change = Mapping[str, Factors]
"""Of each layer, a change of its weight as thin factors (out x m, m x in)."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: what it is, not what it holds.

    Attributes:
        name: as peft saves it.
        shape: at the server's rank.
        role: `A` (r x in) or `B` (out x r) of a LoRA pair, `core` (r x r) or
            `values` (r) between them, another of its kind's parts, or `head`.
        module: the layer that it belongs to.
        trainable: False: it stays as it was first made, whatever a strategy asks.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    module: str
    trainable: bool = True


Layout = Mapping[str, Slot]


def no_moments() -> Tensor:
    """`Update.moments` where no optimiser's state travels."""
    return np.zeros((0, 2), np.float32)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sends back, or the weighted mean of several when they were summed on the way.

    Attributes:
        adapter: the tensors sent; for several clients their mean, each weighted by its own weight.
        weight: of this update in a mean; for several clients the sum of theirs.
        clients: whose work this is, ascending.
        scaling: the client's own factor before `B @ A`, which its rank makes.
        metrics: figures that the clients chose to share, such as `train_loss`.
        state: of the client's optimiser, by tensor and name; it stays with the client, and never travels.
        moments: what is averaged of that state (`fedlora.optimizers.averaged`): a row for each tensor sent, in the
            order of `Instruction.send`, (tensors, 2); no rows where nothing is.
    """

    adapter: Adapter
    weight: float
    clients: tuple[int, ...]
    scaling: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Adapter = field(default_factory=dict)
    moments: Tensor = field(default_factory=no_moments, compare=False)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the server asks of every client of a round.

    Attributes:
        round: from 1.
        adapter: the tensors sent down; the others are what the seed, or the client, made of them.
        train: names of the tensors to train.
        send: names of the tensors to send back.
        keep: names of the tensors that stay with the client from one of its rounds to the next.
        config: further words of the strategy to the client, such as `proximal-mu`.
        frozen: the fingerprint of the tensors that are not sent down because the seed gives them; a
            client whose own differ refuses. Empty: not checked.
        ranked: what clients of a rank below the server's receive instead of `adapter`, by rank.
        draw: which draw of the seed the tensors that are not sent down start from; 0 is the first.
        trip: from 1; in the later trips of a round clients answer about what they trained in the first.
        steps: how many local steps a client takes that takes fewer than the scenario says; simulated worlds only.
        drawn: what clients, and under None the server, drew noise for in this round before; where it runs again.
        moments: of each tensor that is to be sent, what the state of its optimiser begins at, as `Update.moments`.
    """

    round: int
    adapter: Adapter
    train: tuple[str, ...]
    send: tuple[str, ...]
    keep: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    frozen: str = ""
    ranked: Mapping[int, Adapter] = field(default_factory=dict)
    draw: int = 0
    trip: int = 1
    steps: Mapping[int, int] = field(default_factory=dict)
    drawn: Mapping[int | None, Drawn] = field(default_factory=dict)
    moments: Tensor = field(default_factory=no_moments, compare=False)

    def at(self, rank: int) -> "Instruction":
        """The same as a client of that rank gets it."""
        return replace(self, adapter=self.ranked.get(rank, self.adapter), ranked={})


def fingerprint(adapter: Mapping[str, Tensor]) -> str:
    """Differs when any bit of any tensor does."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        digest.update(name.encode() + adapter[name].tobytes())
    return digest.hexdigest()[:16]


class Sum:
    """A running sum of updates, each times its weight, in the order they are added; it holds one adapter."""

    def __init__(self) -> None:
        self.first: Update | None = None
        self.total: Adapter = {}
        self.weight = 0.0
        self.clients: list[int] = []
        self.metrics: dict[str, float] = {}
        self.moments = no_moments()
        self._part: Adapter = {}

    def add(self, update: Update) -> None:
        """One more; only the first is held on to.

        Raises:
            ContractError: it has other tensors than those before it.
        """
        if self.first is None:
            self.first = update
            self.metrics = {name: update.weight * value for name, value in update.metrics.items()}
            self.moments = update.moments * np.float32(update.weight)
        else:
            if self.first.adapter.keys() != update.adapter.keys():
                raise ContractError(f"clients {update.clients} sent other tensors than those before them")
            if not self.total:
                weight = np.float32(self.first.weight)
                self.total = {name: tensor * weight for name, tensor in self.first.adapter.items()}
                self._part = {name: np.empty_like(tensor) for name, tensor in self.total.items()}
            weight = np.float32(update.weight)
            for name, tensor in update.adapter.items():
                self.total[name] += np.multiply(tensor, weight, out=self._part[name])
            shared = self.metrics.keys() & update.metrics.keys()
            self.metrics = {k: self.metrics[k] + update.weight * update.metrics[k] for k in shared}
            self.moments += update.moments * weight
        self.weight += update.weight
        self.clients += update.clients

    def mean(self) -> Adapter:
        """`sum_k w_k x_k / sum_k w_k` for every tensor; of one update a copy, bit for bit.

        Raises:
            ContractError: nothing was added, or weights do not sum to something positive.
        """
        if self.first is None or not self.weight > 0:
            raise ContractError("no update to average, or weights that do not sum to something positive")
        if not self.total:
            return {name: tensor.copy() for name, tensor in self.first.adapter.items()}
        return {name: tensor / np.float32(self.weight) for name, tensor in self.total.items()}

    def updates(self) -> list[Update]:
        """What was added as one update that stands for all of it, or none where nothing was."""
        if self.first is None or not self.total:
            return [self.first] if self.first else []
        metrics = {name: self.metrics[name] / self.weight for name in sorted(self.metrics)}
        clients, moments = tuple(self.clients), self.moments / np.float32(self.weight)
        told: dict[str, Any] = {"clients": clients, "metrics": metrics, "moments": moments}
        return [replace(self.first, adapter=self.mean(), weight=self.weight, **told)]


def weighted_mean(updates: Iterable[Update]) -> Adapter:
    """`sum_k w_k x_k / sum_k w_k` for every tensor, in the order given.

    Raises:
        ContractError: there is no update, weights do not sum to something positive, or keys differ.
    """
    total = Sum()
    for update in updates:
        total.add(update)
    return total.mean()


def pairs(layout: Layout) -> Iterator[tuple[str, str]]:
    """The names of B and A of each LoRA pair."""
    a_of = {slot.module: name for name, slot in layout.items() if slot.role == "A"}
    for name, slot in layout.items():
        if slot.role == "B":
            yield name, a_of[slot.module]


def names(layout: Layout, module: str) -> tuple[str, str]:
    """The names of B and A of a layer."""
    return next((b, a) for b, a in pairs(layout) if layout[b].module == module)


def mean_head(layout: Layout, updates: Sequence[Update]) -> Adapter:
    """The weighted mean of the tensors of the head alone."""
    heads = [
        replace(u, adapter={n: t for n, t in u.adapter.items() if n in layout and layout[n].role == "head"})
        for u in updates
    ]
    return weighted_mean(heads)
