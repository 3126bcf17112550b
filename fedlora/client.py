"""The Client contract: train in a resident model, return an update."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora import plugins, returned
from fedlora.adapter import Adapter, Instruction, Update
from fedlora.data.store import Partition
from fedlora.errors import ContractError, SettingError
from fedlora.optimizers import contract
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import shared
from fedlora.privacy.mechanisms.bands import Coefficients, Past, coefficients
from fedlora.privacy.noise import Stream
from fedlora.scenario import Scenario
from fedlora.seeding import Root, stream

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Batch, Task

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a client for one round, as plain values.

    Attributes:
        round: from 1.
        train: names of the tensors to train.
        send: names of the tensors to send back.
        local_steps: optimiser steps.
        batch_size: examples in a step, or persons where they are protected; under Poisson sampling the expected
            number.
        sample_rate: where it is given, the probability that takes each into a step of a private client.
        batch_limit: most that a step takes of these, over the expected number; None: any.
        rows_per_person: most rows of a person that a step takes; None: all.
        lr: learning rate in the first local step; where roles have their own, the largest of these.
        lrs: learning rates by role, in the first local step; empty where all have `lr`.
        pace: learning rate of each local step, divided by that of the first; empty: constant.
        optimizer: its kind, options and state, as `clients.optimizer` has them; empty: plain SGD.
        state: of the optimiser, as the client kept it or the server averaged it; empty where it has none.
        micro_batch_size: about how many examples are in memory at once: at most half as many again.
        noise_multiplier: standard deviation of the noise over `clip_norm`; None without privacy.
        clip_norm: L2 bound on the gradient of one example, or person; None without privacy.
        clip: how examples are held to it, in the words of `privacy.clip`.
        quantile: of the examples' norms, where the bound moves.
        coefficients: of the bands of the noise; one alone: each step's is independent.
        sharers: by whose square root clients divide the noise, where they share it out; None: each adds all of it.
        range: that a number of the change may have, where noise is shared out.
        weight: of an update in a mean, where a private client may not report how many examples it has.
        share_metrics: whether figures computed from private examples may leave a private client.
        config: words of the strategy to the client.
    """

    round: int
    train: tuple[str, ...]
    send: tuple[str, ...]
    local_steps: int
    batch_size: int
    lr: float
    micro_batch_size: int = 16
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    clip: str = "flat"
    quantile: float | None = None
    coefficients: Coefficients = (1.0,)
    sharers: float | None = None
    range: float | None = None
    sample_rate: float | None = None
    batch_limit: float | None = None
    rows_per_person: int | None = None
    weight: float = 1.0
    share_metrics: bool = False
    lrs: Mapping[str, float] = field(default_factory=dict)
    pace: tuple[float, ...] = ()
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    state: Adapter = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bands(self) -> int:
        """Of the noise."""
        return len(self.coefficients)


class Setter:
    """The settings of a client in a round, from the scenario, the instruction and the calibrated noise."""

    def __init__(
        self,
        scenario: Scenario,
        noise: Mapping[int, float] | None,
        bands: Mapping[int, int] | None = None,
    ) -> None:
        self.scenario, self.noise, self.bands = scenario, noise, bands

    def __call__(self, instruction: Instruction, num_examples: int, client: int | None = None) -> Settings:
        """The settings of a client that holds `num_examples`, or as many persons where they are protected.

        Which client it is matters where some take fewer steps.
        """
        told, privacy = self.scenario.clients, self.scenario.example_privacy
        first, pace = told.pace(instruction.round, self.scenario.rounds)
        lrs = {role: first * lr for role, lr in told.rates.items()}
        noise, sharers = None if self.noise is None else self.noise[num_examples], None
        bands = 1 if self.bands is None else self.bands[num_examples]
        if (asked := self.scenario.shares_example_noise) is not None and noise is not None:
            noise, members = shared.told(instruction.config, noise, self.scenario.most_members)
            sharers = self.scenario.noise_parts(members)
        return Settings(
            round=instruction.round,
            train=instruction.train,
            send=instruction.send,
            local_steps=told.local_steps if client is None else instruction.steps.get(client, told.local_steps),
            batch_size=told.batch(num_examples),
            sample_rate=told.sample_rate,
            batch_limit=told.batch_limit,
            rows_per_person=privacy.rows_per_person if privacy else None,
            weight=1.0 if told.sample_rate is None else told.sample_rate * num_examples,
            lr=max(lrs.values()) if isinstance(told.lr, dict) else first * told.lr,
            micro_batch_size=told.micro_batch_size,
            noise_multiplier=noise,
            clip_norm=privacy.clip_norm if privacy else None,
            clip=privacy.clip.kind if privacy else "flat",
            quantile=privacy.clip.quantile if privacy else None,
            coefficients=coefficients(bands, self.scenario.counted_steps),
            sharers=sharers,
            range=None if asked is None else asked.range,
            share_metrics=privacy.share_metrics if privacy else True,
            lrs=lrs,
            pace=pace,
            optimizer={} if told.optimizer is None else told.optimizer.model_dump(),
            config=instruction.config,
        )


@dataclass(frozen=True)
class Rng:
    """The random numbers of one client in one round, a separate stream for each purpose.

    Attributes:
        root: a simulation's seed; at a site a key of the operating system, for this round alone.
        round: from 1.
        client: its id.
        draw: how often the client has drawn in this round before, for other inputs (`fedlora.privacy.replay`).
        first: the number of its first step, counted over the client's run from 0; of banded noise alone.
        past: the noise of its steps before, where they have any part in this round's.
    """

    root: Root
    round: int
    client: int
    draw: int = 0
    first: int = 0
    past: Past | None = None

    def __call__(self, purpose: str) -> Stream:
        """The stream of a purpose, such as `batches`, from its beginning."""
        again = ("draw", self.draw) if self.draw else ()
        return stream(self.root, self.round, self.client, purpose, *again)


class Client(ABC):
    """How a client trains. One instance serves all clients of a worker, one after another.

    Nothing of one client may stay behind for the next: an instance may keep buffers, never data.

    Attributes:
        private: whether updates are clipped and noised; such a client needs a `privacy` section.
        hooked: whether it steps by `optimizer` and `fedlora.optimizers.contract.Steps`, so that
            `clients.optimizer`, `clients.schedule` and learning rates by role work.
        clips: the ways of `privacy.clip` that a private one knows.
        banded: whether a private one draws by turns and noises by `Rng.past`, as `privacy.bands` asks for.
        persons: whether a private one draws and clips persons, as `privacy.person` asks for.
        limits: whether a private one draws batches again that are too large, as `clients.batch_limit` asks for.
    """

    private: bool = False
    hooked: bool = False
    clips: tuple[str, ...] = ("flat",)
    banded: bool = False
    persons: bool = False
    limits: bool = False

    def spends(self, num_examples: int, settings: Settings) -> Event | None:
        """The privacy event that `fit` amounts to, known before it starts; None if it is not private.

        Args:
            num_examples: that the client holds, or persons where they are protected.
            settings: of the round.
        """
        return None

    def noise(self, settings: Settings, event: Event, role: str) -> float:
        """Standard deviation of the noise in each number of a round's weighted change, of tensors of a role.

        Args:
            settings: of the round, as the server knows them: without noise, and without a number of examples.
            event: that the client paid.
            role: of the tensors.

        Returns:
            That of `weight * (sent - received)`, where the change carries independent normal noise.

        Raises:
            SettingError: it is not known, or not of that kind.
        """
        raise SettingError(
            "clients.use", f"{plugins.called(type(self))} does not say how much noise its changes carry"
        )

    def optimizer(self, parameters: Any, settings: Settings) -> "torch.optim.Optimizer":
        """The optimiser of a round; by default the one that the scenario names.

        Args:
            parameters: as an optimiser of torch takes them; in groups where roles have their own learning rates.
            settings: of the round.
        """
        return contract.build(parameters, settings)

    @abstractmethod
    def fit(self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng) -> Update:
        """Train on one client's examples.

        Args:
            task: the resident model; `task.begin` makes it this client's.
            adapter: the tensors that the server sent.
            partition: the client's examples.
            settings: of this round.
            rng: the only source of randomness.

        Returns:
            The tensors named by `settings.send`, and a weight that may leave the client.
        """


@dataclass(frozen=True)
class Pass:
    """A micro-batch that a client wants passed through the model, forward and back.

    Attributes:
        batch: as `Task.batch` makes it.
        over: what the sum of its losses is divided by.
        singly: whether gradients are asked for by example, in `grad_sample`, and not summed in `grad`.
    """

    batch: "Batch"
    over: int = 1
    singly: bool = False


Passes = Generator[Pass, "torch.Tensor", T]
"""Work that asks for passes: it is sent the loss of each, and finds the gradients on its parameters."""


class Stepwise(Client):
    """A client that asks for its passes, so that several clients can share each (`engine.fused`).

    Its loop is one and the same, whether it passes alone or beside others. Where `fit` is another, clients train
    one after another.
    """

    @abstractmethod
    def passes(
        self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng
    ) -> Passes[Update]:
        """As `fit`, with a `yield Pass(...)` wherever it wants one; between two, others may use the task."""

    def fit(self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng) -> Update:
        """Train alone."""
        passes = self.passes(task, adapter, partition, settings, rng)
        try:
            asked = next(passes)
            while True:
                asked = passes.send(self.backward(task, asked))
        except StopIteration as end:
            update: Update = end.value
            return update

    def backward(self, task: "Task", asked: Pass) -> "torch.Tensor":
        """Leave the gradients of one pass; its loss."""
        with task.autocast():
            loss = task.losses(asked.batch).sum() / asked.over
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def check_fused(client: Client, fused: int) -> None:
    """Make sure that clients can share passes where a scenario asks for it.

    Raises:
        SettingError: they train by a `fit` of their own.
    """
    if fused > 1 and not (isinstance(client, Stepwise) and type(client).fit is Stepwise.fit):
        raise SettingError(
            "engine.fused",
            f"{plugins.called(type(client))} trains by a fit of its own, and so one client after another: "
            "leave this out, or give it `passes` as fedlora.client.Stepwise has them",
        )


def check_private(client: Client, scenario: Scenario) -> None:
    """Make sure that clients protect examples where a scenario promises that, as it says, and not elsewhere.

    Raises:
        SettingError: they do not, or they do.
    """
    use, asked = scenario.clients.use, scenario.example_privacy
    if client.private and asked is None:
        raise SettingError("clients.use", f"{use} needs a privacy section")
    if not client.private and asked is not None:
        raise SettingError("clients.use", f"{use} adds no noise, and a privacy section is given")
    if asked is None:
        return
    own = "privacy" if asked is scenario.privacy else "privacy.example"
    clips, any_size = ", ".join(client.clips), scenario.clients.batch_limit is None
    for key, known, why in (
        (f"{own}.clip", asked.clip.kind in client.clips, f"knows no {asked.clip.kind}: take one of {clips}"),
        (f"{own}.bands", asked.bands is None or client.banded, "knows no banded noise: leave it out"),
        (f"{own}.person", asked.person is None or client.persons, "protects examples one by one: leave it out"),
        ("clients.batch_limit", any_size or client.limits, "draws batches of any size: leave it out"),
    ):
        if not known:
            raise SettingError(key, f"{use} {why}" + ", or take dp_sgd" * ("leave" in why))


def load(use: str, options: Mapping[str, Any]) -> Client:
    """The client class that a scenario names, with its options.

    Raises:
        SettingError: the name or an option is wrong.
    """
    cls = plugins.find_of("clients", use, Client)  # type: ignore[type-abstract]
    client: Client = plugins.build(cls, options, "clients")
    return client


def check_returned(client: Client, update: object) -> None:
    """Make sure that a client's training came to an update.

    Raises:
        ContractError: it came to something else.
    """
    name = returned.who(client, "fit")
    if not isinstance(update, Update):
        raise returned.wrong(name, update, "a fedlora.Update")
    returned.tensors(name, update.adapter)
    returned.figures(f"{name} in metrics", update.metrics)
    if not isinstance(returned.plain(update.weight), int | float):
        raise returned.wrong(f"{name} in weight", update.weight, "a number")
    if not isinstance(update.clients, tuple):
        raise returned.wrong(f"{name} in clients", update.clients, "(partition.client,)")


def spends(client: Client, num_examples: int, settings: Settings) -> Event | None:
    """What a client says that its training costs.

    Raises:
        ContractError: it is no event.
    """
    event = client.spends(num_examples, settings)
    if event is not None and not isinstance(event, Event):
        raise returned.wrong(returned.who(client, "spends"), event, "a fedlora.Event, or None")
    return event


def check_kept(client: Client) -> None:
    """Make sure that a client keeps no optimiser that has learnt something: it would carry it to the next client.

    Raises:
        ContractError: it does.
    """
    from torch.optim import Optimizer

    for name, value in vars(client).items():
        if isinstance(value, Optimizer) and value.state:
            raise ContractError(
                f"{plugins.called(type(client))} keeps an optimiser in {name!r}, whose state carries what one "
                "client's examples taught it to the next: make a new one in fit"
            )


def pull_towards(
    parameters: "list[torch.Tensor]", received: "list[torch.Tensor]", config: Mapping[str, Any]
) -> None:
    """Add the gradient of `proximal-mu / 2 * ||w - w_received||^2` (FedProx), if the strategy asks for it."""
    if mu := float(config.get("proximal-mu", 0.0)):
        for parameter, start in zip(parameters, received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)


def resting(task: "Task", settings: Settings, step: int) -> set[str]:
    """The tensors that stand still in a local step, where the strategy asks for turns.

    `turns` in `settings.config` names the roles that take turns, one a step, such as `B,A`; tensors of
    other roles train in every step.
    """
    if not (turns := str(settings.config.get("turns", ""))):
        return set()
    roles = turns.split(",")
    moves = roles[step % len(roles)]
    role = {name: task.layout[name].role for name in settings.train}
    return {name for name in settings.train if role[name] in roles and role[name] != moves}


def pulled(parameters: "list[torch.Tensor]") -> bool:
    """Whether a step should change something: a gradient is more than nothing, or none came at all.

    What is learnt to a loss of 0 has gradients of 0, which is no fault of wiring.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    return not grads or any(bool(grad.abs().max() > _NOTHING) for grad in grads)


_NOTHING = 1e-6  # of a gradient: a step of it may be less than float32 tells


def moved(parameters: "list[torch.Tensor]", received: "list[torch.Tensor]", each: bool) -> None:
    """Make sure that a step changed something: a detached copy trains silently into nothing.

    Args:
        parameters: after the step.
        received: before it.
        each: whether every tensor must have changed, as under noise, or at least one.

    Raises:
        ContractError: it did not.
    """
    quantifier: Callable[..., bool] = all if each else any
    if not quantifier(bool((p.detach() != s).any()) for p, s in zip(parameters, received, strict=True)):
        raise ContractError("a step left the trained tensors as they were: they are not the model's own")
