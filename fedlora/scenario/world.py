"""The section `world`: devices on a virtual clock, and when they are there."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.scenario.section import Float, PositiveFloat, PositiveInt, Section


class Diurnal(Section):
    """Clients are there by the hour, each by a coin of its own whose chance follows the time of day."""

    kind: Literal["diurnal"]
    low: Annotated[Float, Field(ge=0, le=1)] = 0.05  # the chance at the worst hour
    high: Annotated[Float, Field(gt=0, le=1)] = 0.5  # and at the best: phones that charge at night
    peak_hour: Annotated[Float, Field(ge=0, lt=24)] = 2.0  # the best hour; a run begins at midnight


class Markov(Section):
    """Clients come and go, each by itself, for times that are exponential."""

    kind: Literal["markov"]
    on: PositiveFloat = 1800.0  # seconds that one stays, on average
    off: PositiveFloat = 5400.0  # seconds that one is away, on average


class Trace(Section):
    """When clients are there, from a csv file with the columns client, start and end, a row for each stay."""

    kind: Literal["trace"]
    file: str
    period: PositiveFloat | None = None  # seconds after which the trace begins again; null: its last end


Availability = Annotated[Diurnal | Markov | Trace, Field(discriminator="kind")]


class World(Section):
    """Devices on a virtual clock: how long rounds would take, who is late, who is not there (docs: Devices)."""

    deadline: PositiveFloat | None = None  # virtual seconds that a client has; a round ends then without it
    over_select: Annotated[Float, Field(ge=1)] = (
        1.0  # asked for each client needed; the first count, the rest is lost
    )
    partial_work: bool = False  # let slow clients send the local steps that they manage by the deadline
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0  # the chance that a client vanishes in the middle
    spread: Annotated[Float, Field(ge=0)] = 0.0  # of a device's speed from round to round: sigma of its logarithm
    availability: Availability | None = None  # null: always
    concurrency: PositiveInt | None = (
        None  # clients under way at once, each per_round updates make a new adapter (FedBuff); null: in step
    )
