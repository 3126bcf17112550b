"""What every engine is: a Flower `Grid`, and a faster way to say the same in plain data.

The round loop calls `train`. Flower's own `Strategy.start` works on an engine too, through messages.
"""

import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora import wire
from fedlora.adapter import Adapter, Change, Instruction, Sum
from fedlora.engine.replies import Replies, Said
from fedlora.engine.setup import Description, Half, Setup
from fedlora.metrics.contract import Evaluation
from fedlora.passes.kept import Piece
from fedlora.privacy.accounting import Event

Figures = dict[str, Any]
"""Figures by name: a number, or None where it says nothing of its rows; `CONFUSION` is a table of counts."""

EVALUATION_CHUNK = 256  # test examples: fixed, so that sums do not depend on the number of workers


def chunks(cohort: Sequence[int], most: int | None = None, fused: int = 1) -> list[Sequence[int]]:
    """A cohort in pieces that depend on its size alone, so that partial sums do not depend on the workers.

    Args:
        cohort: client ids.
        most: clients of a piece, where nothing is summed over it; None: as many as it takes to make 64.
        fused: clients that share a worker's passes; a piece is made of whole groups of them.
    """
    size = max(1, min(len(cohort) // 64, most or len(cohort)))
    size = -(-size // fused) * fused
    return [cohort[i : i + size] for i in range(0, len(cohort), size)]


def gathered(parts: Iterable[Replies], partial_sums: bool) -> Replies:
    """The replies of all pieces, in their order; with `partial_sums` summed as they come, and none is kept."""
    total, updates, reports = Sum(), [], []
    for part in parts:
        reports += part.reports
        if not partial_sums:
            updates += part.updates
            continue
        for update in part.updates:
            total.add(update)
    return Replies(total.updates() if partial_sums else updates, reports)


def pieces(found: Description) -> list[tuple[Half, int, int]]:
    """The pieces of an evaluation: of which rows, and from where to where."""
    counts: dict[Half, int] = {"test": found.test_examples, "validation": found.validation_examples}
    return [
        (half, start, min(start + EVALUATION_CHUNK, count))
        for half, count in counts.items()
        for start in range(0, count, EVALUATION_CHUNK)
    ]


def by_half(found: Description, parts: Iterable[Evaluation]) -> dict[Half, Evaluation]:
    """An evaluation's pieces together, of the rows that report and of those that choose, if there are any."""
    made = list(zip(pieces(found), parts, strict=True))
    halves = dict.fromkeys(half for (half, *_), _ in made)
    return {half: Evaluation.joined([part for (of, *_), part in made if of == half]) for half in halves}


def named(figures: Mapping[Half, Figures]) -> Figures:
    """Figures as a round's line has them: those on the rows that choose are `validation_...`."""
    told = dict(figures["test"])
    return told | {f"validation_{name}": value for name, value in figures.get("validation", {}).items()}


class Engine(Grid):
    """Where clients run.

    Node i + 1 of the grid is client i.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        self.description: Description
        if TaskIdentity._run_id is None:  # no process of a SuperLink or a SuperNode
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    @abstractmethod
    def start(self, setup: Setup) -> Description:
        """Build the workers, and say what they built."""

    def statistic(
        self, setup: Setup, event: Event | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Said] | None:
        """What clients say whose rows are elsewhere, asked for the statistic by which the base is to be cut.

        Args:
            setup: of the whole base.
            event: that it costs each of them.
            shapes: of the sums, by name.

        Returns:
            None where the rows are here.
        """
        return None

    def keep(self, work: Callable[[Path, Sequence[Piece]], None]) -> None:
        """Have on disk what the layers below all factors make of the examples, where that is wanted.

        Args:
            work: lets workers fill a folder.
        """
        if (wanted := self.description.wanted) is not None:
            wanted.make(lambda to: work(to, wanted.pieces))

    @abstractmethod
    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run a round's clients.

        Args:
            instruction: the same for each of them.
            cohort: client ids, ascending.
            partial_sums: whether updates may come back summed over several clients.

        Returns:
            Updates and reports sorted by client.
        """

    @abstractmethod
    def evaluate(self, adapter: Adapter) -> Figures:
        """Loss and metrics on the test set; under `validation_...` on the rows that choose, where there are any.

        Of tasks with classes `confusion` too: how many test rows of each label were taken for each.
        """

    def beside(self, adapter: Adapter) -> Callable[[], Figures] | None:
        """Evaluate beside the next call of `train`, where something would stand idle meanwhile.

        Returns:
            Gives what `evaluate` would, and ends the wait for it; None where nothing will be idle.
        """
        return None

    @abstractmethod
    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """Loss and metrics of clients' own models on the examples that each holds out, of those that can be had.

        Args:
            instruction: with the tensors that the server holds after a round.
            cohort: client ids.
            test: judge by the test set and not by the client's own examples; sites cannot.

        Returns:
            The figures of each client that has them; of nobody, where no site gives any.
        """

    @abstractmethod
    def merge(self, change: Change) -> None:
        """Fold a change into the base of every worker, of those too that start later."""

    @abstractmethod
    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter where `peft.PeftModel.from_pretrained` finds it, with all that was merged."""

    def conclude(self, round: int, adapter: Adapter, merges: int, threshold: float | None) -> int:
        """Say to clients that the run has ended, and send the adapter to those that want it; none in a simulation.

        Args:
            round: the last.
            adapter: that the run ends with.
            merges: how many of the run's merges are part of it.
            threshold: from which probability on it gives a label, where a text may have several.

        Returns:
            Bytes that were sent.
        """
        return 0

    def greeted(self) -> int:
        """Bytes that went beside introductions since this was asked last; none in a simulation."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Let the workers go."""

    # The Grid that Flower's strategies see.

    def set_run(self, run: Run) -> None:
        """Take another run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(
            content=content,
            message_type=message_type,
            dst_node_id=dst_node_id,
            group_id=group_id,
            ttl=ttl or DEFAULT_TTL,
        )

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Train at once; the replies wait to be pulled."""
        pushed = list(messages)
        for message in pushed:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        groups: dict[int, list[Message]] = {}
        for message in pushed:  # Flower's strategies send one content to all
            groups.setdefault(id(message.content), []).append(message)
        for group in groups.values():
            self._answer(group)
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to messages, sorted by node."""
        replies = self.pull_messages(self.push_messages(messages))
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _answer(self, group: Sequence[Message]) -> None:
        layout = self.description.layout
        instruction = wire.unpack_instruction(group[0].content, layout)
        by_client = {message.metadata.dst_node_id - 1: message for message in group}
        replies = self.train(instruction, sorted(by_client), partial_sums=False)
        updates = {update.clients[0]: update for update in replies.updates}
        for report in replies.reports:
            message = by_client[report.client]
            if report.error is not None:
                reply = wire.error_reply(message, report.error)
            else:
                reply = Message(wire.pack_update(updates[report.client], report.event), reply_to=message)
            self._replies[message.metadata.message_id] = reply
