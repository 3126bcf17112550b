"""Sections of a scenario about how the adapter itself changes over the rounds."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.scenario.section import Float, PositiveInt, Section


class Rotate(Section):
    """Merge what was learnt into the base every few rounds, and begin in other directions (SST, 2405.15481).

    Attributes:
        kind: rotate: every few rounds the change is merged into the base, and the frozen parts are drawn again.
        every: Rounds between merges. Fewer reach more directions, and send a merge more often.
    """

    kind: Literal["rotate"]
    every: PositiveInt = 5


class Decay(Section):
    """Let the small directions of each layer's change fade (Trained Rank Pruning, 2004.04576).

    Attributes:
        kind: decay: every few rounds directions that hold little of the change are made smaller.
        every: Rounds between two such steps.
        share: Share of a change's energy, its squared length, that stays as it is. Lower it where noise is loud.
        factor: What the other directions are multiplied by. 0 takes them away at once.
    """

    kind: Literal["decay"]
    every: PositiveInt = 1
    share: Annotated[Float, Field(gt=0, le=1)] = 0.9
    factor: Annotated[Float, Field(ge=0, lt=1)] = 0.5


class Nested(Section):
    """Let devices train as much of one adapter as they can hold (Maestro, 2308.14929): a model for each rank.

    Attributes:
        kind: nested: a client trains the first columns, as many as the rank of its tier, and each number is
            averaged over those who trained it. The ranks stand in `clients.ranks` or `clients.tiers`.
    """

    kind: Literal["nested"]


class Grow(Section):
    """Begin with a small part of the adapter, and train more of it as rounds go by (after IncreLoRA, 2308.12043).

    Attributes:
        kind: grow: the rank, or the number of upper blocks, grows every few rounds.
        of: What grows. rank: columns are added, which change nothing at first. layers: blocks of the model are,
            from the last one down.
        begin: Ranks or blocks that train at first.
        by: Ranks or blocks added each time, up to all.
        every: Rounds between two additions.
    """

    kind: Literal["grow"]
    of: Literal["rank", "layers"] = "rank"
    begin: PositiveInt = 1
    by: PositiveInt = 1
    every: PositiveInt = 5

    def rank(self, round: int, r: int) -> int:
        """The highest rank that trains in a round, of an adapter of rank r."""
        return min(r, self.begin + (round - 1) // self.every * self.by) if self.of == "rank" else r


class Probe(Section):
    """Let a first round, paid as any other, say which layers train (after DiffoRA, 2502.08905).

    Attributes:
        kind: probe: the first round measures how far each layer moves, and those that move most train after it.
        share: Share of the layers with a change of their own that train. Fewer send less, and learn less.
    """

    kind: Literal["probe"]
    share: Annotated[Float, Field(gt=0, lt=1)] = 0.5


AdapterSchedule = Annotated[Rotate | Decay | Nested | Grow | Probe, Field(discriminator="kind")]
