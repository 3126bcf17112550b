"""A federation in this process: Flower's grid as the server sees it, and real nodes behind it."""

from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora import wire

ROWS = """text,ward
a b c,surgery
"",other
ein text,Surgery
x y z w,gone
q r,other
q r,other
"""


@dataclass
class LocalGrid(Grid):
    """Messages reach a node as bytes, and so do replies.

    Attributes:
        nodes: by id.
        silent: ids of nodes that do what they are asked and say nothing.
        late: ids of nodes that answer when they are asked the next time.
        told: kind and node of every message, in order.
    """

    nodes: dict
    silent: set = field(default_factory=set)
    late: set = field(default_factory=set)
    told: list = field(default_factory=list)
    altered: dict = field(default_factory=dict)

    def __post_init__(self):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        self._replies, self._held, self._number = {}, {}, 0
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self._number += 1
            ids.append(i := f"message-{self._number}")
            message.metadata.__dict__["_message_id"] = i
            self.told.append((kind, node))
            self._replies.update(self._held.pop(node, {}))
            content = wire.from_bytes(wire.to_bytes(message.content))
            try:
                made = self.nodes[node].answer(kind, content, 0)
            except Exception as error:
                reply = wire.error_reply(message, type(error).__name__)
            else:
                made = self.altered.get(node, lambda content: content)(wire.from_bytes(wire.to_bytes(made)))
                reply = Message(made, reply_to=message)
            if node in self.silent:
                continue
            (self._held.setdefault(node, {}) if node in self.late and kind == "train" else self._replies)[i] = (
                reply
            )
        return ids

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def meet(node, words):
    return wire.unpack_words(node.answer("query", wire.pack_words(words), 0))


def refusal(node, content, kind="train"):
    return wire.unpack_words(node.answer(kind, content, 0)).get("refused")
