"""The exchanges of a masked sum with sites: what each is asked, and what became of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import RecordDict

from fedlora import traffic, wire
from fedlora.engine.replies import Report
from fedlora.engine.roster import Roster, Site
from fedlora.errors import ContractError
from fedlora.privacy import collector, secure
from fedlora.privacy.accounting import Event

Told = Mapping[int, secure.Parts]  # what clients are told in an exchange


def members_of(told: Told) -> int:
    """How many clients are asked for a vector, as those are told who are."""
    return max(n for parts in told.values() for n in parts["members"])


@dataclass
class Exchanging:
    """A `fedlora.privacy.secure.Exchange` over a roster; of the four the third asks for a vector.

    Attributes:
        roster: of the sites.
        reports: of each client, which are kept up to date.
        words: of every message: the run, and the round.
        kind: of the third message.
        size: numbers of a vector.
        content: of the third message to a client, by what all are told.
        spends: what the third may cost a site that does not answer, by what all are told.
        read: of an answer to the third that may be a refusal, what it says was paid.
        took: of an answer to the third that is whole, what becomes of its report.
    """

    roster: Roster
    reports: dict[int, Report]
    words: Mapping[str, Any]
    kind: str
    size: int
    content: Callable[[int, Told], RecordDict]
    spends: Callable[[Site, Told], Event | None]
    took: Callable[[Site, Report, RecordDict, Told], Report]
    read: Callable[[Report, RecordDict], Report] = lambda report, content: report

    def __call__(self, what: str, told: Told) -> dict[int, secure.Parts]:
        """Ask clients, and give the answers that are whole."""
        third, sites = what == secure.MASKED, self.roster.sites
        contents = {
            client: RecordDict(
                {
                    **(self.content(client, told) if third else wire.pack_words(self.words)),
                    **wire.pack_parts(parts),
                }
            )
            for client, parts in told.items()
            if client in sites
        }
        made: dict[int, secure.Parts] = {}
        began = time.monotonic()
        answers = self.roster.ask(self.kind if third else f"query.{what}", contents)
        for client, content in contents.items():
            reply, seconds = answers.get(client, (None, time.monotonic() - began))
            report, site = self.reports[client], sites[client]
            report = replace(
                report,
                seconds=report.seconds + seconds,
                bytes_down=report.bytes_down + traffic.content_bytes(content),
                event=self.spends(site, told) if third else report.event,
            )
            try:
                if reply is None:
                    raise ContractError(f"no reply within {self.roster.deadline:g} s")
                if reply.has_error():
                    raise ContractError(reply.error.reason)
                report = replace(report, bytes_up=report.bytes_up + traffic.content_bytes(reply.content))
                if third:
                    report = self.read(report, reply.content)
                if refused := wire.unpack_words(reply.content).get("refused"):
                    report = replace(report, event=wire.unpack_event(reply.content) or self.reports[client].event)
                    self.roster.forget(site, str(refused))
                    raise ContractError(str(refused))
                parts = wire.unpack_parts(reply.content)
                collector.check(what, told[client], parts, self.size)
                if third:
                    spent = wire.unpack_event(reply.content)
                    report = self.took(site, replace(report, event=spent or report.event), reply.content, told)
                made[client] = parts
            except ContractError as error:
                report = replace(report, error=str(error))
            self.reports[client] = report
        return made
