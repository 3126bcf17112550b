"""What a server makes of the sites' answers when it has asked them for a statistic of their rows."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Message

from fedlora import traffic, wire, wire_base
from fedlora.engine.replies import Said, Sums
from fedlora.engine.roster import Roster, shown
from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.statistic import numbers

_SPREAD = 1.5  # times the length that noise has, beyond which a sum is none of an honest site


class Asked:
    """Reads answers; a site is not believed more than its rows and its noise can add up to."""

    def __init__(self, event: Event | None, shapes: Mapping[str, tuple[int, ...]], roster: Roster) -> None:
        """Of one question.

        Args:
            event: that it costs each site.
            shapes: of the sums, by name.
            roster: of the sites.
        """
        self.event, self.shapes, self.roster = event, shapes, roster

    def said(self, client: int, units: int, reply: Message) -> Said:
        """What became of a site.

        Args:
            client: which one it is.
            units: examples, or persons, that it holds.
            reply: that came in time.
        """
        if reply.has_error():
            return self.failed(client, str(reply.error.reason), self.event)
        content, event, size = reply.content, self.event, traffic.content_bytes(reply.content)
        try:
            words, event = wire.unpack_words(content), wire.unpack_event(content)
            if refused := words.get("refused"):
                return self.failed(client, str(refused), event, size)
            if not self._as_asked(event):
                event = event or self.event
                raise ContractError("its noise is not what the run asks for")
            sums = wire_base.unpack_statistic(content, self.shapes)
            self._check(sums, units)
        except ContractError as error:
            return self.failed(client, str(error), event, size)
        again = words.get("again") is True
        return Said(client=client, units=units, sums=sums, event=event, again=again, bytes_up=size)

    def failed(self, client: int, why: str, event: Event | None, size: int = 0) -> Said:
        """That a site gave no statistic; it is left out of the sum.

        Args:
            client: which one it is.
            why: in words that the submitter may read.
            event: that it may have paid.
            size: bytes of its answer.
        """
        self.roster.note(shown(f"{self.roster.sites.get(client) or f'client {client}'} gave no statistic: {why}"))
        return Said(client=client, event=event, bytes_up=size)

    def _as_asked(self, event: Event | None) -> bool:
        """Whether a site paid what the run asks for; another machine may find the noise but for its last bits."""
        mine = self.event
        if event is None or mine is None:
            return event is mine
        close = math.isclose(event.noise_multiplier, mine.noise_multiplier, rel_tol=1e-6)
        return close and replace(event, noise_multiplier=mine.noise_multiplier) == mine

    def _check(self, sums: Sums, units: int) -> None:
        """Make sure that a sum is no longer than as many rows and the noise can make it.

        Raises:
            ContractError: it is.
        """
        noise = 0.0 if self.event is None else self.event.noise_multiplier
        most = units + _SPREAD * noise * math.sqrt(sum(map(numbers, self.shapes.values()))) + 10 * noise
        if (long := math.sqrt(sum(float(np.square(values).sum()) for values in sums.values()))) > most:
            raise ContractError(f"its sum is {long:.3g} long, and {units} rows make it {most:.3g} at most")
