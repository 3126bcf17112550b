"""DP-SGD (Abadi et al., 2016, https://arxiv.org/abs/1607.00133) by Opacus, on the adapter alone.

Each step takes every example with probability `q = batch_size / n`, and with `g_i` the gradient of
example i over all trained tensors together

    w <- w - lr / batch_size * (sum_i g_i * min(1, C / ||g_i||) + N(0, (sigma C)^2 I))

The batch may be empty: the noise is added all the same. Large batches pass through the model in
micro-batches, which changes nothing in the sum.

How an example is held to C is `privacy.clip`; the equation is that of `flat`, and the others are in
`fedlora.privacy.mechanisms.dp_sgd`. Where `privacy.bands` is set, examples take turns and the noise of a step
takes back a part of the steps before (`fedlora.privacy.mechanisms.bands`). Where `privacy.person` is set, persons
have the place of examples, and g_i is the mean over a person's rows (`fedlora.privacy.mechanisms.persons`). Where
`secure_aggregation.noise` is shared, each client adds a part of the noise (`fedlora.privacy.mechanisms.shared`).
"""

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from fedlora.adapter import Adapter, Update
from fedlora.client import Pass, Passes, Rng, Settings, Stepwise, moved, pull_towards, resting
from fedlora.data.store import Partition
from fedlora.errors import ContractError, SettingError
from fedlora.optimizers.contract import Steps, grouped
from fedlora.optimizers.low_pass import noise_left, smooth
from fedlora.passes import gradients
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import banded
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.mechanisms.persons import Part, Persons, cut
from fedlora.privacy.mechanisms.shared import Shared

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Batch, Task


logger = logging.getLogger(__name__)


class DPSGD(Stepwise):
    """Clips each example, noises the sum; weighs all clients alike, or as their public sampling rate says."""

    private = True
    hooked = True
    clips = ("flat", "per_layer", "quantile", "automatic")
    banded = True
    persons = True
    limits = True

    def spends(self, num_examples: int, settings: Settings) -> Event:
        """`local_steps` steps at `batch_size / n`; where the bound adapts, sum and count together."""
        return self.mechanism(num_examples, settings).event()

    def noise(self, settings: Settings, event: Event, role: str) -> float:
        """`w / b sigma C sqrt(sum_t lr_t^2)` over the steps t in which the role moves, of weight w and batch b.

        w / b is known without how many examples there are: it is `1 / b`, 1 where w is the expected batch, and
        `1 / q` where w is the number of examples, of which a step takes each with probability q.
        """
        cls, told = type(self), settings.optimizer
        if any(getattr(cls, name) is not getattr(DPSGD, name) for name in ("passes", "mechanism", "optimizer")):
            return super().noise(settings, event, role)
        for key, here, why in (
            ("clients.optimizer", told.get("kind", "sgd") != "sgd", "its steps are no sum of gradients"),
            ("clients.optimizer", told.get("momentum") or told.get("weight_decay"), "it outlasts a step"),
            ("privacy.clip", settings.clip == "quantile", "its bound moves at clients, who keep it to themselves"),
            ("privacy.bands", event.bands > 1, "banded noise takes back a part of itself"),
            ("strategy.low_pass", settings.config.get("low-pass"), "what is filtered is not independent"),
            ("strategy.use", settings.config.get("proximal-mu"), "a pull outlasts a step"),
        ):
            if here:
                raise SettingError(key, f"how much noise a client's change carries is not known: {why}")
        turns = str(settings.config.get("turns", "")).split(",")
        pace = settings.pace or (1.0,) * event.steps
        moving = [
            f for t, f in enumerate(pace[: event.steps]) if turns[t % len(turns)] == role or role not in turns
        ]
        each = 1 / settings.batch_size if settings.sample_rate is None else 1.0
        each = 1 / event.sample_rate if settings.share_metrics else each
        steps = settings.lrs.get(role, settings.lr) * math.sqrt(sum(f**2 for f in moving))
        return each * event.noise_multiplier * event.clip_norm * steps

    def mechanism(self, num_examples: int, settings: Settings) -> ExampleGaussian:
        """How a round's batches are drawn, examples clipped and sums noised; its event is what is paid for."""
        if settings.noise_multiplier is None or settings.clip_norm is None:
            raise ContractError("dp_sgd was given no noise multiplier or clip norm")
        rate, sharers = settings.sample_rate, settings.sharers or 1.0
        batch_size = settings.batch_size if rate is None else rate * num_examples
        limit = settings.batch_limit
        most = None if limit is None else max(int(min(limit * batch_size, num_examples) + 1e-9), 1)
        told: dict[str, Any] = dict(
            noise_multiplier=settings.noise_multiplier / math.sqrt(sharers),
            sample_rate=settings.batch_size / num_examples if rate is None else rate,
            total=num_examples,
            quantile=settings.quantile,
            batch_size=batch_size,
            most=most,
            steps=settings.local_steps,
            clip_norm=settings.clip_norm,
            clip=settings.clip,
        )
        if settings.range is not None:
            return Shared(**told, sharers=sharers, range=settings.range)
        made = ExampleGaussian(**told)
        return made if settings.bands == 1 else banded(made, settings.coefficients)

    def passes(
        self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng
    ) -> Passes[Update]:
        """Train; the training loss stays here unless `share_metrics` lets it out."""
        import torch

        mechanism = self.mechanism(partition.units, settings)
        if self.spends(partition.units, settings) != mechanism.event():
            raise ContractError(
                f"{type(self).__name__} pays for something else than it does: override `mechanism`"
            )
        parameters = task.begin(adapter, settings.train)
        gradients.hook(task, settings.train)
        received = [p.detach().clone() for p in parameters]
        inner = self.optimizer(grouped(task.layout, settings.train, parameters, settings), settings)
        steps = Steps(inner, settings.train, parameters, settings)
        noise = mechanism.noise(rng)
        optimizer = mechanism.optimizer(inner, noise)
        batches = rng("batches")
        people = None if partition.persons is None else Persons(partition.rows, partition.persons)
        loss_sum, taken, dropped = torch.zeros((), device=task.device), 0, 0
        for step in range(mechanism.steps):
            still = resting(task, settings, step)
            for name, parameter in zip(settings.train, parameters, strict=True):
                parameter.requires_grad_(name not in still)
            moving = [p for p in parameters if p.requires_grad]
            chosen = mechanism.taken(batches, rng.first + step)
            parts: list[tuple[Batch, Part | None]]
            if people is None:
                alone = task.micro_batches(partition.examples, partition.rows[chosen], settings.micro_batch_size)
                parts = [(batch, None) for batch, _ in alone]
            else:
                drawn = people.drawn(chosen, settings.rows_per_person, rng, step)
                held = partition.examples
                sequences = partial(task.sequences, held)
                told = cut(drawn, held.lengths, sequences, settings.micro_batch_size)
                parts = [(task.batch(held, part.rows), part) for part in told]
            begun: list[torch.Tensor] = []
            for i, (batch, part) in enumerate(parts):
                count = len(batch["targets"])
                optimizer.zero_grad(set_to_none=True)
                loss_sum += yield Pass(batch, singly=True)
                dropped += gradients.make_safe(moving, count)
                taken += count
                if part is not None:
                    begun, count = part.join(moving, begun), part.whole
                gradients.fill(parameters, count)
                if i < len(parts) - 1:
                    optimizer.signal_skip_step()
                    optimizer.step()
            if not parts:
                optimizer.zero_grad(set_to_none=True)
                gradients.fill(parameters, 0, all=True)
            variance = (optimizer.noise_multiplier * optimizer.max_grad_norm / mechanism.batch_size) ** 2
            variance *= getattr(noise, "variance", 1.0)
            if optimizer.pre_step():
                for parameter in parameters:
                    if not parameter.requires_grad:
                        parameter.grad = None  # what rests is not moved by the noise either
                smooth(task, dict(zip(settings.train, parameters, strict=True)), settings.config)
                pull_towards(parameters, received, settings.config)  # looks at no example: costs no privacy
                steps.take(step, _variances(task, settings, variance))
            if step == 0:
                first = [r for p, r in zip(parameters, received, strict=True) if p.requires_grad]
                moved(moving, first, each=True)
        optimizer.zero_grad(set_to_none=True)
        if dropped:  # told here alone: how many there were depends on the examples
            logger.warning("client %d: left out %d gradients that are not finite", partition.client, dropped)
        shared, odd = settings.share_metrics, {"not_finite": float(dropped)} if dropped else {}
        return Update(
            adapter=task.read(settings.send),
            weight=float(mechanism.total) if shared else settings.weight,
            clients=(partition.client,),
            metrics={"train_loss": float(loss_sum) / max(taken, 1)} | odd if shared else {},
            state=steps.kept(),
        )

    def backward(self, task: "Task", asked: Pass) -> "torch.Tensor":
        """Leave the gradient of each example; the sum of the losses."""
        return gradients.backward(task, asked.batch)


def _variances(task: "Task", settings: Settings, variance: float) -> "dict[str, torch.Tensor | float]":
    """Of the noise in the gradient of each tensor, once it is filtered where the strategy asks for that."""
    low_pass = bool(settings.config.get("low-pass"))
    shapes = {name: task.kind.shape(task.layout[name], task.rank) for name in settings.train}
    return {name: variance * noise_left(shape, task.layout[name].role, low_pass) for name, shape in shapes.items()}
