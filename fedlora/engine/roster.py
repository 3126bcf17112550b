"""The sites of a run: who joined, what they are sent, and what they answer in time.

A node is greeted with the run's introduction, and joins as the client that it answers for. Who did not answer a
message is found by comparing with who was asked.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedlora import wire
from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event

AGAIN = 60.0  # seconds after which a node that would not serve is asked again: it may have been mended
_PATIENCE = 15.0  # seconds after which it is told whom a round waits for
_LATEST = 1e11  # seconds since 1970
_CLOCK = 60.0  # seconds that clocks may differ without a word
_WORDS, _NAME = 300, 64  # characters of what a site said, and of its name
_PAUSE = 0.25  # seconds between two looks for replies; of more than _MANY nodes, longer in proportion
_MANY = 100
_BATCH = 100  # replies that are in memory at once
_LOOKS = 20  # requests of one look, while these have no more than _BATCH each
_NAMED = 10  # sites that a line names

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
        wants_adapter: whether it is to have the adapter when the run ends.
        clock: seconds by which its clock is before the server's.
        version: of fedlora that it runs.
        figures: standard deviation of the accuracy that it tells of its own rows; None where it adds no noise.
    """

    node: int
    client: int
    name: str
    num_examples: int
    event: Event | None
    merged: int = 0
    silent: bool = False
    clock: float = 0.0
    wants_adapter: bool = False
    version: str = ""
    figures: float | None = None

    def __str__(self) -> str:
        return f"client {self.client} ({self.name})"


def shown(said: object, most: int = _WORDS) -> str:
    """What a site said, as a terminal may show it."""
    return "".join(c if c.isprintable() else "?" for c in str(said)[:most])


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Pieces of a list, each of which may be asked for at once; a few ids one by one."""
    size = min(max(-(-len(ids) // _LOOKS), 1), _BATCH)
    yield from (ids[i : i + size] for i in range(0, len(ids), size))


def _unreadable(asked: str) -> Message:
    """What stands for a reply that is none."""
    message = Message(RecordDict(), 0, "query")
    message.metadata.__dict__["_message_id"] = asked
    return wire.error_reply(message, "its reply cannot be read")


def _some(sites: Iterable[Site]) -> str:
    """Sites in a line, which names the first few of many."""
    told = [str(site) for site in sites]
    more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return ", ".join(told[:_NAMED]) + more


def _ahead(told: object, asked: float) -> float:
    """Seconds by which what a clock told lies outside of the time since it was asked: a reply may have waited."""
    if not isinstance(told, float) or not 0 < told < _LATEST:
        return 0.0
    return told - min(max(told, asked), time.time())


class Roster:
    """The sites behind a Flower grid.

    Attributes:
        sites: that joined, by client.
        turned_away: nodes that would not serve: since when, and who and why in a sentence.
        absent: of clients without a site that joined, what is known of it.
        late: replies that came after nobody waited for them any more.
        greeted: introductions that were sent, since somebody counted them or all began anew.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        deadline: float,
        join: float,
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Of nobody yet.

        Args:
            grid: of the run.
            num_clients: sites that the scenario has.
            deadline: seconds for which replies are waited for.
            join: seconds more that a node has to answer its introduction.
            note: is told what happens, in a sentence that the submitter may read.
        """
        self.note = note
        self.absent: dict[int, str] = {}
        self.grid, self.num_clients = grid, num_clients
        self.deadline, self.join = deadline, join
        self.sites: dict[int, Site] = {}
        self.turned_away: dict[int, tuple[float, str]] = {}
        self.late, self.greeted = 0, 0
        self._since = time.time()  # when the first of those under way was sent
        self._asked: dict[str, int] = {}  # introductions under way: the node by message
        self._overdue: set[str] = set()
        self._wary = False  # whether a reply could not be read

    def gather(self, hello: RecordDict, wait: float, enough: Callable[[], bool]) -> None:
        """Greet nodes that are new, drop sites whose node is gone, and take in who has answered.

        Args:
            hello: the run's introduction, which they answer with their own.
            wait: seconds to go on for, while not `enough`; those greeted may answer later.
            enough: whether to stop.
        """
        end = time.monotonic() + wait
        while True:
            here = set(self.grid.get_node_ids())
            for client, site in list(self.sites.items()):
                if site.node not in here:
                    logger.warning("%s is no longer connected", site)
                    self.note(f"{site} is no longer connected")
                    self.absent[client] = f"its site ({site.name}) is no longer connected"
                    del self.sites[client]
            now = time.monotonic()
            away = {node for node, (since, _) in self.turned_away.items() if now - since < AGAIN}
            busy = {*self._asked.values(), *(site.node for site in self.sites.values()), *away}
            self._since = self._since if self._asked else time.time()
            sent = self._send({node: ("query", hello) for node in sorted(here - busy)})
            self._asked, self.greeted = self._asked | sent, self.greeted + len(sent)
            for some in batches(list(self._asked)):
                for reply in self._pull(some):
                    self._meet(self._asked.pop(reply.metadata.reply_to_message_id), reply)
            if enough() or time.monotonic() >= end:
                return
            time.sleep(_PAUSE)

    def begin_anew(self) -> None:
        """Forget who joined: what nodes are greeted with is about to change."""
        self._overdue.update(self._asked)
        for known in (self._asked, self.sites, self.turned_away, self.absent):
            known.clear()
        self.greeted = 0

    def _meet(self, node: int, reply: Message) -> None:
        """Take a site in, or note why not."""
        why = reply.error.reason if reply.has_error() else None
        who = f"node {node}"
        if why is None:
            try:
                words = wire.unpack_words(reply.content)
                who = self._who(node, words)
                site = self._introduced(node, words)
            except ContractError as error:
                why = str(error)
        other = None if why is not None else self.sites.get(site.client)
        if other is not None and not other.silent:  # a silent one may have come back as another node
            why = f"{other} is served by node {other.node} already"
        if why is not None:
            logger.warning("node %d does not serve this run: %s", node, why)
            said = shown(f"{who} does not take part: {why}")
            if self.turned_away.get(node, (0.0, ""))[1] != said:
                self.note(said)
            self.turned_away[node] = (time.monotonic(), said)
            return
        self.sites[site.client] = site
        self.absent.pop(site.client, None)
        logger.info("%s joined", site)
        self.note(f"{site} joined")
        if site.version != (here := version("fedlora")):
            self.note(f"{site}: it runs fedlora {site.version}, and the server {here}")
        if site.figures is not None:
            self.note(f"{site}: its figures are noised: accuracy to {1.96 * site.figures:.2g} either way (95%)")
        if abs(site.clock) > _CLOCK:
            self.note(
                f"{site}: its clock is {site.clock:+.0f} s from the server's, by which certificates are valid"
            )

    def _who(self, node: int, words: Mapping[str, Any]) -> str:
        """What a node that refuses calls itself; what it says of a client is kept where none has joined."""
        name, client, why = words.get("name"), words.get("client"), words.get("refused")
        if why is None or name is None or type(client) is not int or not 0 <= client < self.num_clients:
            return f"node {node}"
        if client not in self.sites:
            self.absent[client] = shown(f"its site ({shown(name, _NAME)}) does not take part: {why}")
        return f"client {client} ({shown(name, _NAME)})"

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
            name=shown(words.get("name"), _NAME),
            clock=_ahead(words.get("time"), self._since),
            num_examples=wire.whole(held, "num_examples", 1, wire.MOST),
            event=wire.read_event(event),
            wants_adapter=words.get("receive") == "adapter",
            version=shown(words.get("version"), _NAME),
            figures=None if (told := words.get("figures")) is None else wire.number(told, "figures"),
        )

    def forget(self, site: Site, refused: str) -> None:
        """Greet a site again that has lost the run, and send all merges to one that lacks some."""
        if refused.startswith(STRANGER):
            del self.sites[site.client]
        elif refused.startswith(BEHIND):
            site.merged = 0

    def ask(
        self, kind: str, contents: Mapping[int, RecordDict], most: float | None = None
    ) -> dict[int, tuple[Message, float]]:
        """Send each client a message; the replies that came in time, and after how many seconds each.

        Args:
            kind: of the messages.
            contents: by client.
            most: seconds to wait, where that is less than until the deadline.
        """
        return {client: (reply, seconds) for client, reply, seconds in self.answers(kind, contents, most)}

    def answers(
        self, kind: str, contents: Mapping[int, RecordDict], most: float | None = None
    ) -> Iterator[tuple[int, Message, float]]:
        """The same as they come: client, reply and seconds."""
        patience = self.deadline if most is None else min(most, self.deadline)
        self._drop_late()
        began = time.monotonic()
        sites = {client: self.sites[client] for client in contents}
        nodes = {site.node: client for client, site in sites.items()}
        ids = self._send({sites[c].node: (kind, content) for c, content in contents.items()})
        waiting = {i: nodes[node] for i, node in ids.items()}
        noted = False
        for client in contents:
            sites[client].silent = True
        while waiting and time.monotonic() - began < patience:
            for some in batches(list(waiting)):
                for reply in self._pull(some):
                    client = waiting.pop(reply.metadata.reply_to_message_id)
                    sites[client].silent = False
                    yield client, reply, time.monotonic() - began
            if waiting and not noted and (passed := time.monotonic() - began) >= _PATIENCE:
                who, noted = _some(sites[c] for c in sorted(waiting.values())), True
                self.note(f"waiting for {who}: {patience - passed:.0f} s more at most")
            if waiting:
                time.sleep(_PAUSE * max(1.0, len(waiting) / _MANY))
        if waiting:
            who = _some(sites[c] for c in sorted(waiting.values()))
            logger.warning("no reply within %g s from %s", patience, who)
        self._drop_late()
        self._overdue.update(waiting)

    def _drop_late(self) -> None:
        """Throw replies away that came after their round."""
        for reply in self._pull(self._overdue):
            self._overdue.discard(reply.metadata.reply_to_message_id)
            self.late += 1
            logger.warning("a reply came after its round had ended, and is dropped (%d so far)", self.late)

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
        if self._wary and len(wanted) > 1:
            return [reply for i in wanted for reply in self._pull([i])]
        try:
            came = list(self.grid.pull_messages(wanted)) if wanted else []
        except (ValueError, TypeError, LookupError, AttributeError, DecodeError) as error:
            # Flower reads what a node wrote, and has let go of the whole piece by then.
            self._wary = True
            logger.warning(
                "a reply cannot be read (%s); from now on each is asked for alone", type(error).__name__
            )
            came = [_unreadable(i) for i in wanted] if len(wanted) == 1 else []
        replies = {reply.metadata.reply_to_message_id: reply for reply in came}
        return [replies[i] for i in wanted if i in replies]
