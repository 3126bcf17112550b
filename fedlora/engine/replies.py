"""What comes back from the clients of a round: updates, and what became of each client."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Update
from fedlora.privacy.accounting import Event

Sums = dict[str, NDArray[np.float64]]  # of a statistic: symmetric (in, in), or (in,)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one client in one round.

    Attributes:
        client: its id.
        num_examples: that it holds.
        steps: that it took; 0 where it failed.
        bytes_up, bytes_down: of its messages as Flower serialises them.
        seconds: that it took.
        event: the privacy event that it cost, also where it failed after it may have trained.
        spent: all that it paid in the run, as its own ledger has it; None where it keeps none.
        again: whether it gave an answer that it had given, and paid for, before.
        digest: of all that made its update (`fedlora.privacy.replay`); empty where its noise is never drawn again.
        draw: which draw of its noise that update carries.
        error: why it failed; None if it did not.
        metrics: figures that it shares.
        virtual_seconds: that its way took in a simulated world; None elsewhere.
        late: whether that world, and no fault, is why its update is not used.
    """

    client: int
    num_examples: int = 0
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    event: Event | None = None
    spent: tuple[Event, ...] | None = None
    again: bool = False
    digest: str = ""
    draw: int = 0
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    virtual_seconds: float | None = None
    late: bool = False

    def then(self, later: "Report | None") -> "Report":
        """This report with the bytes, the seconds and the error of a later trip added."""
        if later is None:
            return self
        return replace(
            self,
            bytes_up=self.bytes_up + later.bytes_up,
            bytes_down=self.bytes_down + later.bytes_down,
            seconds=self.seconds + later.seconds,
            error=later.error,
            virtual_seconds=later.virtual_seconds,
            late=later.late,
        )


@dataclass(frozen=True)
class Replies:
    """The outcome of a round or a part of it.

    Attributes:
        updates: sorted by client.
        reports: one for each client.
        digest: of all that made a sum that clients' shares of the noise are in; empty elsewhere.
        carried: the part of the noise's variance that those shares are.
        draw: which draw of its own noise the server is to add (`fedlora.privacy.replay`).
    """

    updates: list[Update]
    reports: list[Report]
    digest: str = ""
    carried: float = 0.0
    draw: int = 0

    def then(self, later: "Replies") -> "Replies":
        """A round's replies after a further trip: its updates, and reports of both trips."""
        again = {report.client: report for report in later.reports}
        reports = [report.then(again.get(report.client)) for report in self.reports]
        return replace(self, updates=later.updates, reports=reports)


@dataclass
class Deed:
    """What a client's training costs, once it has begun; all at rest where it has not.

    Attributes:
        event: that it was or will be paid for.
        steps: that it takes.
        digest: of all that makes its update (`fedlora.privacy.replay`).
        draw: which draw of its noise it takes.
    """

    event: Event | None = None
    steps: int = 0
    digest: str = ""
    draw: int = 0


@dataclass(frozen=True, kw_only=True)
class Said:
    """What became of a client that was asked for its statistic.

    Attributes:
        client: its id.
        units: examples, or persons, that those hold whose sums these are.
        sums: with noise, by name; None where it gave none. Under masks one client has those of all who sent.
        clients: whose sums these are.
        deviation: of the noise in them.
        event: that it spent, if the server's ledger is to say so.
        again: whether it answered as before, and spent it then.
        bytes_up: of its answer.
    """

    client: int
    units: int = 0
    sums: Sums | None = None
    clients: int = 1
    deviation: float = 0.0
    event: Event | None = None
    again: bool = False
    bytes_up: int = 0
