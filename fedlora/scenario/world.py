"""The section `world`: devices on a virtual clock, and when they are there."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.scenario.section import Float, PositiveFloat, PositiveInt, Section


class Diurnal(Section):
    """Each client is available or not for an hour at a time, with a probability that follows the time of day.

    Attributes:
        kind: diurnal: availability follows the time of day.
        low: Probability that a client is available at the worst hour.
        high: Probability that a client is available at the best hour.
        peak_hour: The best hour of the day; a run begins at midnight.
    """

    kind: Literal["diurnal"]
    low: Annotated[Float, Field(ge=0, le=1)] = 0.05
    high: Annotated[Float, Field(gt=0, le=1)] = 0.5
    peak_hour: Annotated[Float, Field(ge=0, lt=24)] = 2.0


class Markov(Section):
    """Clients come and go independently; their times are exponentially distributed.

    Attributes:
        kind: markov: clients come and go at random.
        on: Mean seconds for which a client stays available.
        off: Mean seconds for which a client is away.
    """

    kind: Literal["markov"]
    on: PositiveFloat = 1800.0
    off: PositiveFloat = 5400.0


class Trace(Section):
    """Times of availability, read from a csv file.

    Attributes:
        kind: trace: availability is read from a file.
        file: A csv with the columns client, start and end in seconds, one row for each stay. Example: `trace.csv`.
        period: Seconds after which the trace repeats. null: at its last end. Example: `86400`.
    """

    kind: Literal["trace"]
    file: str
    period: PositiveFloat | None = None


Availability = Annotated[Diurnal | Markov | Trace, Field(discriminator="kind")]


class World(Section):
    """Devices on a virtual clock: how long rounds would take, and which clients are late or away.

    Attributes:
        deadline: Virtual seconds of a client for a round; later updates are lost. null: the round waits for all.
            Example: `300`.
        over_select: Clients asked for each client needed; the first to reply count. Raise it where many drop out.
        partial_work: Whether slow clients send the local steps that they manage by the deadline.
        dropout: Probability that a client vanishes during a round.
        spread: Standard deviation of the logarithm of a device's speed, from round to round.
        availability: When clients can be asked. null: always. Example: `{kind: diurnal}`.
        concurrency: Clients that train at the same time without waiting for rounds (FedBuff); each `per_round`
            updates make the next adapter. null: synchronous rounds. Example: `16`.
    """

    deadline: PositiveFloat | None = None
    over_select: Annotated[Float, Field(ge=1)] = 1.0
    partial_work: bool = False
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    spread: Annotated[Float, Field(ge=0)] = 0.0
    availability: Availability | None = None
    concurrency: PositiveInt | None = None
