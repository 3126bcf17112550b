"""What clients may spend of their privacy, and what a round costs whom."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlora.adapter import Instruction
from fedlora.client import Client, Setter
from fedlora.client import spends as spent_by
from fedlora.data.store import Dataset
from fedlora.engine import Replies
from fedlora.engine.replies import Report
from fedlora.privacy import grid
from fedlora.privacy.accounting import Event, alike, epsilon, in_sums
from fedlora.privacy.ledger import Holder, Ledger, Own, Paid, Whole
from fedlora.privacy.mechanisms.central import CLIP_NORM, Central
from fedlora.privacy.replay import Drawn, digest, versions
from fedlora.privacy.wording import FROM_SERVER
from fedlora.rounds.progress import Line
from fedlora.scenario import Privacy, Scenario

logger = logging.getLogger(__name__)

Spent = Mapping[Holder, Collection[Paid]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Who may train for the epsilon that is left, and the ledger's lines for who did."""

    scenario: Scenario
    client: Client
    settings: Setter
    data: Dataset
    central: Central | None
    ledger: Ledger
    repeatable: bool = True  # whether a round that runs again draws the same noise

    def within(self, instruction: Instruction, cohort: list[int], attempt: int = 0) -> tuple[list[int], int]:
        """Those of the cohort whose epsilon stays within the budget if they train, and how many do not."""
        round = instruction.round
        paid = self._paid(round, attempt)
        whole, privacy = self.scenario.client_privacy, self.scenario.example_privacy
        if self.central is not None and whole is not None and whole.epsilon is not None:
            event = self._released(self.central, instruction)
            if self._would_pass(None, event, paid, whole):
                return [], self.scenario.clients.total
        if privacy is None or privacy.epsilon is None:
            return cohort, 0
        fits: dict[Any, bool] = {}  # clients that hold equally much and spent the same fare alike

        def may(client: int) -> bool:
            if not (held := self.data.units(client)):  # a site, which counts for itself
                return True
            key = (held, self.ledger.events.get(client), frozenset(paid.get(client, ())))
            if key not in fits:
                spends = spent_by(self.client, held, self.settings(instruction, held))
                fits[key] = not self._would_pass(client, spends, paid, privacy)
            return fits[key]

        allowed = [client for client in cohort if may(client)]
        if resting := sorted(set(cohort) - set(allowed)):
            names = ", ".join(map(str, resting))
            logger.warning(
                "round %d: another round would pass the epsilon of clients %s; they sit out", round, names
            )
        return allowed, len(cohort) - len(allowed)

    def allows(self, instruction: Instruction, client: int) -> bool:
        """Whether a client's epsilon stays within the budget if it trains."""
        return self.within(instruction, [client])[1] == 0

    def event(self, instruction: Instruction, client: int) -> Event | None:
        """What a client spends in a round; None where it protects nothing by itself."""
        held = self.data.units(client)
        return spent_by(self.client, held, self.settings(instruction, held, client))

    def again(self, instruction: Instruction, cohort: Iterable[int]) -> Instruction:
        """An instruction with what noise was drawn for in its round before, where that is run again.

        Where noise is banded, also with the number that each client of the cohort counts its steps from.
        """
        if not self.repeatable:
            return instruction
        round, asked = instruction.round, self.scenario.example_privacy
        before = self.ledger.drawn(round)
        counted = cohort if asked is not None and asked.bands is not None else ()
        drawn: dict[int | None, Drawn] = {}
        for holder in (*before, *(client for client in counted if client not in before)):
            if isinstance(holder, Whole | Own):
                continue  # drawn for with the server's; of no run's ledger
            digests = before.get(holder, ())
            privacy = self.scenario.client_privacy if holder is None else self.scenario.example_privacy
            event = self._next(instruction, holder)
            more = (
                not digests
                or privacy is None
                or privacy.epsilon is None
                or not self._would_pass(holder, event, {}, privacy)
            )
            firsts: tuple[int, ...] = ()
            if event is not None and event.bands > 1:
                firsts = (*self.ledger.firsts(round, holder), self.ledger.paid(holder, event))
            drawn[holder] = Drawn(digests, more, firsts, holder is not None and self._parts)
        return replace(instruction, drawn=drawn) if drawn else instruction

    def spend(self, instruction: Instruction, replies: Replies, attempt: int = 0) -> int:
        """Put the spend on disk before what it bought is used.

        A round that is run again after an interruption draws the same noise over the same inputs: it gives
        the same updates, and costs nothing more. Other inputs have drawn other noise, and cost what they cost. So
        has a round in which clients share the noise of their examples out.

        Returns:
            Which draw of its own noise the server is to add; 0 where it adds none.

        Raises:
            RoundError: it would be a further draw, and there is no epsilon left for it.
        """
        round, paid = instruction.round, self._paid(instruction.round, attempt)
        digest, draw = self._server_draw(instruction, replies)
        for terms, events in self._costs(instruction, replies, draw):
            drawn: dict[Holder, tuple[str, int]] = {r.client: (r.digest, r.draw) for r in replies.reports}
            drawn |= {holder: (digest, draw) for holder in events if not isinstance(holder, int)}
            new = {
                holder: event
                for holder, event in events.items()
                if (event, *drawn.get(holder, ("", 0))) not in paid.get(holder, ())
            }
            self.ledger.spend(round, new, attempt, drawn, **terms)
        return draw

    def spent(self, holder: Holder, privacy: Privacy) -> float:
        """The epsilon that a holder has spent; where noise is shared out, from those who see sums."""
        return epsilon(in_sums(self.ledger.events.get(holder, ())), privacy.delta, privacy.accountant)

    def _would_pass(self, holder: Holder, event: Event | None, paid: Spent, privacy: Privacy) -> bool:
        """Whether a budget's epsilon would be passed by an event, unless one like it is paid already."""
        more = [event] if event and all(event != one for one, *_ in paid.get(holder, ())) else []
        events = [*self.ledger.events.get(holder, ()), *more]
        assert privacy.epsilon is not None
        return epsilon(in_sums(events), privacy.delta, privacy.accountant) > privacy.epsilon * (1 + 1e-9)

    def _paid(self, round: int, attempt: int) -> Spent:
        """What need not be paid again if an attempt at a round runs again, over the same inputs."""
        return self.ledger.spent(round, attempt) if self.repeatable and not self._parts else {}

    @property
    def _parts(self) -> bool:
        """Whether a client's noise is a part of what hides its examples, which no other sum may have."""
        return self.scenario.shares_example_noise is not None

    def _owed(self, report: Report) -> list[Event]:
        """What a client cost that is not in the ledger yet.

        A site keeps a ledger of its own, and says all that it has. So a reply that was lost is made up for. An
        answer that it gives a second time costs nothing more; any other costs its event at least, also where a
        site that lost its ledger says less than it said before.
        """
        now = None if report.again else report.event
        owed: dict[Event, int] = {}  # steps by terms, which are an event without any
        for event in (*(report.spent or ()), *([now] if now else ())):
            terms = replace(event, steps=0)
            told = alike(report.spent or (), terms) - self.ledger.paid(report.client, terms)
            least = now.steps if now is not None and terms == replace(now, steps=0) else 0
            owed[terms] = max(told, least)
        return [replace(terms, steps=steps) for terms, steps in owed.items() if steps > 0]

    def _next(self, instruction: Instruction, holder: int | None) -> Event | None:
        """What another draw in this round would cost."""
        if holder is not None:
            return self.event(instruction, holder)
        assert self.central is not None
        return self._released(self.central, instruction, draw=1)

    def _released(self, central: Central, instruction: Instruction, draw: int = 0) -> Event:
        """What the server's release in this round costs.

        Groups take turns from one round to the next, on the same terms: then T rounds are ceil(T / b) turns of any
        group. A round that goes on from another, or from rounds on other terms in between, is a turn by itself.
        """
        event, last = central.event(instruction.config[CLIP_NORM], draw), self.ledger.released
        if event.bands == 1 or last is None:
            return event
        if instruction.round <= last[0]:  # over again: of a repeatable one the noise is the same
            return event if self.repeatable else central.event(instruction.config[CLIP_NORM], again=True)
        gap = last[1] != event and self.ledger.paid(None, event) > 0
        return central.event(instruction.config[CLIP_NORM], again=gap)

    def _server_draw(self, instruction: Instruction, replies: Replies) -> tuple[str, int]:
        """The digest of what the server's noise hides, and which draw of it that takes."""
        if self.central is None or not self.repeatable:
            return "", 0
        told = (instruction.round, dict(instruction.adapter), instruction.send, dict(instruction.config))
        sums = replies.digest or [(u.adapter, u.weight, u.clients, dict(u.metrics)) for u in replies.updates]
        made = digest(self.scenario.seed, "sum", versions(), self.central.terms, told, sums)
        return made, instruction.drawn.get(None, Drawn()).draw(made)

    def _costs(
        self, instruction: Instruction, replies: Replies, draw: int
    ) -> Iterator[tuple[Line, Mapping[Holder, Event]]]:
        """What a round costs whom, and on which terms, for each guarantee."""
        if self.scenario.example_privacy is not None:
            owed = {report.client: self._owed(report) for report in replies.reports}
            for turn in range(max(map(len, owed.values()), default=0)):
                yield (
                    self.scenario.example_terms,
                    {c: events[turn] for c, events in owed.items() if len(events) > turn},
                )
        if self.central is None or (whole := self.scenario.client_privacy) is None:
            return
        bound = instruction.config[CLIP_NORM]
        yield whole.terms, {None: self._released(self.central, instruction, draw)}
        asked = self.scenario.secure_aggregation
        if asked is not None and asked.noise == "shared":
            longer = grid.rounding(sum(instruction.adapter[n].size for n in instruction.send), asked.range)
            for update in replies.updates:
                seen = self.central.seen(bound, asked.honest * replies.carried, longer)
                shared = {"unit": FROM_SERVER, "honest": asked.honest}
                yield whole.terms | shared, {Whole(client): seen for client in update.clients}
