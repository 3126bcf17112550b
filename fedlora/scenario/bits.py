"""The key `model.quantize`: in how few bits frozen layers are held."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from fedlora.scenario.section import Float, Section

QUANTIZE = ("alike", "by layer")  # what pydantic calls the branches of `quantize`; no keys


class Bits(Section):
    """Frozen linear layers in 4 or 8 bits each, so that rounding loses least in the memory that there is.

    Attributes:
        bits: Bits of a number in the mean over these layers, from 4.25, nearly all in 4, to 9, all in 8. Lower it
            where memory runs out. Example: `5`.
        start: lq: the adapter begins with what rounding its layers lost, as far as its rank holds that. null: it
            begins with no change.
    """

    bits: Annotated[Float, Field(ge=4.25, le=9)]
    start: Literal["lq"] | None = None


Quantize = Annotated[
    Annotated[Literal["8bit", "4bit"], Tag(QUANTIZE[0])] | Annotated[Bits, Tag(QUANTIZE[1])],
    Discriminator(lambda value: QUANTIZE[isinstance(value, dict | Bits)]),
]
