"""The sections `privacy` and `secure_aggregation`: what is promised, and what the server may see."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.scenario.section import Float, PositiveFloat, Section


class Privacy(Section):
    """The privacy guarantee asked for; without this section nothing is clipped or noised."""

    epsilon: PositiveFloat | None = None  # the most that a client may spend; the noise is calibrated to it
    noise_multiplier: PositiveFloat | None = None  # set it instead of calibrating
    delta: Annotated[Float, Field(gt=0, lt=1)]
    clip_norm: PositiveFloat = 1.0  # L2 bound on one example's gradient; with unit client on one client's change
    unit: Literal["example", "client"] = "example"  # what the guarantee protects: each, or all of a client
    quantile: Annotated[Float, Field(gt=0, lt=1)] | None = (
        None  # unit client: of the norms, clip_norm adapts to it
    )
    example: "Privacy | None" = (
        None  # unit client: a guarantee for each example as well, by the client's own noise
    )
    accountant: Literal["pld", "prv", "rdp"] = "pld"  # the first is the tightest; all are upper bounds
    share_metrics: bool = False  # let training loss and example counts leave clients, outside of epsilon

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise PydanticCustomError("target", "needs epsilon (a budget) or noise_multiplier")
        if self.unit == "example" and (self.quantile is not None or self.example is not None):
            raise PydanticCustomError("target", "quantile and example go with unit: client")
        if self.example is not None and self.example.unit != "example":
            raise PydanticCustomError("target", "example holds a guarantee of unit: example")
        return self


class SecureAggregation(Section):
    """Clients mask what they send, and the server learns only its sum; they weigh alike."""

    range: PositiveFloat = 1.0  # of a number's change; one beyond fails its client, or is cut under unit client
    survivors: Annotated[Float, Field(ge=0.66, le=1)] = 0.66  # share of the clients that must not drop out
    noise: Literal["server", "shared"] = "server"  # shared: unit client, each adds its share before it masks
    honest: Annotated[Float, Field(gt=0, le=1)] = (
        1.0  # share of those who send that keep their noise to themselves
    )
