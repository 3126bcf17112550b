"""Clients at sites: SuperNodes of a Flower federation, each with data of its own.

The server holds a worker for the first adapter, evaluation and export. A site introduces itself once (which
client it is, its versions, its base model), and then gets a message for each round. A round ends when all
that were asked have answered, or at its deadline; who did not answer is found by comparing with who was asked.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedlora import wire
from fedlora.adapter import Adapter, Change, Instruction, Update
from fedlora.engine import secure as masking
from fedlora.engine.base import Engine, summed
from fedlora.engine.inline import InlineEngine
from fedlora.engine.replies import Replies, Report
from fedlora.engine.setup import Description, Setup
from fedlora.errors import ContractError, FedloraError, RoundError
from fedlora.privacy import collector, secure
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import central
from fedlora.privacy.noise import Stream

DEADLINE = 600.0  # seconds that a round waits for its sites, unless the scenario says
JOIN = 300.0  # seconds that a run waits for all its sites at its start
AGAIN = 60.0  # seconds after which a node that would not serve is asked again: it may have been mended
_PAUSE = 0.25  # seconds between two looks for replies

STRANGER = "not introduced"  # what a site says that has lost, or never had, the run of a message
BEHIND = "merges missing"  # what a site says that lacks merges which the server thought it had

logger = logging.getLogger(__name__)


@dataclass
class Site:
    """What the server knows of a site that joined.

    Attributes:
        node: its id in the federation.
        client: which client it is.
        name: what it calls itself.
        num_examples: that it trains on.
        event: what a round costs its examples; None without privacy.
        merged: how many merges it has.
        silent: whether it missed the last deadline.
    """

    node: int
    client: int
    name: str
    num_examples: int
    event: Event | None
    merged: int = 0
    silent: bool = False

    def __str__(self) -> str:
        return f"client {self.client} ({self.name})"


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
    ) -> None:
        """Around the grid that Flower gives a ServerApp.

        Args:
            grid: of the run.
            num_clients: sites that the scenario has.
            run: what sites keep the run's files under; the same when it is resumed.
            deadline: seconds that a round waits.
            join: seconds that the start waits.
            signature: of who submitted the run, for sites that ask for one.
        """
        super().__init__(num_clients)
        self.grid, self.key, self.signature = grid, run, signature
        self.deadline, self.join = deadline or DEADLINE, join
        self.sites: dict[int, Site] = {}
        self.merges: list[Change] = []
        self.late = 0  # replies that came after their round had ended
        self._asked: dict[str, int] = {}  # introductions under way: the node by message
        self._turned_away: dict[int, tuple[float, str]] = {}  # nodes that would not serve: since when, and why
        self._overdue: set[str] = set()
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
            }
        )
        self._gather(self.join, lambda: len(self.sites) + len(self._turned_away) >= self.num_clients)
        if not self.sites:
            why = "; ".join(f"node {node}: {why}" for node, (_, why) in self._turned_away.items())
            raise RoundError(f"no site joined: {why or f'none came within {self.join:g} s'}")
        if missing := sorted(set(range(self.num_clients)) - set(self.sites)):
            logger.warning("the run begins without clients %s: they did not join", ", ".join(map(str, missing)))
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Ask the sites of a round, and wait for them until its deadline."""
        self._gather(0.0, lambda: True)  # whoever came since
        if self.worker.scenario.secure_aggregation is not None:
            return self._train_masked(instruction, cohort)
        ranks = {c: self._rank(c) for c in cohort}
        asked = {c: instruction.at(ranks[c]) for c in cohort}
        began, transport = time.monotonic(), self.worker.transport
        contents = {
            c: self._content(asked[c], self.sites[c], transport.packing_down(asked[c], ranks[c]))
            for c in cohort
            if c in self.sites
        }
        updates, reports = [], []
        answers = self._ask("train", contents)
        for client in cohort:
            reply, seconds = answers.get(client, (None, time.monotonic() - began))
            down = wire.content_bytes(contents[client]) if client in contents else 0
            update, report = self._read(asked[client], client, reply, down, seconds)
            reports.append(report)
            if update is not None:
                updates.append(update)
        return Replies(updates, reports)

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """Loss and metric on the server's test set."""
        return self.here.evaluate(adapter)

    def beside(self, adapter: Adapter) -> Callable[[], dict[str, float]]:
        """The server's own model is idle while sites train."""
        return self._evaluations.submit(self.here.evaluate, adapter).result

    def judge(self, instruction: Instruction, cohort: Sequence[int]) -> dict[str, float]:
        """Means over the sites that answer of the figures of each one's own model.

        Raises:
            RoundError: none does.
        """
        contents = {
            c: self._content(instruction.at(self._rank(c)), self.sites[c]) for c in cohort if c in self.sites
        }
        figures, named = [], ("loss", self.description.metric)
        for client, (reply, _) in self._ask("evaluate", contents).items():
            try:
                if reply.has_error():
                    raise ContractError(reply.error.reason)
                words = wire.unpack_words(reply.content)
                if refused := words.get("refused"):
                    raise ContractError(str(refused))
                figures.append({key: wire.number(words.get(key), key) for key in named})
            except ContractError as error:
                logger.warning("%s did not judge: %s", self.sites[client], error)
        if not figures:
            raise RoundError("no site judged its own model")
        return {key: value / len(figures) for key, value in summed(figures).items()}

    def merge(self, change: Change) -> None:
        """Fold a change into the base here; sites get it beside their next instruction."""
        self.here.merge(change)
        self.merges.append(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter."""
        self.here.export(adapter, folder, merged)

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
        return [site.node for _, site in sorted(self.sites.items())]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Flower's own grid's."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Flower's own grid's."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's own grid's."""
        return self.grid.send_and_receive(messages, timeout=timeout)

    # Introductions.

    def _gather(self, wait: float, enough: Callable[[], bool]) -> None:
        """Greet nodes that are new, drop sites whose node is gone, and take in who has answered.

        Args:
            wait: seconds to go on for, while not `enough`; those greeted may answer later.
            enough: whether to stop.
        """
        end = time.monotonic() + wait
        while True:
            here = set(self.grid.get_node_ids())
            for client, site in list(self.sites.items()):
                if site.node not in here:
                    logger.warning("%s is no longer connected", site)
                    del self.sites[client]
            now = time.monotonic()
            away = {node for node, (since, _) in self._turned_away.items() if now - since < AGAIN}
            busy = {*self._asked.values(), *(site.node for site in self.sites.values()), *away}
            for node in sorted(here - busy):
                ids = self._send({node: ("query", self._hello)})
                self._asked.update(dict.fromkeys(ids, node))
            for reply in self._pull(self._asked):
                self._meet(self._asked.pop(reply.metadata.reply_to_message_id), reply)
            if enough() or time.monotonic() >= end:
                return
            time.sleep(_PAUSE)

    def _meet(self, node: int, reply: Message) -> None:
        """Take a site in, or note why not."""
        why = reply.error.reason if reply.has_error() else None
        if why is None:
            try:
                site = self._introduced(node, wire.unpack_words(reply.content))
            except ContractError as error:
                why = str(error)
        other = None if why is not None else self.sites.get(site.client)
        if other is not None and not other.silent:  # a silent one may have come back as another node
            why = f"{other} is served by node {other.node} already"
        if why is not None:
            logger.warning("node %d does not serve this run: %s", node, why)
            self._turned_away[node] = (time.monotonic(), why)
            return
        self.sites[site.client] = site
        logger.info("%s joined", site)

    def _introduced(self, node: int, words: Mapping[str, Any]) -> Site:
        """What a site said of itself.

        Raises:
            ContractError: it is no client of this run, or says what cannot be.
        """
        if refused := words.get("refused"):
            raise ContractError(str(refused))
        client, held, event = (words.get(key) for key in ("client", "num_examples", "event"))
        return Site(
            node=node,
            client=wire.whole(client, "client", 0, self.num_clients - 1),
            name=str(words.get("name"))[:64],
            num_examples=wire.whole(held, "num_examples", 1, wire.MOST),
            event=wire.read_event(event),
        )

    # Rounds.

    def _rank(self, client: int) -> int:
        scenario = self.worker.scenario
        return scenario.clients.rank(client, scenario.seed, scenario.model.adapter.r)

    def _content(self, instruction: Instruction, site: Site, packing: wire.Packing | None = None) -> RecordDict:
        """An instruction for a site, with the run that it is about and the merges that the site lacks."""
        content = wire.pack_instruction(instruction, self.description.layout, packing)
        words = {"run": self.key, "merged": len(self.merges)}
        content[wire.REPORT] = wire.pack_words(words)[wire.REPORT]
        wire.pack_merges(content, site.merged, self.merges[site.merged :])
        return content

    def _ask(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, tuple[Message, float]]:
        """Replies of clients that came in time, and after how many seconds each."""
        self._drop_late()
        began = time.monotonic()
        nodes = {self.sites[c].node: c for c in contents}
        ids = self._send({self.sites[c].node: (kind, content) for c, content in contents.items()})
        waiting = {i: nodes[node] for i, node in ids.items()}
        answers: dict[int, tuple[Message, float]] = {}
        while waiting and time.monotonic() - began < self.deadline:
            for reply in self._pull(waiting):
                client = waiting.pop(reply.metadata.reply_to_message_id)
                answers[client] = (reply, time.monotonic() - began)
            if waiting:
                time.sleep(_PAUSE)
        for client in contents:
            self.sites[client].silent = client not in answers
        if waiting:
            who = ", ".join(str(self.sites[c]) for c in sorted(waiting.values()))
            logger.warning("no reply within %g s from %s", self.deadline, who)
        self._drop_late()
        self._overdue.update(waiting)
        return answers

    def _drop_late(self) -> None:
        """Throw replies away that came after their round."""
        for reply in self._pull(self._overdue):
            self._overdue.discard(reply.metadata.reply_to_message_id)
            self.late += 1
            logger.warning("a reply came after its round had ended, and is dropped (%d so far)", self.late)

    def _train_masked(self, instruction: Instruction, cohort: Sequence[int]) -> Replies:
        """The same where sites mask what they send: four exchanges, of which the third asks them to train."""
        scenario = self.worker.scenario
        assert scenario.secure_aggregation is not None
        reports = {client: self._report(client) for client in cohort}
        for client in set(cohort) - set(self.sites):
            reports[client] = replace(reports[client], error="its site is not connected")

        def exchange(what: str, told: Mapping[int, secure.Parts]) -> dict[int, secure.Parts]:
            contents: dict[int, RecordDict] = {}
            made: dict[int, secure.Parts] = {}
            began = time.monotonic()
            for client, parts in told.items():
                if client not in self.sites:
                    continue
                content = wire.pack_words({"run": self.key, "round": instruction.round})
                if what == secure.MASKED:
                    packing = self.worker.transport.packing_down(instruction, self._rank(client))
                    content = self._content(instruction, self.sites[client], packing)
                contents[client] = RecordDict({**content, **wire.pack_parts(parts)})
            answers = self._ask("train" if what == secure.MASKED else f"query.{what}", contents)
            for client, content in contents.items():
                reply, seconds = answers.get(client, (None, time.monotonic() - began))
                report = reports[client]
                report = replace(report, seconds=report.seconds + seconds)
                report = replace(report, bytes_down=report.bytes_down + wire.content_bytes(content))
                site = self.sites[client]
                spends = site.event if what == secure.MASKED else report.event
                try:
                    if reply is None:
                        raise ContractError(f"no reply within {self.deadline:g} s")
                    if reply.has_error():
                        raise ContractError(reply.error.reason)
                    report = replace(report, bytes_up=report.bytes_up + wire.content_bytes(reply.content))
                    if refused := wire.unpack_words(reply.content).get("refused"):
                        spends = wire.unpack_event(reply.content) or report.event
                        self._forget(site, str(refused))
                        raise ContractError(str(refused))
                    parts = wire.unpack_parts(reply.content)
                    collector.check(what, told[client], parts, masking.size(instruction))
                    if what == secure.MASKED:
                        spends, site.merged = wire.unpack_event(reply.content) or spends, len(self.merges)
                        report = replace(report, steps=scenario.clients.local_steps)
                    made[client] = parts
                except ContractError as error:
                    report = replace(report, error=str(error))
                reports[client] = replace(report, event=spends)
            return made

        return masking.replies(instruction, exchange, reports, scenario.secure_aggregation, Stream.fresh())

    def _report(self, client: int) -> Report:
        """Of a client that nothing is known of as yet."""
        site = self.sites.get(client)
        held = site.num_examples if site else 0
        return Report(client=client, num_examples=held, steps=0, bytes_up=0, bytes_down=0, seconds=0.0)

    def _read(
        self, instruction: Instruction, client: int, reply: Message | None, down: int, seconds: float
    ) -> tuple[Update | None, Report]:
        """A client's update, if it is as it should be, and what became of the client."""
        site = self.sites.get(client)
        report = replace(self._report(client), bytes_down=down, seconds=seconds)
        spends = site.event if site and instruction.trip == 1 else None  # where it may have trained all the same
        if site is None:
            return None, replace(report, error="its site is not connected")
        if reply is None:
            return None, replace(report, event=spends, error=f"no reply within {self.deadline:g} s")
        if reply.has_error():
            return None, replace(report, event=spends, error=reply.error.reason)
        report = replace(report, bytes_up=wire.content_bytes(reply.content))
        try:
            event = wire.unpack_event(reply.content)
            if refused := wire.unpack_words(reply.content).get("refused"):
                self._forget(site, str(refused))
                return None, replace(report, event=event, error=str(refused))
            update = self._checked(instruction, client, reply)
        except FedloraError as error:
            return None, replace(report, event=spends, error=f"{type(error).__name__}: {error}")
        site.merged = len(self.merges)
        shown = {k: v for k, v in update.metrics.items() if k != central.WITHIN}
        steps = self.worker.scenario.clients.local_steps if instruction.trip == 1 else 0
        return update, replace(report, steps=steps, event=event or spends, metrics=shown)

    def _checked(self, instruction: Instruction, client: int, reply: Message) -> Update:
        """The update in a reply.

        Raises:
            ContractError: it is not what was asked for.
        """
        update = wire.unpack_update(reply, client)
        update = replace(update, scaling=self.description.kind.scaling(self._rank(client)))
        update = self.worker.transport.arrived(update, instruction)
        update = self.worker.intake.check(update, instruction)
        if (bound := instruction.config.get(central.CLIP_NORM)) is not None:
            central.check(update, instruction.adapter, bound)
        return update

    def _forget(self, site: Site, refused: str) -> None:
        """Greet a site again that has lost the run, and send all merges to one that lacks some."""
        if refused.startswith(STRANGER):
            del self.sites[site.client]
        elif refused.startswith(BEHIND):
            site.merged = 0

    # Messages.

    def _send(self, contents: Mapping[int, tuple[str, RecordDict]]) -> dict[str, int]:
        """Push a message to each node, which lapses when nobody waits for its reply; gives the node by message."""
        messages = [
            Message(content, node, kind, ttl=self.deadline + (self.join if kind == "query" else 0), group_id="")
            for node, (kind, content) in contents.items()
        ]
        ids = list(self.grid.push_messages(messages))
        nodes = (message.metadata.dst_node_id for message in messages)
        return {i: node for i, node in zip(ids, nodes, strict=True) if i}

    def _pull(self, ids: Iterable[str]) -> list[Message]:
        """The replies that are there in the order of what they answer, each once however often it came."""
        wanted = list(ids)
        came = self.grid.pull_messages(wanted) if wanted else ()
        replies = {reply.metadata.reply_to_message_id: reply for reply in came}
        return [replies[i] for i in wanted if i in replies]
