"""Clients at sites: SuperNodes of a Flower federation, each with data of its own.

The server holds a worker for the first adapter, evaluation and export. A site introduces itself once (which
client it is, its versions, its base model), and then gets a message for each round. A round ends when all
that were asked have answered, or at its deadline.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedlora import traffic, wire, wire_base
from fedlora.adapter import Adapter, Change, Instruction, Sum, Update
from fedlora.engine import secure as masking
from fedlora.engine.asked import Asked, masked
from fedlora.engine.base import Engine, Figures, chunks, gathered
from fedlora.engine.exchanging import Exchanging, Told, members_of
from fedlora.engine.inline import InlineEngine
from fedlora.engine.replies import Replies, Report, Said
from fedlora.engine.roster import Roster, Site, shown
from fedlora.engine.setup import Description, Setup
from fedlora.engine.turns import Reply, in_turn
from fedlora.errors import ContractError, FedloraError, RoundError
from fedlora.privacy import accounting, affordable
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import central, shared
from fedlora.privacy.noise import Stream
from fedlora.tasks import smaller

DEADLINE = 600.0  # seconds that a round waits for its sites, unless the scenario says
LAST = 60.0  # seconds that a run waits at its end for its sites to take the adapter
JOIN = 300.0  # seconds that a run waits for all its sites at its start

logger = logging.getLogger(__name__)


class FlowerEngine(Engine):
    """Sites behind a Flower grid."""

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        *,
        run: str,
        deadline: float | None = None,
        join: float = JOIN,
        signature: str | None = None,
        folder: Path | None = None,
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Around the grid that Flower gives a ServerApp.

        Args:
            grid: of the run.
            num_clients: sites that the scenario has.
            run: what sites keep the run's files under; the same when it is resumed.
            deadline: seconds that a round waits.
            join: seconds that the start waits.
            signature: of who submitted the run, for sites that ask for one.
            folder: where replies wait for their turn; None: where temporary files are.
            note: is told what happens, in a sentence that the submitter may read.
        """
        super().__init__(num_clients)
        self.grid, self.key, self.signature, self.folder = grid, run, signature, folder
        self.deadline, self.join = deadline or DEADLINE, join
        self.roster = Roster(grid, num_clients, self.deadline, join, note)
        self.merges: list[Change] = []
        self._evaluations = ThreadPoolExecutor(1)

    def start(self, setup: Setup) -> Description:
        """Load the model here, and wait for the sites.

        Raises:
            RoundError: none came.
        """
        self.here = InlineEngine(self.num_clients)
        self.description = self.here.start(setup)
        self.worker = self.here.worker
        self._hello = wire.pack_words(
            {
                "run": self.key,
                "scenario": dict(setup.scenario),
                "labels": list(self.worker.dataset.labels),
                "version": version("fedlora"),
                "base": self.worker.base_fingerprint(),
                "adapter": self.description.fingerprint,
                "signature": self.signature,
                wire_base.CUT: None if setup.base is None else smaller.manifest(setup.base)["fingerprint"],
            }
        )
        if setup.base is not None:
            wire_base.pack_cut(self._hello, smaller.factors(setup.base))
        self.roster.begin_anew()
        sites, away = self.roster.sites, self.roster.turned_away
        self.roster.note(f"waiting for {self.num_clients} sites to join: {self.join:g} s at most")
        self.roster.gather(self._hello, self.join, lambda: len(sites) + len(away) >= self.num_clients)
        if not sites:
            why = "; ".join(why for _, why in away.values())
            raise RoundError(f"no site joined: {why or f'none came within {self.join:g} s'}")
        if missing := sorted(set(range(self.num_clients)) - set(sites)):
            logger.warning("the run begins without clients %s: they did not join", ", ".join(map(str, missing)))
            for client in missing:
                said = self.roster.absent.get(client, f"no site came as this client within {self.join:g} s")
                self.roster.note(f"the run begins without client {client}: {said}")
        return self.description

    def statistic(
        self, setup: Setup, event: Event | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Said]:
        """What sites say of their own rows, as their answers come; they join for this alone, and then once more.

        Raises:
            RoundError: none joined, or too few for a masked sum.
            SettingError: the noise that they share out is too little for the grid of one.
        """
        self.start(setup)
        units = {client: site.num_examples for client, site in self.roster.sites.items()}
        if self.worker.scenario.secure_aggregation is not None:
            reports = {client: self._report(client) for client in units}
            yield from masked(self.worker.scenario, self.key, self.roster, reports, shapes)
            return
        contents = dict.fromkeys(units, wire.pack_words({"run": self.key}))
        told = Asked(event, shapes, self.roster)
        for client, reply, _ in self.roster.answers(f"query.{wire_base.STATISTIC}", contents):
            yield told.said(client, units.pop(client), reply)
        for client in units:  # it may have paid all the same
            yield told.failed(client, f"no reply within {self.deadline:g} s", event)

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Ask the sites of a round, and wait for them until its deadline."""
        self.roster.gather(self._hello, 0.0, lambda: True)  # whoever came since
        if self.worker.scenario.secure_aggregation is not None:
            return self._train_masked(instruction, cohort)
        sent = self._contents(instruction, cohort)
        asked = self.roster.answers("train", {client: content for client, (content, _) in sent.items()})
        answers = ((client, Reply.of(message, seconds)) for client, message, seconds in asked)
        turns = in_turn(cohort, answers, self.folder)
        parts = (self._part(instruction, group, turns, sent, partial_sums) for group in chunks(cohort))
        return gathered(parts, partial_sums)

    def _contents(self, instruction: Instruction, cohort: Sequence[int]) -> dict[int, tuple[RecordDict, int]]:
        """What each site of a cohort is sent, and its bytes: one content for all that are sent the same."""
        made: dict[tuple[int, int], tuple[RecordDict, int]] = {}
        found: dict[int, tuple[RecordDict, int]] = {}
        for client in cohort:
            if (site := self.roster.sites.get(client)) is None:
                continue
            rank = self.worker.scenario.rank(client, instruction.round)
            if (key := (rank, site.merged)) not in made:
                asked = instruction.at(rank)
                content = self._content(asked, site, self.worker.transport.packing_down(asked, rank))
                made[key] = content, traffic.content_bytes(content)
            found[client] = made[key]
        return found

    def _part(
        self,
        instruction: Instruction,
        group: Sequence[int],
        turns: Iterator[Reply | None],
        sent: Mapping[int, tuple[RecordDict, int]],
        partial_sums: bool,
    ) -> Replies:
        """A piece of a cohort, whose replies are the next."""
        total, updates, reports = Sum(), [], []
        for client, reply in zip(group, turns, strict=False):
            rank = self.worker.scenario.rank(client, instruction.round)
            _, down = sent.get(client, (None, 0))
            update, report = self._read(instruction.at(rank), client, reply, down)
            reports.append(report)
            self._tell(instruction.round, report)
            if update is None:
                continue
            if partial_sums:
                total.add(update)
            else:
                updates.append(update)
        return Replies(total.updates() if partial_sums else updates, reports)

    def evaluate(self, adapter: Adapter) -> Figures:
        """Loss and metrics on the server's test set."""
        return self.here.evaluate(adapter)

    def beside(self, adapter: Adapter) -> Callable[[], Figures]:
        """The server's own model is idle while sites train."""
        return self._evaluations.submit(self.here.evaluate, adapter).result

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """The figures of each site that answers, of its own model; where none does the submitter is told."""
        contents = {
            c: self._content(instruction.at(self.worker.scenario.rank(c, instruction.round)), self.roster.sites[c])
            for c in cohort
            if c in self.roster.sites
        }
        figures: dict[int, Figures] = {}
        main = self.description.metric
        asked = [metric.name for metric in self.worker.metrics if metric.name not in ("loss", main)]
        for client, (reply, _) in self.roster.ask("evaluate", contents).items():
            try:
                if reply.has_error():
                    raise ContractError(reply.error.reason)
                words = wire.unpack_words(reply.content)
                if refused := words.get("refused"):
                    raise ContractError(str(refused))
                told: Figures = {"loss": wire.number(words.get("loss"), "loss")}
                told |= {name: wire.figure(words.get(name), name) for name in (main, *asked)}
                if told[main] is None:  # of any sign: a correlation may be below 0
                    raise ContractError(f"{main} in a message is a finite number, not None")
                figures[client] = told
            except ContractError as error:
                logger.warning("%s did not judge: %s", self.roster.sites[client], error)
        if not figures:
            self.roster.note(f"round {instruction.round}: no site judged its own model, so it has no such figures")
        return figures

    def merge(self, change: Change) -> None:
        """Fold a change into the base here; sites get it beside their next instruction."""
        self.here.merge(change)
        self.merges.append(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter."""
        self.here.export(adapter, folder, merged)

    def conclude(self, round: int, adapter: Adapter, merges: int, threshold: float | None) -> int:
        """Say to sites that the run has ended, and send the adapter to those that asked for it.

        What the seed gives them is not sent. Nothing of this makes a finished run fail.
        """
        try:
            self.roster.gather(self._hello, 0.0, lambda: True)
            first = self.worker.task.initial
            changed = {n: t for n, t in adapter.items() if not np.array_equal(t, first[n])}
            told = {"run": self.key, "merged": len(self.merges), "round": round, "merges": merges}
            contents: dict[int, RecordDict] = {}
            for client, site in self.roster.sites.items():
                content = contents[client] = wire.pack_words({**told, "threshold": threshold})
                if site.wants_adapter:
                    content[wire.ARRAYS] = wire.to_arrays(changed)
                    wire.pack_merges(content, site.merged, self.merges[site.merged :])
            for client, (reply, _) in self.roster.ask(f"query.{wire.END}", contents, LAST).items():
                refused = None if reply.has_error() else wire.unpack_words(reply.content).get("refused")
                if why := reply.error.reason if reply.has_error() else refused:
                    self.roster.note(shown(f"{self.roster.sites[client]} did not take the run's end: {why}"))
            return self.greeted() + sum(map(traffic.content_bytes, contents.values()))
        except Exception as error:  # the SuperLink may be gone, or a site may answer anything
            logger.warning("sites may not know that the run has ended: %s", type(error).__name__)
            return 0

    def greeted(self) -> int:
        """Bytes of the factors of a base that was cut, which go beside introductions."""
        sent, self.roster.greeted = self.roster.greeted, 0
        factors = self._hello.array_records.get(wire_base.CUT)
        return 0 if factors is None else sent * traffic.content_bytes(RecordDict({"": factors}))

    def close(self) -> None:
        """Let an evaluation end; sites drop an idle run by themselves."""
        self._evaluations.shutdown()

    # The grid itself, for Flower's own strategies.

    def set_run(self, run: Run) -> None:
        """Flower's own grid's."""
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's own grid's."""
        return self.grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the sites that joined."""
        return [site.node for _, site in sorted(self.roster.sites.items())]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Flower's own grid's."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Flower's own grid's."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's own grid's."""
        return self.grid.send_and_receive(messages, timeout=timeout)

    # Rounds.

    def _content(self, instruction: Instruction, site: Site, packing: wire.Packing | None = None) -> RecordDict:
        """An instruction for a site, with the run that it is about and the merges that the site lacks."""
        content = wire.pack_instruction(instruction, self.description.layout, packing)
        words = {"run": self.key, "merged": len(self.merges)}
        content[wire.REPORT] = wire.pack_words(words)[wire.REPORT]
        wire.pack_merges(content, site.merged, self.merges[site.merged :])
        return content

    def _train_masked(self, instruction: Instruction, cohort: Sequence[int]) -> Replies:
        """The same where sites mask what they send: four exchanges, of which the third asks them to train."""
        scenario = self.worker.scenario
        assert scenario.secure_aggregation is not None
        reports = {client: self._report(client) for client in cohort}
        for client in set(cohort) - set(self.roster.sites):
            reports[client] = replace(reports[client], error=self._absent(client))

        def content(client: int, told: Told) -> RecordDict:
            packing = self.worker.transport.packing_down(instruction, scenario.rank(client, instruction.round))
            asked = replace(instruction, config={**instruction.config, **self._noise_words(told)})
            return self._content(asked, self.roster.sites[client], packing)

        def took(site: Site, report: Report, content: RecordDict, told: Told) -> Report:
            site.merged = len(self.merges)
            return replace(report, steps=scenario.clients.local_steps)

        exchange = Exchanging(
            roster=self.roster,
            reports=reports,
            words={"run": self.key, "round": instruction.round},
            kind="train",
            size=masking.size(instruction),
            content=content,
            spends=lambda site, told: site.event,
            read=self._spent,
            took=took,
        )
        made = masking.replies(instruction, exchange, reports, scenario.secure_aggregation, Stream.fresh())
        for report in made.reports:
            self._tell(instruction.round, report)
        return made

    def _noise_words(self, told: Told) -> dict[str, float]:
        """Where sites share noise out, how many do, and the noise that the one takes that needs most; by site."""
        if self.worker.scenario.shares_example_noise is None:
            return {}
        events = (self.roster.sites[client].event for client in told if client in self.roster.sites)
        sums = accounting.in_sums(event for event in events if event is not None)
        noise = max((event.noise_multiplier for event in sums), default=0.0)  # 0 is refused
        return {shared.EXAMPLE_NOISE: noise, shared.MEMBERS: members_of(told)}

    def _absent(self, client: int) -> str:
        """Why there is no site of a client, as far as is known."""
        return self.roster.absent.get(client, "its site is not connected")

    def _tell(self, round: int, report: Report) -> None:
        """Tell the submitter at once that a site failed."""
        if report.error is not None:
            site = self.roster.sites.get(report.client) or f"client {report.client}"
            self.roster.note(shown(f"round {round}: {site}: {report.error}"))

    def _report(self, client: int) -> Report:
        """Of a client that nothing is known of as yet."""
        site = self.roster.sites.get(client)
        return Report(client=client, num_examples=site.num_examples if site else 0)

    def _spent(self, report: Report, content: RecordDict) -> Report:
        """The report with what a site says that it paid in the run.

        Raises:
            ContractError: no honest site of this run could have paid that.
        """
        spent, again = wire.unpack_spent(content)
        if not affordable.could_be(spent or (), self.worker.scenario):
            raise ContractError("a message says that its site has paid what this run cannot cost")
        return replace(report, spent=spent, again=again)

    def _read(
        self, instruction: Instruction, client: int, reply: Reply | None, down: int
    ) -> tuple[Update | None, Report]:
        """A client's update, if it is as it should be, and what became of the client."""
        site = self.roster.sites.get(client)
        report = replace(self._report(client), bytes_down=down)
        spends = site.event if site and instruction.trip == 1 else None  # where it may have trained all the same
        if site is None:
            return None, replace(report, error=self._absent(client))
        if reply is None:
            why = f"no reply within {self.deadline:g} s"
            return None, replace(report, event=spends, seconds=self.deadline, error=why)
        report = replace(report, seconds=reply.seconds)
        if (content := reply.content) is None:
            return None, replace(report, event=spends, error=reply.error)
        report = replace(report, bytes_up=traffic.content_bytes(content))
        try:
            event, report = wire.unpack_event(content), self._spent(report, content)
            if refused := wire.unpack_words(content).get("refused"):
                self.roster.forget(site, str(refused))
                return None, replace(report, event=event, error=str(refused))
            update = self._checked(instruction, client, content)
        except FedloraError as error:
            return None, replace(report, event=spends, error=f"{type(error).__name__}: {error}")
        site.merged = len(self.merges)
        shown = {k: v for k, v in update.metrics.items() if k != central.WITHIN}
        steps = self.worker.scenario.clients.local_steps if instruction.trip == 1 else 0
        return update, replace(report, steps=steps, event=event or spends, metrics=shown)

    def _checked(self, instruction: Instruction, client: int, content: RecordDict) -> Update:
        """The update in a reply's content.

        Raises:
            ContractError: it is not what was asked for.
        """
        update = wire.unpack_update(content, client)
        rank = self.worker.scenario.rank(client, instruction.round)
        update = replace(update, scaling=self.description.kind.scaling(rank))
        update = self.worker.transport.arrived(update, instruction)
        update = self.worker.intake.check(update, instruction)
        if (bound := instruction.config.get(central.CLIP_NORM)) is not None:
            central.check(update, instruction.adapter, bound)
        return update
