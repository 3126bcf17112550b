"""The keys `keep` and `stop`: which round's adapter a run ends with, and when it need not go on."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from fedlora.scenario.section import PositiveInt, Section

KEPT = ("in a word", "by a figure")  # what pydantic calls the branches of `keep`; no keys


class Best(Section):
    """Keep the adapter of the best round, by a figure that you name.

    Attributes:
        best: Figure that chooses the round: loss, the task's metric, exact_match, or one of `metrics`. Example:
            `loss`.
    """

    best: Annotated[str, Field(min_length=1)]


Keep = Annotated[
    Annotated[Literal["last", "best"], Tag(KEPT[0])] | Annotated[Best, Tag(KEPT[1])],
    Discriminator(lambda value: KEPT[isinstance(value, dict | Best)]),
]


class Stop(Section):
    """End a run that stops improving. It is then finished, and does not pay for rounds that it did not train.

    Attributes:
        patience: Evaluations in a row without a better one, after which the run ends. Raise it where figures vary
            from round to round. Example: `3`.
    """

    patience: PositiveInt
