"""The Strategy contract: plain data in, plain data out, and Flower's own interface for free."""

import logging
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlora import plugins, returned, wire
from fedlora.adapter import Adapter, Change, Instruction, Layout, Update
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.averages import aggregation_error
from fedlora.kinds.contract import Kind
from fedlora.kinds.lora import Lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """An aggregate that also folds a change into the base model, the same everywhere and for good.

    Attributes:
        adapter: new values, as a plain aggregate has them.
        base: what is added to the weight of each layer, as thin factors, scaling included.
    """

    adapter: Adapter
    base: Change


@dataclass(frozen=True)
class Facts:
    """What a strategy is like, for lists and checks.

    Attributes:
        sends: what its clients send up, in a few words.
        exact: whether each round's aggregate is the average of the full weight changes.
    """

    sends: str = "what trains"
    exact: bool = False


@dataclass(kw_only=True)
class Strategy(FlowerStrategy):
    """How the server turns a round's updates into the next adapter.

    A subclass writes `aggregate` and, where it differs, what federates and what trains. It is also a
    `flwr.serverapp.strategy.Strategy`: `strategy.start(grid, arrays)` runs it under Flower's own loop.

    >>> import numpy as np
    >>> @dataclass(kw_only=True)
    ... class TrimmedMean(Strategy):
    ...     trim: float = 0.1  # fraction of clients dropped at each end, in [0, 0.5): one at least, of three
    ...
    ...     def aggregate(self, adapter, updates):
    ...         k = min(max(1, int(self.trim * len(updates))), (len(updates) - 1) // 2)
    ...         stacked = {n: np.sort([u.adapter[n] for u in updates], axis=0) for n in adapter}
    ...         return {n: x[k : len(x) - k].mean(axis=0) for n, x in stacked.items()}
    >>> updates = [Update(adapter={"w": np.array([x])}, weight=1.0, clients=(x,)) for x in range(10)]
    >>> TrimmedMean().aggregate({"w": np.zeros(1)}, updates)
    {'w': array([4.5])}
    """

    linear: ClassVar[bool] = False
    """Whether the aggregate is `weighted_mean(updates)` and nothing else.

    Then updates may be summed before they reach `aggregate`; see `partial_sums`.
    """

    facts: ClassVar[Facts] = Facts()
    """For lists and tables."""

    unequal_ranks: ClassVar[bool] = False
    """Whether clients may have ranks below the server's, so that updates differ in shape."""

    merges: ClassVar[bool] = False
    """Whether it changes the frozen base: its aggregates are `Merged`, with a change of `base`."""

    personal: ClassVar[bool] = False
    """Whether each client ends with a model of its own, to be judged by its own examples."""

    tested: ClassVar[bool] = False
    """Whether clients' own models are judged by the test set all the same, as their mean; not on sites."""

    builds: ClassVar[str] = "lora"
    """The kind of adapter that is built where the scenario does not say."""

    moves: ClassVar[tuple[str, ...]] = ()
    """Roles of tensors that it is about: it takes the kinds of adapter in which all of them can train."""

    trips: ClassVar[int] = 1
    """How often the server asks and clients answer in a round; see `reply` and `relay`."""

    measure_error: bool = False  # also where clients could be summed on the way: needs each client's factors

    # What `bind` was given.
    layout: Layout = field(default_factory=dict, init=False, repr=False, compare=False)
    kind: Kind = field(default=Lora(1, 1.0, ()), init=False, repr=False, compare=False)
    initial: Adapter = field(default_factory=dict, init=False, repr=False, compare=False)
    private: bool = field(default=False, init=False, repr=False, compare=False)

    _sent: Adapter = field(default_factory=dict, init=False, repr=False, compare=False)

    def bind(self, layout: Layout, kind: Kind, initial: Adapter, private: bool) -> None:
        """Give the strategy what it works on, before the first round; on the server and on clients.

        Args:
            layout: every tensor that could federate, by name.
            kind: of the adapter.
            initial: the adapter that the seed stands for.
            private: whether clients clip and add noise.
        """
        self.layout, self.kind, self.initial, self.private = layout, kind, initial, private

    @property
    def partial_sums(self) -> bool:
        """Whether clients may be summed on the way, so that an update stands for several."""
        return self.linear and not self.measure_error

    def federates(self, layout: Layout) -> Collection[str]:
        """The tensors that the server holds and sends. The others keep the first value that the seed gives."""
        return layout

    @property
    def held(self) -> list[str]:
        """The tensors that the server sends down: those that federate, but for what can never train."""
        names = returned.names(self._who("federates"), self.federates(self.layout))
        return sorted(name for name in names if self.layout[name].trainable)

    def trains(self, round: int, layout: Layout) -> Collection[str]:
        """The tensors that clients train in a round; by default all that federate."""
        return self.federates(layout)

    def sends(self, round: int, layout: Layout) -> Collection[str]:
        """Those of the trained tensors that clients send back; by default all that federate."""
        return self.federates(layout)

    def keeps(self, layout: Layout) -> Collection[str]:
        """The tensors that stay with a client from one of its rounds to the next, and never travel."""
        return ()

    def config(self, round: int) -> Mapping[str, Any]:
        """Words to the clients of a round, such as `proximal-mu`: numbers, strings and bytes."""
        return {}

    def draw(self, round: int) -> int:
        """Which draw of the seed the tensors that are not sent down start from; 0 is the first."""
        return 0

    def receives(self, adapter: Adapter, rank: int) -> Adapter:
        """What a client of a rank is sent: the first rows of A and columns of B that its rank holds.

        What the change is linear in, such as B, is scaled, so that each direction counts at the client for what it
        counts at the server. A tensor may also come with a lower rank than the client's; the rest of it is as the
        seed made it.
        """
        if rank == self.kind.r:
            return dict(adapter)
        cut: Adapter = {}
        ratio = np.float32(self.kind.scaling() / self.kind.scaling(rank))
        for name, tensor in adapter.items():
            slot = self.layout[name]
            part = tensor[tuple(slice(size) for size in self.kind.shape(slot, rank))]
            cut[name] = part * ratio if self.kind.counts(slot.role) else part
        return cut

    @abstractmethod
    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter | Merged:
        """The next adapter.

        Args:
            adapter: the tensors that federate, as the clients received them.
            updates: at least one, sorted by client, each with the tensors that it sent.

        Returns:
            New values for some or all of the tensors of `adapter`; the others stay as they are. Or these
            with a change of the base model, as `Merged`.
        """

    def reply(self, instruction: Instruction, trained: Adapter) -> Adapter:
        """What a client answers in a trip, from all that it holds; runs on the client.

        Args:
            instruction: as the client got it.
            trained: what the client holds after training, personal and frozen tensors included.

        Returns:
            Tensors by name; by default those that `instruction.send` names.
        """
        return {name: trained[name] for name in instruction.send}

    def relay(self, trip: int, updates: Sequence[Update]) -> Adapter:
        """What goes down for a later trip of a round, from the answers to the one before."""
        raise ContractError(f"{type(self).__name__} makes {self.trips} trips and has no relay")

    def diagnose(
        self, before: Adapter, updates: Sequence[Update], after: Adapter, merge: Change | None = None
    ) -> Mapping[str, float]:
        """Figures about a round's aggregation for `metrics.jsonl`: the aggregation error, where it can be had."""
        known = {**self.initial, **before}
        if self.partial_sums or self.trips > 1 or self.personal:
            return {}
        error = aggregation_error(self.layout, known, updates, {**known, **after}, kind=self.kind, merge=merge)
        return {"aggregation_error": error}

    def state(self) -> Mapping[str, Any]:
        """What must outlive a restart: arrays by name, and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""

    def instruct(self, round: int, adapter: Adapter, ranks: Collection[int] = ()) -> Instruction:
        """What a round's clients receive.

        Args:
            round: from 1.
            adapter: the tensors that the server holds.
            ranks: of the round's clients, where they are below the server's.
        """
        trains = returned.names(self._who("trains"), self.trains(round, self.layout))
        train = sorted(n for n in trains if self.layout[n].trainable)
        sends = set(returned.names(self._who("sends"), self.sends(round, self.layout)))
        keeps = returned.names(self._who("keeps"), self.keeps(self.layout))
        down = {name: adapter[name] for name in self.held}
        return Instruction(
            round=round,
            adapter=returned.tensors(self._who("receives"), self.receives(down, self.kind.r)),
            train=tuple(train),
            send=tuple(name for name in train if name in sends),
            keep=tuple(name for name in train if name in keeps),
            config=returned.mapping(self._who("config"), self.config(round), "words"),
            ranked={rank: self.receives(down, rank) for rank in sorted(ranks) if rank != self.kind.r},
            draw=self.draw(round),
        )

    def aggregated(self, adapter: Adapter, updates: Sequence[Update]) -> Merged:
        """What `aggregate` returned, if that is what it should.

        Raises:
            ContractError: it is no mapping of arrays.
        """
        made, who = self.aggregate(adapter, updates), self._who("aggregate")
        if isinstance(made, Merged):
            return Merged(returned.tensors(who, made.adapter), made.base)
        return Merged(returned.tensors(who, made), {})

    def _who(self, method: str) -> str:
        return returned.who(self, method)

    # Flower's interface, in terms of the above. `start` has no layout: there all that it sends trains.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message with the same content for each of the grid's nodes."""
        self._sent = wire.from_arrays(arrays)
        if self.layout:
            content = wire.pack_instruction(self.instruct(server_round, self._sent), self.layout)
        else:
            own = returned.mapping(self._who("config"), self.config(server_round), "words")
            words = ConfigRecord({**config, **own, wire.ROUND: server_round})
            content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: words})
        return [
            Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)
            for node in grid.get_node_ids()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`aggregate` over the replies, sorted by node."""
        good = sorted((r for r in replies if r.has_content()), key=lambda r: r.metadata.src_node_id)
        if not good:
            return None, None
        updates = [wire.unpack_update(reply.content, reply.metadata.src_node_id) for reply in good]
        made = self.aggregated(self._sent, updates)
        if made.base:
            raise ContractError(f"{type(self).__name__} merges into the base, which Flower's own loop cannot do")
        after = {**self._sent, **made.adapter}
        return wire.to_arrays(after), MetricRecord({"clients": len(good)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: the held-out set is evaluated by the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None: the held-out set is evaluated by the server."""
        return None

    def summary(self) -> None:
        """Log the strategy and its options."""
        logger.info("%r", self)


@dataclass(kw_only=True)
class Stock(Strategy):
    """A strategy of Flower's own on the adapter: it is sent messages, and given back replies."""

    inner: FlowerStrategy
    parts: Sequence[str] = ("A", "B", "head")  # roles of the tensors that federate

    def federates(self, layout: Layout) -> Collection[str]:
        """The tensors of the roles in `parts`."""
        return [name for name, slot in layout.items() if slot.role in self.parts]

    def instruct(self, round: int, adapter: Adapter, ranks: Collection[int] = ()) -> Instruction:
        """The arrays and words that the inner strategy would send."""
        base = super().instruct(round, adapter)
        nodes = _Nodes(2)  # how many do not matter: all are sent the same
        messages = list(
            self.inner.configure_train(round, wire.to_arrays(base.adapter), ConfigRecord(), nodes)  # type: ignore[arg-type]
        )
        if not messages:
            raise ContractError(f"{type(self.inner).__name__} sends no message to train in round {round}")
        told = wire.unpack_instruction(messages[0].content, self.layout)
        return Instruction(round=round, adapter=told.adapter, train=base.train, send=base.send, config=told.config)

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """What the inner strategy makes of the updates as replies."""
        replies = []
        for update in updates:
            ask = Message(content=RecordDict(), message_type=MessageType.TRAIN, dst_node_id=update.clients[0] + 1)
            whole = Update(
                adapter={**adapter, **update.adapter},
                weight=update.weight,
                clients=update.clients,
                metrics=update.metrics,
            )
            replies.append(Message(content=wire.pack_update(whole), reply_to=ask))
        try:
            arrays, _ = self.inner.aggregate_train(0, replies)
        except AppExitException as error:
            raise ContractError(f"{type(self.inner).__name__}: {error}") from error
        if arrays is None:
            raise ContractError(f"{type(self.inner).__name__} made no aggregate of {len(updates)} updates")
        return wire.from_arrays(arrays)

    def state(self) -> Mapping[str, Any]:
        """The arrays that the inner strategy holds, such as momenta: in mappings, records or lists."""
        state: dict[str, Any] = {"kinds": {}}
        for name, held in vars(self.inner).items():
            items: Iterable[tuple[Any, Any]] = held.items() if isinstance(held, Mapping | ArrayRecord) else ()
            if isinstance(held, list):
                items = enumerate(held)
            tensors = {str(k): v.numpy() if isinstance(v, Array) else v for k, v in items}
            if tensors and all(isinstance(v, np.ndarray) for v in tensors.values()):
                kind = "record" if isinstance(held, ArrayRecord) else type(held).__name__
                state["kinds"][name] = kind
                state |= {f"{name}/{key}": np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Give the inner strategy its arrays back."""
        for name, kind in state.get("kinds", {}).items():
            prefix = f"{name}/"
            tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            held: Any = tensors
            if kind == "list":
                held = [tensors[str(i)] for i in range(len(tensors))]
            elif kind == "record":
                held = ArrayRecord({k: Array(v) for k, v in tensors.items()})
            setattr(self.inner, name, held)


class _Nodes:
    """As much of a Grid as `configure_train` looks at."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)


def load(use: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy that a scenario names: a built-in, a custom one, or one of Flower's.

    Raises:
        SettingError: the name or an option is wrong.
    """
    cls = plugins.find("strategies", use)
    if issubclass(cls, Strategy):
        made: Strategy = plugins.build(cls, options, "strategy")
        return made
    if not issubclass(cls, FlowerStrategy):
        raise SettingError("strategy.use", f"{use} is neither a fedlora.Strategy nor a Flower Strategy")
    options = dict(options)
    parts = options.pop("parts", Stock.parts)
    if issubclass(cls, FedAvg):
        # Cohorts, minimum replies and evaluation are the scenario's business.
        quiet = {"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
        options = {**quiet, **options}
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        inner = plugins.build(cls, options, "strategy")
    finally:
        logging.getLogger("flwr").setLevel(level)
    return Stock(inner=inner, parts=tuple(parts))
