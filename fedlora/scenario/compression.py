"""The section `compression`: what travels in fewer bytes."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.scenario.section import Float, Section


class Rounded(Section):
    """Numbers of fewer bits, rounded up or down by chance so that the mean is right."""

    kind: Literal["fp16", "bf16", "int8", "int4"]  # 2, 2, 1 and 1/2 bytes a number, where plain ones take 4


class TopK(Section):
    """The largest numbers of each tensor; a client keeps what it left out, and adds it to what it sends next."""

    kind: Literal["top_k"]
    share: Annotated[Float, Field(ge=0.001, le=1)] = 0.1  # of the numbers; each takes 8 bytes


Packed = Annotated[Rounded | TopK, Field(discriminator="kind")]


class Compression(Section):
    """What travels in fewer bytes; clients send their change, noise included, and the server's own stays exact."""

    up: Packed | None = None  # int8 is a quarter of the bytes; judge its cost by a run without
    down: Rounded | None = None  # the adapter itself, whose rounding all clients share: prefer fp16 to fewer bits
