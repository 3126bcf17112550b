"""The key `model.head`: what becomes of a model's last layer."""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from fedlora.scenario.section import PositiveInt, Section

HEADS = ("whole", "of low rank")  # what pydantic calls the branches of `head`; no keys


class NarrowHead(Section):
    """A last layer of low rank, for long lists of labels: fewer bytes, and less noise under privacy.

    Attributes:
        rank: Numbers by which all labels are told apart, fewer than the width of the model. Raise it where labels
            are not told apart. Example: `16`.
    """

    rank: PositiveInt


Head = Annotated[
    Annotated[Literal["trained", "frozen", "kept"], Tag(HEADS[0])] | Annotated[NarrowHead, Tag(HEADS[1])],
    Discriminator(lambda value: HEADS[isinstance(value, dict | NarrowHead)]),
]
