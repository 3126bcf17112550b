"""The sections `privacy` and `secure_aggregation`: what is promised, and what the server may see."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.scenario.section import Float, PositiveFloat, Section

LEAST_DELTA = 1e-13  # that losses on a grid of floats resolve
Way = Literal["flat", "per_layer", "quantile", "automatic"]


class Clip(Section):
    """What becomes of a gradient before it is summed: scaled to `clip_norm` at most, in one of several ways."""

    kind: Way = "flat"  # whole; each tensor by itself; to a bound that moves; always, to about clip_norm
    quantile: Annotated[Float, Field(gt=0, lt=1)] | None = None  # kind quantile: of the norms, 0.5 unless given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind != "quantile" and self.quantile is not None:
            raise PydanticCustomError("target", "quantile goes with kind: quantile")
        return self


def _clip(value: object) -> object:
    """A word stands for a kind; a quantile that is not given is written out."""
    told: object = {"kind": value} if isinstance(value, str) else value
    if isinstance(told, dict) and told.get("kind") == "quantile" and told.get("quantile") is None:
        return {**told, "quantile": 0.5}
    return told


class Privacy(Section):
    """The privacy guarantee asked for; without this section nothing is clipped or noised."""

    epsilon: PositiveFloat | None = None  # the most that a client may spend; the noise is calibrated to it
    noise_multiplier: PositiveFloat | None = None  # set it instead of calibrating
    delta: Annotated[Float, Field(gt=0, lt=1)] = 1.0e-5  # below one over the examples of a client
    clip_norm: PositiveFloat = 1.0  # L2 bound on one example's gradient; with unit client on one client's change
    unit: Literal["example", "client"] = "example"  # what the guarantee protects: each, or all of a client
    clip: Annotated[Clip, BeforeValidator(_clip, json_schema_input_type=Way | Clip)] = (
        Clip()  # a word or a mapping: flat, per_layer, automatic, quantile, {kind: quantile, quantile: 0.7}
    )
    example: "Privacy | None" = (
        None  # unit client: a guarantee for each example as well, by the client's own noise
    )
    accountant: Literal["pld", "prv", "rdp"] = "pld"  # the first is the tightest; all are upper bounds
    share_metrics: bool = False  # let training loss and example counts leave clients, outside of epsilon

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, value: Any) -> Any:
        """What runs of 0.2.0 wrote out where nothing was asked for."""
        if isinstance(value, dict) and "quantile" in value and value["quantile"] is None:
            return {key: given for key, given in value.items() if key != "quantile"}
        return value

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise PydanticCustomError("target", "needs epsilon (a budget) or noise_multiplier")
        if self.delta < LEAST_DELTA and self.accountant != "rdp":
            raise PydanticCustomError(
                "target",
                f"accountant {self.accountant} tells no delta below {LEAST_DELTA:g} apart from none, and delta is "
                f"{self.delta:g}: write accountant: rdp, or a larger delta",
            )
        if self.unit == "example" and self.example is not None:
            raise PydanticCustomError("target", "example goes with unit: client")
        if self.unit == "client" and self.clip.kind not in ("flat", "quantile"):
            raise PydanticCustomError(
                "target",
                f"clip: {self.clip.kind} is for gradients, and unit: client clips whole changes: take flat or "
                "quantile, or write it in privacy.example",
            )
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
