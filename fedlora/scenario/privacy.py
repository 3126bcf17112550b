"""The sections `privacy` and `secure_aggregation`: what is promised, and what the server may see."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.scenario.section import Float, Int, PositiveFloat, PositiveInt, Scale, Section

LEAST_DELTA = 1e-13  # that losses on a grid of floats resolve
MOST_BANDS = 1024  # beyond, groups are small and the past is long
Bands = PositiveInt | Literal["auto"] | None
Way = Literal["flat", "per_layer", "quantile", "automatic"]


def unresolved_delta(delta: float, accountant: str) -> str | None:
    """What is wrong where an accountant tells no such delta; None where it does."""
    if delta >= LEAST_DELTA or accountant == "rdp":
        return None
    return (
        f"accountant {accountant} tells no delta below {LEAST_DELTA:g} apart from none, and delta is {delta:g}: "
        "write accountant: rdp, or a larger delta"
    )


class Clip(Section):
    """How a gradient is bounded before it is summed: it is scaled to a norm of at most `clip_norm`.

    Attributes:
        kind: How a gradient is clipped. flat: as a whole. per_layer: each tensor by itself. quantile: to a bound
            that adapts. automatic: always scaled to about `clip_norm`, which then needs no tuning.
        quantile: Quantile of the norms that the bound follows, for kind quantile. null: 0.5 for that kind, none
            for others. Example: `0.7`.
    """

    kind: Way = "flat"
    quantile: Annotated[Float, Field(gt=0, lt=1)] | None = None

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


def _bands(value: object) -> object:
    """One line for what is neither."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or value == "auto" or (whole and 1 <= value <= MOST_BANDS):  # type: ignore[operator]
        return value
    raise PydanticCustomError("bands", f"should be auto, or a whole number from 1 to {MOST_BANDS}")


class Privacy(Section):
    """The guarantee of differential privacy; without this section nothing is clipped or noised.

    Attributes:
        epsilon: Most epsilon that a client may spend in the run; noise is calibrated to it. null:
            `noise_multiplier` sets the noise. Lower it for more privacy. Example: `6`.
        noise_multiplier: Standard deviation of the noise divided by `clip_norm`. null: calibrated to `epsilon`.
            Set it to fix the noise itself. Example: `1.0`.
        delta: Small probability that is allowed on top of epsilon. Keep it below 1 / examples of a client, or with
            `unit: client` 1 / clients.
        clip_norm: Largest L2 norm of one example's gradient, or with `unit: client` of one client's change. The
            noise grows with it.
        unit: What is protected: each example, or all that a client holds.
        clip: How gradients are clipped: a word, or a mapping with options. With `unit: client` flat or quantile.
            Example: `{kind: quantile, quantile: 0.7}`.
        bands: Number of steps over which noise is correlated, or with `unit: client` of rounds. Later noise then
            cancels a part of earlier noise. auto: the number with the least noise, for each client. null: 1,
            independent noise. It helps where a client passes over its rows few times, or is in few rounds.
            Example: `auto`.
        person: Column that says which person a row is of. All rows of a person are then protected together, and
            not each by itself. null: each row stands for itself. Set it where a person may have several rows.
            Example: `patient_id`.
        rows_per_person: Most rows of a person that a step takes, with `person`. null: all of them. Set it where
            some have very many. Example: `4`.
        reserve: Rounds beyond `rounds` for which `epsilon` leaves room. A round that is paid for and lost can then
            run again. 0: only as it was. Set it for long runs at sites. Example: `2`.
        example: With `unit: client`: a guarantee for each example as well, by the client's own noise. null: none.
            Example: `{epsilon: 8, delta: 1.0e-5}`.
        accountant: How events become epsilon. All three are upper bounds; pld is the tightest.
        share_metrics: Whether training losses and numbers of examples leave clients. Epsilon does not cover them.
    """

    epsilon: PositiveFloat | None = None
    noise_multiplier: PositiveFloat | None = None
    delta: Annotated[Float, Field(gt=0, lt=1)] = 1.0e-5
    clip_norm: Scale = 1.0
    unit: Literal["example", "client"] = "example"
    clip: Annotated[Clip, BeforeValidator(_clip, json_schema_input_type=Way | Clip)] = Clip()
    bands: Annotated[
        PositiveInt | Literal["auto"] | None, BeforeValidator(_bands, json_schema_input_type=Bands)
    ] = None
    person: Annotated[str, Field(min_length=1)] | None = None
    rows_per_person: PositiveInt | None = None
    reserve: Annotated[Int, Field(ge=0)] = 0
    example: "Privacy | None" = None
    accountant: Literal["pld", "prv", "rdp"] = "pld"
    share_metrics: bool = False

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
        if wrong := unresolved_delta(self.delta, self.accountant):
            raise PydanticCustomError("target", "{wrong}", {"wrong": wrong})
        if self.unit == "example" and self.example is not None:
            raise PydanticCustomError("target", "example goes with unit: client")
        if self.unit == "client" and self.person is not None:
            raise PydanticCustomError("target", "person goes with unit: example, or into privacy.example")
        if self.person is None and self.rows_per_person is not None:
            raise PydanticCustomError(
                "target", "rows_per_person goes with person: name the column that tells them"
            )
        if self.reserve and (self.epsilon is None or self.noise_multiplier is not None):
            raise PydanticCustomError("target", "reserve is for noise that is calibrated: name epsilon alone")
        if self.bands is not None and self.clip.kind == "quantile":
            raise PydanticCustomError(
                "target",
                "bands take a fixed bound, and clip: quantile moves it: write clip: flat, or leave bands out",
            )
        if self.bands == "auto" and self.noise_multiplier is not None:
            raise PydanticCustomError(
                "target",
                "bands: auto is for noise that is calibrated: leave noise_multiplier out, or name a number",
            )
        if self.unit == "client" and self.clip.kind not in ("flat", "quantile"):
            raise PydanticCustomError(
                "target",
                f"clip: {self.clip.kind} is for gradients, and unit: client clips whole changes: take flat or "
                "quantile, or write it in privacy.example",
            )
        if self.example is not None and self.example.unit != "example":
            raise PydanticCustomError("target", "example holds a guarantee of unit: example")
        return self

    @property
    def protects(self) -> Literal["example", "person", "client"]:
        """Whom epsilon is for: with a column of persons, each person."""
        return self.unit if self.person is None else "person"

    @property
    def terms(self) -> dict[str, Any]:
        """What each line of a ledger repeats of it."""
        told: dict[str, Any] = {"delta": self.delta, "unit": self.protects, "accountant": self.accountant}
        return told if self.person is None else {**told, "person": self.person}


class SecureAggregation(Section):
    """Clients mask what they send, and the server learns only the sum. All clients weigh alike.

    Attributes:
        range: Largest change of a number. A larger one fails its client, or is cut with `unit: client`. Lower it
            for finer rounding.
        survivors: Share of a round's clients that must not drop out. Below it the round fails.
        noise: Who adds noise. server: with `unit: client` the server, and with `unit: example` each client all of
            it. shared: each client a part before it masks; with `unit: example` that takes one local step a round.
        honest: Share of the senders that keep their noise from the server, with `noise: shared`. Lower it to allow
            for more clients that collude.
    """

    range: Scale = 1.0
    survivors: Annotated[Float, Field(ge=0.66, le=1)] = 0.66
    noise: Literal["server", "shared"] = "server"
    honest: Annotated[Float, Field(gt=0, le=1)] = 1.0
