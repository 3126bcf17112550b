"""What a server makes of the sites' answers when it has asked them for a statistic of their rows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Message, RecordDict

from fedlora import prepare, traffic, wire, wire_base
from fedlora.engine import summed
from fedlora.engine.exchanging import Exchanging, Told, members_of
from fedlora.engine.replies import Report, Said, Sums
from fedlora.engine.roster import Roster, Site, shown
from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.statistic import numbers
from fedlora.privacy.noise import Stream
from fedlora.scenario import Scenario

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
            try:
                check_paid(event, self.event)
            except ContractError:
                event = event or self.event
                raise
            sums = wire_base.unpack_statistic(content, self.shapes)
            self._check(sums, units)
        except ContractError as error:
            return self.failed(client, str(error), event, size)
        again = words.get("again") is True
        noise = 0.0 if event is None else event.noise_multiplier
        return Said(
            client=client, units=units, sums=sums, deviation=noise, event=event, again=again, bytes_up=size
        )

    def failed(self, client: int, why: str, event: Event | None, size: int = 0) -> Said:
        """That a site gave no statistic; it is left out of the sum.

        Args:
            client: which one it is.
            why: in words that the submitter may read.
            event: that it may have paid.
            size: bytes of its answer.
        """
        self.roster.note(without(self.roster, client, why))
        return Said(client=client, event=event, bytes_up=size)

    def _check(self, sums: Sums, units: int) -> None:
        """Make sure that a sum is no longer than as many rows and the noise can make it.

        Raises:
            ContractError: it is.
        """
        noise = 0.0 if self.event is None else self.event.noise_multiplier
        most = units + _SPREAD * noise * math.sqrt(sum(map(numbers, self.shapes.values()))) + 10 * noise
        if (long := math.sqrt(sum(float(np.square(values).sum()) for values in sums.values()))) > most:
            raise ContractError(f"its sum is {long:.3g} long, and {units} rows make it {most:.3g} at most")


def check_paid(event: Event | None, mine: Event | None) -> None:
    """Make sure that a site paid what the run asks for; another machine may find the noise but for its last bits.

    Raises:
        ContractError: it paid something else, or nothing.
    """
    if event is not None and mine is not None:
        close = math.isclose(event.noise_multiplier, mine.noise_multiplier, rel_tol=1e-6)
        if close and replace(event, noise_multiplier=mine.noise_multiplier) == mine:
            return
    elif event is mine:
        return
    raise ContractError("its noise is not what the run asks for")


def without(roster: Roster, client: int, why: str) -> str:
    """What the submitter reads of a site that gave no statistic."""
    return shown(f"{roster.sites.get(client) or f'client {client}'} gave no statistic: {why}")


def masked(
    scenario: Scenario, run: str, roster: Roster, reports: dict[int, Report], shapes: summed.Shapes
) -> Iterator[Said]:
    """Ask sites for the statistic under masks, in a round 0 of which the server learns the sum alone.

    Args:
        scenario: with `secure_aggregation`.
        run: its key.
        roster: of the sites.
        reports: of those that are asked.
        shapes: of the sums, by name.

    Raises:
        RoundError: too few sites gave it; it comes last, as what sites paid counts all the same.
        SettingError: the noise that they share out is too little for the grid.
    """
    asked, most = scenario.secure_aggregation, summed.no_fewer(max(r.num_examples for r in reports.values()))
    assert asked is not None
    words = {"run": run, "round": 0}

    def span(members: int) -> summed.Span:
        return summed.Span(most, shapes, prepare.statistic(scenario, members=members))

    def took(site: Site, report: Report, content: RecordDict, told: Told) -> Report:
        check_paid(report.event, span(members_of(told)).event)
        return replace(report, again=wire.unpack_words(content).get("again") is True)

    span(len(reports)).check_grid()
    exchange = Exchanging(
        roster=roster,
        reports=reports,
        words=words,
        kind=f"query.{wire_base.STATISTIC}",
        size=summed.size(shapes),
        content=lambda client, told: wire.pack_words({**words, summed.UNITS: most}),
        spends=lambda site, told: span(members_of(told)).event,
        took=took,
    )
    for one in summed.said(exchange, reports, asked, Stream.fresh(), span):
        if why := reports[one.client].error:
            roster.note(without(roster, one.client, why))
        yield one
