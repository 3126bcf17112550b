"""`fedlora survey`: what the sites of a SuperLink hold, in noised counts, before anybody trains.

A Flower run of its own asks every node that is connected. A site answers as `fedlora.deploy.surveyed` says, or
says why it does not.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.deploy import submit
from fedlora.deploy.surveyed import ASKED, BOUNDS
from fedlora.engine.roster import shown
from fedlora.errors import ContractError, RoundError, UserError
from fedlora.privacy.noise import fresh_key
from fedlora.reports.console import Display
from fedlora.reports.tables import Table

WAIT = 60.0  # seconds for all sites
_SETTLED = 5.0  # seconds without a new node after which no more are waited for
_PAUSE = 0.25  # seconds between two looks for replies
_MOST = 10_000  # labels of a site
_NAME = 64  # characters of a name


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a site said.

    Attributes:
        name: of the site; of a node where it did not say.
        refused: why it told nothing; None where it did.
        client: of a scenario, which it is.
        task: that its rows are for.
        unit: what one of a count is: an `example` or a `person`.
        labels: names of the labels.
        counts: of each label; None where it is below the site's floor.
        lengths: of each class of `surveyed.BOUNDS`, and of longer ones; empty of images.
        noise: standard deviation of each count.
        epsilon: that the answer cost the site's budget, once.
        delta: of it.
        floor: least count that is told.
    """

    name: str
    refused: str | None = None
    client: int = 0
    task: str = ""
    unit: str = "example"
    labels: Sequence[str] = ()
    counts: Sequence[int | None] = ()
    lengths: Sequence[int | None] = ()
    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0
    floor: int = 0

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> Self:
        """From the words of a message.

        Raises:
            ContractError: it is none.
        """
        if (refused := words.get("refused")) is not None:
            return cls(name=shown(words.get("name") or "a site", _NAME), refused=shown(refused))
        labels, unit = words.get("labels"), words.get("unit")
        if not isinstance(labels, list) or len(labels) > _MOST or not all(isinstance(x, str) for x in labels):
            raise ContractError("labels in a message are a list of texts")
        if unit not in ("example", "person"):
            raise ContractError("unit in a message is example or person")
        lengths = _counts(words, "lengths")
        counts = _counts(words, "counts")
        if len(counts) != len(labels) or len(lengths) not in (0, len(BOUNDS) + 1):
            raise ContractError("a message has as many counts as labels and lengths")
        return cls(
            name=shown(words.get("name"), _NAME),
            client=wire.whole(words.get("client"), "client", 0, wire.MOST),
            task=shown(words.get("task"), _NAME),
            unit=unit,
            labels=[shown(label) for label in labels],
            counts=counts,
            lengths=lengths,
            noise=wire.number(words.get("noise"), "noise", above_zero=True),
            epsilon=wire.number(words.get("epsilon"), "epsilon", above_zero=True),
            delta=wire.number(words.get("delta"), "delta"),
            floor=wire.whole(words.get("floor"), "floor", 0, wire.MOST),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `Answer.read` reads."""
        told = asdict(self)
        return {key: told[key] for key in ("name", "refused")} if self.refused is not None else told


def _counts(words: Mapping[str, Any], what: str) -> list[int | None]:
    told = words.get(what)
    if not isinstance(told, list):
        raise ContractError(f"{what} in a message is a list")
    return [None if one is None else wire.whole(one, what, 0, wire.MOST) for one in told]


def survey(superlink: str, *, wait: float = WAIT, key: Path | None = None, display: Display) -> Sequence[Answer]:
    """Ask all sites that are connected to a SuperLink.

    Args:
        superlink: the name of a connection in Flower's configuration.
        wait: seconds for all sites.
        key: an ssh key that signs, for sites that ask who asks.
        display: shown how it goes.

    Raises:
        UserError: the SuperLink refused it.
        RoundError: no site is connected, or the server failed.
    """
    if not 0 < wait <= 3600:
        raise UserError("--wait: should be above 0 and at most 3600 seconds")
    name = f"survey-{fresh_key().hex()[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "fedlora-app"
        submit.write_app(app, {"survey": name, "wait": str(wait)}, ASKED, name, key)
        display.stage(f"asking the sites of {superlink}")
        number = submit.start(app, superlink)
    follower = submit.follow(number, superlink, None, display)
    if follower.failure is not None:
        raise RoundError(f"the survey failed on the server: {follower.failure}")
    if follower.answers is None:
        raise RoundError("the survey ended without a word, as when the SuperLink was killed: ask again")
    return [Answer.read(told) for told in follower.answers]


def gather(grid: Grid, name: str, wait: float, signature: str | None) -> list[Answer]:
    """Ask every node, and wait for the answers; run by the server.

    Args:
        grid: of the run.
        name: of the survey.
        wait: seconds at most.
        signature: of who asks.

    Raises:
        RoundError: no node is connected.
    """
    words = {"run": name, "version": version("fedlora"), "signature": signature}
    asked: dict[str, int] = {}
    answers: dict[int, Answer] = {}
    began = last = time.monotonic()
    while (now := time.monotonic()) - began < wait and (len(answers) < len(asked) or now - last < _SETTLED):
        for node in sorted(set(grid.get_node_ids()) - {*asked.values(), *answers}):
            message = Message(wire.pack_words(words), node, f"query.{wire.SURVEY}", ttl=wait, group_id="")
            asked |= dict.fromkeys(grid.push_messages([message]), node)
            last = time.monotonic()
        for reply in grid.pull_messages([i for i, node in asked.items() if node not in answers]):
            node = asked[reply.metadata.reply_to_message_id]
            answers[node] = _answer(node, reply)
        time.sleep(_PAUSE)
    if not asked:
        raise RoundError(f"no site is connected: none came within {wait:g} s")
    silent = sorted({*asked.values()} - set(answers))
    said = [*answers.values(), *(Answer(name=f"node {n}", refused=f"no answer in {wait:g} s") for n in silent)]
    return sorted(said, key=lambda one: (one.refused is not None, one.client, one.name))


def _answer(node: int, reply: Message) -> Answer:
    try:
        if reply.has_error():
            raise ContractError(reply.error.reason)
        return Answer.read(wire.unpack_words(reply.content))
    except ContractError as error:
        return Answer(name=f"node {node}", refused=shown(error))


def lines(answers: Sequence[Answer]) -> Iterator[str]:
    """What a terminal shows."""
    told = [one for one in answers if one.refused is None]
    for labels in dict.fromkeys(tuple(one.labels) for one in told if one.labels):
        these = [one for one in told if tuple(one.labels) == labels]
        yield from _table("label", labels, [(one, one.counts) for one in these])
    if measured := [one for one in told if one.lengths]:
        heads = (f"to {BOUNDS[0]} words", *(f"to {most}" for most in BOUNDS[1:]), f"above {BOUNDS[-1]}")
        yield from _table("length", heads, [(one, one.lengths) for one in measured])
    for one in told:
        yield (
            f"{one.name}: client {one.client}, for {one.task}; each count of {one.unit}s is right to "
            f"{1.96 * one.noise:.0f} either way (95%), for epsilon {one.epsilon:g} at delta {one.delta:g}"
            f"{f'; <{one.floor}: below the floor of the site' if None in (*one.counts, *one.lengths) else ''}"
        )
    yield from (f"{one.name}: told nothing: {one.refused}" for one in answers if one.refused is not None)


def _table(what: str, heads: Sequence[str], told: Sequence[tuple[Answer, Sequence[int | None]]]) -> Iterator[str]:
    """A row for each label, or class of lengths, and a column for each site."""
    rows = [
        [head, *(f"<{one.floor}" if counts[at] is None else f"{counts[at]:,}" for one, counts in told)]
        for at, head in enumerate(heads)
    ]
    yield from Table((what, *(one.name for one, _ in told)), rows).text()
    yield ""
