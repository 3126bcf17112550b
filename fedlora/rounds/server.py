"""Server optimisers: steps along the mean change of a round (FedOpt: Reddi et al., 2021).

After the strategy's aggregate, where that is a mean (https://arxiv.org/abs/2003.00295). With x the tensors that
the server holds, d = aggregate - x the mean change, element by element, and t the changes of a tensor so far, this
one among them:

    momentum   m <- b m + d                              x <- x + lr m
    adam       m <- b1 m + (1 - b1) d                    x <- x + lr m' / (sqrt(v') + eps)
               v <- b2 v + (1 - b2) d^2                  m' = m / (1 - b1^t), v' = v / (1 - b2^t)
    yogi       v <- v - (1 - b2) d^2 sign(v - d^2)       the rest as adam, v = d^2 in the first round

The paper starts v at the square of its `eps` and corrects nothing; with m' and v' the first steps have the length
of later ones. All of it is a function of what was released, so it costs no epsilon.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Layout, Tensor
from fedlora.errors import SettingError
from fedlora.scenario.learning import Rates, Schedule, ServerAdam, ServerMomentum

STATE = "server"
"""Under which a checkpoint has the state, beside the strategy's."""

_Wide = NDArray[np.float64]


@dataclass(kw_only=True)
class ServerOptimizer(ABC):
    """The stage after a strategy's aggregate.

    Attributes:
        lr: of all tensors, or by role.
        layout: of the adapter.
        rounds: of the run, which a schedule spans.
        schedule: of the learning rate; None: it is constant.
    """

    lr: Rates
    layout: Layout
    rounds: int
    schedule: Schedule | None = None
    _moments: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _taken: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # changes of each tensor so far

    def step(self, round: int, before: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> Adapter:
        """The tensors after a round.

        Args:
            round: from 1.
            before: what the server held.
            mean: what the strategy made of the updates: the mean of what was sent. What was not sent stands still.
        """
        pace = 1.0 if self.schedule is None else self.schedule.factor(round, self.rounds)
        after: Adapter = {}
        for name in sorted(mean):
            start = before[name].astype(np.float64)
            self._taken[name] = self._taken.get(name, 0) + 1
            move = self.move(name, mean[name].astype(np.float64) - start, self._taken[name])
            after[name] = (start + pace * rate(self.lr, self.layout[name].role) * move).astype(np.float32)
        return after

    @abstractmethod
    def move(self, name: str, change: _Wide, taken: int) -> _Wide:
        """How far a tensor goes, without the learning rate.

        Args:
            name: of the tensor.
            change: the mean change.
            taken: how many changes of it there were, this one among them.
        """

    def held(self, name: str, like: _Wide) -> _Wide:
        """A moment of the last round in which there was one, by its name; zeros before."""
        return self._moments[name].astype(np.float64) if name in self._moments else np.zeros_like(like)

    def hold(self, name: str, moment: _Wide) -> _Wide:
        """Keep a moment, in float32; as the next round will have it."""
        self._moments[name] = moment.astype(np.float32)
        return self.held(name, moment)

    def forget(self, names: Collection[str]) -> None:
        """Begin again for tensors that mean something else from now on."""
        for name in names:
            self._taken.pop(name, None)
        self._moments = {n: m for n, m in self._moments.items() if n.partition("/")[2] not in set(names)}

    def state(self) -> dict[str, Any]:
        """What must outlive a restart: arrays by name, and JSON values."""
        return {f"{STATE}/{name}": moment for name, moment in self._moments.items()} | {STATE: dict(self._taken)}

    def load_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Take back what `state` gave; returns the rest.

        Raises:
            KeyError: there is none.
        """
        self._taken = dict(state[STATE])
        prefix = f"{STATE}/"
        self._moments = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        return {n: t for n, t in state.items() if n != STATE and not n.startswith(prefix)}


@dataclass(kw_only=True)
class Momentum(ServerOptimizer):
    """Heavy-ball momentum."""

    momentum: float = 0.9

    def move(self, name: str, change: _Wide, taken: int) -> _Wide:
        """The sum of changes, those of the past fading."""
        return self.hold(f"m/{name}", self.momentum * self.held(f"m/{name}", change) + change)


@dataclass(kw_only=True)
class Adam(ServerOptimizer):
    """Adam, or Yogi."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    yogi: bool = False

    def move(self, name: str, change: _Wide, taken: int) -> _Wide:
        """The mean of changes over the root of the mean of their squares."""
        b1, b2 = self.betas
        m = self.hold(f"m/{name}", b1 * self.held(f"m/{name}", change) + (1 - b1) * change)
        square, v = change**2, self.held(f"v/{name}", change)
        if self.yogi:
            v = square if taken == 1 else v - (1 - b2) * square * np.sign(v - square)
            second = self.hold(f"v/{name}", v)
        else:
            second = self.hold(f"v/{name}", b2 * v + (1 - b2) * square) / (1 - b2**taken)
        return m / (1 - b1**taken) / (np.sqrt(second) + self.eps)


def make(
    told: ServerAdam | ServerMomentum | None, layout: Layout, held: Collection[str], rounds: int
) -> ServerOptimizer | None:
    """The stage that a scenario asks for; None where the aggregate is taken as it is.

    Args:
        told: by the scenario.
        layout: of the adapter.
        held: the tensors that the server holds.
        rounds: of the run.

    Raises:
        SettingError: a learning rate is for a role that no tensor has, or a role has none.
    """
    if told is None:
        return None
    check_rates("strategy.server.lr", told.lr, layout, held)
    match told:
        case ServerMomentum(lr=lr, schedule=schedule):
            return Momentum(lr=lr, layout=layout, rounds=rounds, schedule=schedule, momentum=told.momentum)
        case ServerAdam(lr=lr, schedule=schedule):
            yogi = told.kind == "yogi"
            return Adam(
                lr=lr,
                layout=layout,
                rounds=rounds,
                schedule=schedule,
                betas=told.betas,
                eps=told.eps,
                yogi=yogi,
            )


def rate(rates: Rates, role: str) -> float:
    """The learning rate of tensors of a role."""
    return rates[role] if isinstance(rates, dict) else rates


def check_rates(key: str, rates: Rates, layout: Layout, moving: Collection[str]) -> None:
    """Make sure that learning rates by role are for the roles that there are.

    Args:
        key: of the learning rates in the scenario.
        rates: learning rates, one for all, or by role.
        layout: of the adapter.
        moving: the tensors that need a learning rate.

    Raises:
        SettingError: one is for another role, or one of these has none.
    """
    if not isinstance(rates, dict):
        return
    known = sorted({slot.role for slot in layout.values()})
    if strange := sorted(set(rates) - set(known)):
        raise SettingError(
            f"{key}.{strange[0]}", f"no tensor of this adapter is {strange[0]!r}: {', '.join(known)}"
        )
    if missing := sorted({layout[name].role for name in moving} - set(rates)):
        raise SettingError(
            key, f"has no learning rate for {missing[0]!r}, and tensors of that role train: add one"
        )
