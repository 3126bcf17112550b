"""The keys `keep` and `stop`: which round's adapter a run ends with, and when it need not go on."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from fedlora.scenario.section import PositiveInt, Section

KEPT = ("in a word", "by a figure")  # what pydantic calls the branches of `keep`; no keys


class Best(Section):
    """Keep the best round's adapter by a figure of one's choice."""

    best: Annotated[str, Field(min_length=1)]  # loss, the task's metric such as accuracy, or exact_match


Keep = Annotated[
    Annotated[Literal["last", "best"], Tag(KEPT[0])] | Annotated[Best, Tag(KEPT[1])],
    Discriminator(lambda value: KEPT[isinstance(value, dict | Best)]),
]


class Stop(Section):
    """End a run that gets no better; it is finished then, and what it does not train it does not pay."""

    patience: PositiveInt  # evaluations in a row without a better one, by keep's figure or the task's metric
