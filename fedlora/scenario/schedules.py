"""Sections of a scenario about how the adapter itself changes over the rounds."""

from typing import Literal

from fedlora.scenario.section import PositiveInt, Section


class Rotate(Section):
    """Merge what was learnt into the base every few rounds, and begin in other directions (SST, 2405.15481).

    Attributes:
        kind: rotate: every few rounds the change is merged into the base, and the frozen parts are drawn again.
        every: Rounds between merges. Fewer reach more directions, and send a merge more often.
    """

    kind: Literal["rotate"]
    every: PositiveInt = 5


AdapterSchedule = Rotate
