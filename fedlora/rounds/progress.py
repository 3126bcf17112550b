"""How far a run is, and where its time goes."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fedlora.adapter import Adapter, Update
from fedlora.rounds.checkpoint import Checkpoint
from fedlora.rounds.world import Journey

Line = dict[str, Any]

_ELSEWHERE = ("round", "adapter", "under_way", "best", "moments")  # in a checkpoint, than in its words
_MOMENTS = "moments"  # among the names of an update's tensors


@dataclass(frozen=True)
class UnderWay:
    """A client that was asked and has not arrived, in a run whose rounds are not in step.

    Attributes:
        journey: its way.
        change: what it trained, less what it received; None where it is to vanish or failed.
    """

    journey: Journey
    change: Update | None = None


@dataclass(frozen=True)
class Best:
    """The best round so far.

    Attributes:
        round: its number.
        merges: that were in the base after it.
        figures: that were measured then.
        adapter: that it made.
    """

    round: int
    merges: int
    figures: Line
    adapter: Adapter


@dataclass
class Progress:
    """How far a run is; what a checkpoint keeps."""

    round: int
    adapter: Adapter
    bytes_up: int = 0
    bytes_up_head: int = 0
    bytes_down: int = 0
    failures: int = 0
    trained: int = 0  # clients that trained, over all rounds
    seconds: float = 0.0
    last: Line = field(default_factory=dict)  # the last loss and metric measured
    merges: int = 0  # that are in the base
    clip_norm: float | None = None  # of the next round, where clients are protected whole
    merges_seen: dict[str, int] = field(default_factory=dict)  # how many of them each client was sent
    virtual_seconds: float = 0.0  # by the clock of a simulated world
    under_way: list[UnderWay] = field(default_factory=list)
    best: Best | None = None  # where somebody asks for it
    moments: Adapter = field(default_factory=dict)  # of each tensor, where clients' optimisers begin at their mean
    layers: list[str] | None = None  # that train, where a schedule chose some
    waited: int = 0  # evaluations since
    unjudged: Line | None = None  # the line of the last round, where that is being evaluated beside the next

    def words(self) -> dict[str, Any]:
        """All but the tensors."""
        plain = {k: v for k, v in vars(self).items() if k not in _ELSEWHERE}
        best = {k: v for k, v in vars(self.best).items() if k != "adapter"} if self.best else None
        return {**plain, "best": best, "under_way": [_words(one) for one in self.under_way]}

    def tensors(self) -> Adapter:
        """Those of updates that are under way, by client and name."""
        return {
            f"{one.journey.client}/{name}": tensor
            for one in self.under_way
            if one.change is not None
            for name, tensor in {**one.change.adapter, _MOMENTS: one.change.moments}.items()
        }

    @classmethod
    def restored(cls, saved: Checkpoint) -> Self:
        """That of a checkpoint.

        Raises:
            KeyError, TypeError: it is of another version.
        """
        words = dict(saved.words)
        under_way = [_under_way(told, saved.under_way) for told in words.pop("under_way")]
        best = Best(**told, adapter=saved.best) if (told := words.pop("best", None)) else None
        words |= {"under_way": under_way, "best": best, "moments": saved.moments}
        return cls(round=saved.round, adapter=saved.adapter, **words)


def _words(one: UnderWay) -> dict[str, Any]:
    told, change = asdict(one.journey), one.change
    told["gone"] = None if one.journey.gone == float("inf") else one.journey.gone  # which JSON cannot say
    if change is not None:
        told["change"] = {"weight": change.weight, "scaling": change.scaling, "metrics": dict(change.metrics)}
    return told


def _under_way(told: dict[str, Any], tensors: Adapter) -> UnderWay:
    change, gone = told.pop("change", None), told.pop("gone")
    journey = Journey(**told, gone=float("inf") if gone is None else gone)
    if change is None:
        return UnderWay(journey)
    prefix = f"{journey.client}/"
    adapter = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    moments = adapter.pop(_MOMENTS)
    return UnderWay(journey, Update(adapter=adapter, clients=(journey.client,), moments=moments, **change))


class Stopwatch:
    """Where the time of a round goes.

    Attributes:
        phases: seconds by the name of the phase.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last call was spent on `phase`."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now
