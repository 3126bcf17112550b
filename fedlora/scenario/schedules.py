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


AdapterSchedule = Annotated[Rotate | Decay, Field(discriminator="kind")]
