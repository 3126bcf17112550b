"""The section `compression`: what travels in fewer bytes."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.scenario.section import Float, Section


class Rounded(Section):
    """Numbers of fewer bits, rounded up or down at random so that the mean is right.

    Attributes:
        kind: Number format: 2 bytes a number for fp16 and bf16, about 1 for int8 and 1/2 for int4.
    """

    kind: Literal["fp16", "bf16", "int8", "int4"]


class TopK(Section):
    """The largest numbers of each tensor. A client keeps the rest, and adds it to what it sends next.

    Attributes:
        kind: top_k: only the largest numbers are sent.
        share: Share of the numbers that is sent, each in 8 bytes. Lower it for fewer bytes and slower learning.
    """

    kind: Literal["top_k"]
    share: Annotated[Float, Field(ge=0.001, le=1)] = 0.1


class Masked(Section):
    """Numbers of each tensor that are drawn from the seed, times one over their share, so that the mean is right.

    Attributes:
        kind: mask: numbers that are drawn from the seed, others in each round.
        share: Share of the numbers that is sent, each in 4 bytes. Lower it for fewer bytes; a change then arrives
            about `sqrt(1 / share)` times as long.
    """

    kind: Literal["mask"]
    share: Annotated[Float, Field(ge=0.001, le=1)] = 0.5


Packed = Annotated[Rounded | TopK | Masked, Field(discriminator="kind")]


class Compression(Section):
    """What is sent in fewer bytes. Clients send their change, noise included; the server's own tensors stay exact.

    Attributes:
        up: Format of what clients send. null: 4 bytes a number. Compare with a run without it to see what it
            costs. Example: `{kind: int8}`.
        down: Format of what the server sends. null: 4 bytes a number. All clients share its rounding, so prefer
            fp16. Example: `{kind: fp16}`.
    """

    up: Packed | None = None
    down: Rounded | None = None
