"""Alone (McMahan et al., 2017, https://arxiv.org/abs/1602.05629, without the averaging): no model is shared.

Each client begins with what the strategy named by `like` begins with, trains in each of its rounds what that
strategy trains, and keeps all of it:

    w_k <- train_k(w_k)

Nothing travels but the word to train. Each client's model is judged by the test set that all have in common, and
the figure of the run is their mean. `fedlora simulate S --baseline alone` makes such a scenario of another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedlora import strategy
from fedlora.adapter import Adapter, Layout, Update
from fedlora.kinds.contract import Kind
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class Alone(Strategy):
    """All that trains stays with each client.

    Attributes:
        like: the strategy whose tensors train: its name, or a mapping of `use` and its options.
    """

    facts: ClassVar[Facts] = Facts(sends="nothing", exact=False)
    unequal_ranks: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    tested: ClassVar[bool] = True

    like: str | Mapping[str, Any] = "ffa_lora"
    _like: Strategy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        told = {"use": self.like} if isinstance(self.like, str) else dict(self.like)
        if not isinstance(use := told.pop("use", None), str):
            raise ValueError("like is the name of a strategy, or a mapping with its name under use")
        self._like = strategy.load(use, told)
        if self._like.personal:
            raise ValueError(f"like names a strategy that averages what trains, and {use} keeps some of it")
        # It takes the kinds that this one takes.
        vars(self).update(moves=self._like.moves, builds=self._like.builds)

    def bind(self, layout: Layout, kind: Kind, initial: Adapter, private: bool) -> None:
        """Give it to the other strategy too."""
        super().bind(layout, kind, initial, private)
        self._like.bind(layout, kind, initial, private)

    def federates(self, layout: Layout) -> Collection[str]:
        """Nothing."""
        return ()

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """What the other strategy trains."""
        return self._like.trains(round, layout)

    def keeps(self, layout: Layout) -> Collection[str]:
        """All."""
        return layout

    def config(self, round: int) -> Mapping[str, Any]:
        """The words of the other strategy."""
        return self._like.config(round)

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """Nothing is."""
        return {}
