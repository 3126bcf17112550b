"""The Schedule contract: what becomes of the adapter after a round, beside what clients trained.

A schedule decides by what is public to the run: the number of the round, the seed, and the aggregate, which under
privacy is noised before anybody sees it. So it is post-processing and costs no epsilon: of two runs that release
the same aggregates it makes the same. It holds no state: where a run is resumed, the round says where it stands.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from fedlora import plugins
from fedlora.adapter import Adapter, Change, Layout, Tensor
from fedlora.kinds.contract import Kind, initial
from fedlora.kinds.lora import Lora

Shapes = Mapping[str, tuple[int, ...]]
"""Of the weight of each layer that has a change, (out, in)."""


@dataclass(frozen=True)
class Turned:
    """What a schedule makes of the adapter after a round.

    Attributes:
        adapter: new values of some tensors; the others stay.
        base: what is added to the frozen weight of each layer, as thin factors, scaling included.
        anew: tensors that mean something else from now on, so that what an optimiser knows of them is void.
        layers: those that train from now on; None: as before.
    """

    adapter: Adapter
    base: Change = field(default_factory=dict)
    anew: Collection[str] = ()
    layers: Collection[str] | None = None


@dataclass(kw_only=True)
class Schedule(ABC):
    """How the adapter changes over the rounds.

    Attributes:
        layout: every tensor that could federate; `kind`, `seed` and `shapes` of the run, as `bind` has them.
    """

    merges: ClassVar[bool] = False
    """Whether it adds to the frozen weights."""

    layout: Layout = field(default_factory=dict, init=False, repr=False, compare=False)
    kind: Kind = field(default=Lora(1, 1.0, ()), init=False, repr=False, compare=False)
    seed: int = field(default=0, init=False, repr=False, compare=False)
    shapes: Shapes = field(default_factory=dict, init=False, repr=False, compare=False)

    def bind(self, layout: Layout, kind: Kind, seed: int, shapes: Shapes) -> None:
        """Give the schedule what it works on, before the first round.

        Args:
            layout: every tensor that could federate, by name.
            kind: of the adapter.
            seed: that the first adapter was drawn from.
            shapes: of the weight of each layer that has a change.
        """
        self.layout, self.kind, self.seed, self.shapes = layout, kind, seed, shapes

    def refuses(self, kind: Kind, trained: Collection[str]) -> str | None:
        """Why it does not work on a kind of adapter; None where it does.

        Args:
            kind: of the adapter.
            trained: roles of the tensors that the strategy trains.
        """
        return None

    @property
    def unequal(self) -> bool:
        """Whether updates may be of ranks below the server's, which `levels` brings together."""
        return False

    @property
    def narrows(self) -> bool:
        """Whether some layers do not train in some rounds."""
        return False

    def layers(self, round: int) -> Collection[str] | None:
        """Those that train in a round; None: all, or those that `Turned.layers` named."""
        return None

    def measures(self, round: int) -> bool:
        """Whether a round's mean is looked at and not taken: then the adapter stays as it was before."""
        return False

    def draw(self, round: int) -> int:
        """Which draw of the seed the frozen tensors of a round are; 0 is the first."""
        return 0

    @abstractmethod
    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """What becomes of the adapter after a round.

        Args:
            round: that has ended, from 1.
            adapter: every tensor of the layout, with what the round made of them; where it `measures`, the mean.
        """


def redrawn(kind: Kind, layout: Layout, seed: int, shapes: Shapes, draw: int) -> Adapter:
    """The tensors of a draw that the seed gives: the same as a worker that holds the weights draws them."""
    seeded = {role for role, part in kind.parts.items() if part.origin == "seeded"}
    ours = {name: slot for name, slot in layout.items() if slot.role in seeded}
    return initial(kind, ours, seed, draw=draw, weights=lambda module: _shape_alone(shapes[module]))


@cache
def _shape_alone(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.empty(shape, device="meta")


def load(told: Any) -> Schedule | None:
    """The schedule of a section of a scenario; None without one."""
    if told is None:
        return None
    options = {key: value for key, value in told if key != "kind"}
    made: Schedule = plugins.find_of("schedules", told.kind, Schedule)(**options)  # type: ignore[type-abstract]
    return made
