"""DP-SGD (Abadi et al., 2016, https://arxiv.org/abs/1607.00133) by Opacus, on the adapter alone.

Each step takes every example with probability `q = batch_size / n`, and with `g_i` the gradient of
example i over all trained tensors together

    w <- w - lr / batch_size * (sum_i g_i * min(1, C / ||g_i||) + N(0, (sigma C)^2 I))

The batch may be empty: the noise is added all the same. Large batches pass through the model in
micro-batches, which changes nothing in the sum.

`per_layer` clips the gradient of each of the L trained tensors by itself, to C / sqrt(L): together they stay
within C.
With `quantile` C starts each round at `clip_norm` and moves after each step (`fedlora.Quantile`).
"""

import logging
import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.adapter import Adapter, Update
from fedlora.client import Pass, Passes, Rng, Settings, Stepwise, moved, pull_towards, resting, smooth
from fedlora.data.store import Partition
from fedlora.errors import ContractError, SettingError
from fedlora.optimizers.contract import Steps, grouped, noise_left
from fedlora.passes.lowrank import by_example
from fedlora.privacy.accounting import Event, Quantile
from fedlora.privacy.noise import Stream

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Task


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DPSGD(Stepwise):
    """Clips each example, noises the sum; weighs all clients alike, so that no count leaves.

    Attributes:
        per_layer: clip each trained tensor by itself; helps where one tensor's gradients outweigh the others'.
        quantile: of the examples' norms, in (0, 1), that the bound moves towards in a round; None: it is fixed.
    """

    private = True
    hooked = True
    per_layer: bool = False
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"quantile lies between 0 and 1, not at {self.quantile!r}")
        if self.quantile is not None and self.per_layer:
            raise ValueError("per_layer goes with a fixed bound: leave quantile out")

    def spends(self, num_examples: int, settings: Settings) -> Event:
        """`local_steps` steps at `batch_size / n`; where the bound adapts, sum and count together."""
        if settings.noise_multiplier is None or settings.clip_norm is None:
            raise ContractError("dp_sgd was given no noise multiplier or clip norm")
        if self.quantile is not None and settings.batch_size <= 10 * settings.noise_multiplier:
            raise SettingError(
                "clients.quantile",
                f"batches of {settings.batch_size} are too small for a bound that adapts: at noise multiplier "
                f"{settings.noise_multiplier:.3g} they take more than {10 * settings.noise_multiplier:.0f}; "
                "leave it out",
            )
        return Event(
            noise_multiplier=settings.noise_multiplier,
            sample_rate=settings.batch_size / num_examples,
            steps=settings.local_steps,
            clip_norm=settings.clip_norm,
        )

    def passes(
        self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng
    ) -> Passes[Update]:
        """Train; the training loss stays here unless `share_metrics` lets it out."""
        import torch

        event = self.spends(len(partition), settings)
        parameters = task.begin(adapter, settings.train)
        _hook(task, settings.train)
        received = [p.detach().clone() for p in parameters]
        inner = self.optimizer(grouped(task.layout, settings.train, parameters, settings), settings)
        steps = Steps(inner, settings.train, parameters, settings)
        optimizer = self._optimizer(
            inner,
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=event.clip_norm,
            expected_batch_size=settings.batch_size,
            noise=rng(noise_stream(event)),
        )
        batches = rng("batches")
        loss_sum, taken, dropped = torch.zeros((), device=task.device), 0, 0
        for step in range(settings.local_steps):
            still = resting(task, settings, step)
            for name, parameter in zip(settings.train, parameters, strict=True):
                parameter.requires_grad_(name not in still)
            moving = [p for p in parameters if p.requires_grad]
            rows = partition.rows[batches.random(len(partition)) < event.sample_rate]
            parts = list(task.micro_batches(partition.examples, rows, settings.micro_batch_size))
            for i, (batch, _) in enumerate(parts):
                optimizer.zero_grad(set_to_none=True)
                loss_sum += yield Pass(batch, singly=True)
                dropped += _make_safe(moving, len(batch["targets"]))
                _fill(parameters, len(batch["targets"]))
                if i < len(parts) - 1:
                    optimizer.signal_skip_step()
                    optimizer.step()
            if not len(rows):
                optimizer.zero_grad(set_to_none=True)
                _fill(parameters, 0, all=True)
            variance = (optimizer.noise_multiplier * optimizer.max_grad_norm / settings.batch_size) ** 2
            if optimizer.pre_step():
                for parameter in parameters:
                    if not parameter.requires_grad:
                        parameter.grad = None  # what rests is not moved by the noise either
                smooth(task, dict(zip(settings.train, parameters, strict=True)), settings.config)
                pull_towards(parameters, received, settings.config)  # looks at no example: costs no privacy
                steps.take(step, _variances(task, settings, variance))
            taken += len(rows)
            if step == 0:
                first = [r for p, r in zip(parameters, received, strict=True) if p.requires_grad]
                moved(moving, first, each=True)
        optimizer.zero_grad(set_to_none=True)
        if dropped:  # told here alone: how many there were depends on the examples
            logger.warning("client %d: left out %d gradients that are not finite", partition.client, dropped)
        shared, odd = settings.share_metrics, {"not_finite": float(dropped)} if dropped else {}
        return Update(
            adapter=task.read(settings.send),
            weight=float(len(partition)) if shared else 1.0,
            clients=(partition.client,),
            metrics={"train_loss": float(loss_sum) / max(taken, 1)} | odd if shared else {},
            state=steps.kept(),
        )

    def backward(self, task: "Task", asked: Pass) -> "torch.Tensor":
        """Leave the gradient of each example; the sum of the losses."""
        return _backward(task, asked.batch)

    @staticmethod
    def apart(task: "Task", adapter: Adapter, train: tuple[str, ...], batch: Any) -> "list[torch.Tensor]":
        """As the function of this name: how `fedlora.passes.alone` asks for the gradients of examples."""
        return apart(task, adapter, train, batch)

    def _optimizer(
        self, inner: "torch.optim.Optimizer", noise: Stream, *, max_grad_norm: float, **told: Any
    ) -> Any:
        """Opacus's optimiser that clips as asked, with noise from a stream."""
        if self.quantile is not None:
            return _adaptive(inner, noise, self.quantile, max_grad_norm=max_grad_norm, **told)
        if not self.per_layer:
            return _noised("DPOptimizer")(inner, noise, max_grad_norm=max_grad_norm, **told)
        count = sum(len(group["params"]) for group in inner.param_groups)
        bounds = [max_grad_norm / math.sqrt(count)] * count
        return _noised("DPPerLayerOptimizer")(inner, noise, max_grad_norm=bounds, **told)


@cache
def _noised(name: str) -> Any:
    """One of Opacus's optimisers with noise from a stream, and not from a generator of torch."""
    import torch
    from opacus import optimizers
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class Noised(getattr(optimizers, name)):  # type: ignore[misc]
        def __init__(self, inner: torch.optim.Optimizer, noise: Stream, **told: Any) -> None:
            super().__init__(inner, **told)
            self.noise = noise

        def add_noise(self) -> None:
            """Add N(0, (sigma C)^2) to each sum, in float64; what comes out is rounded to float32."""
            sizes = [p.numel() for p in self.params]
            drawn = torch.from_numpy(self.noise.standard_normal(sum(sizes)))
            drawn *= self.noise_multiplier * self.max_grad_norm
            parts = torch.split(drawn.to(self.params[0].device), sizes)
            for p, part in zip(self.params, parts, strict=True):
                _check_processed_flag(p.summed_grad)
                p.grad = (p.summed_grad.flatten() + part).to(p.dtype).view_as(p)
                _mark_as_processed(p.summed_grad)

    return Noised


def _adaptive(
    inner: "torch.optim.Optimizer", noise: Stream, quantile: float, *, noise_multiplier: float, **told: Any
) -> Any:
    """An optimiser whose bound moves after each step.

    Not Opacus's own for this: it divides the count by how many examples a batch really has, which nobody may
    know, fails on an empty batch and forgets the count between micro-batches.
    """
    import torch

    class Adaptive(_noised("DPOptimizer")):  # type: ignore[misc]
        max_grad_norm: float
        count = 0.0  # of examples within the bound, in terms of +-1/2

        def clip_and_accumulate(self) -> None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in self.grad_samples], 1).norm(dim=1)
            self.count += float((norms <= self.max_grad_norm).sum()) - len(norms) / 2
            super().clip_and_accumulate()

        def add_noise(self) -> None:
            super().add_noise()
            count = self.count + float(self.noise.normal(0.0, moves.count_noise)[0])
            self.max_grad_norm = moves.moved(self.max_grad_norm, count)
            self.count = 0.0

    moves = Quantile(quantile=quantile, expected=told["expected_batch_size"], noise_multiplier=noise_multiplier)
    return Adaptive(inner, noise, noise_multiplier=moves.sum_noise, **told)


def _variances(task: "Task", settings: Settings, variance: float) -> "dict[str, torch.Tensor | float]":
    """Of the noise in the gradient of each tensor, once it is filtered where the strategy asks for that."""
    low_pass = bool(settings.config.get("low-pass"))
    shapes = {name: task.kind.shape(task.layout[name], task.rank) for name in settings.train}
    return {name: variance * noise_left(shape, task.layout[name].role, low_pass) for name, shape in shapes.items()}


def noise_stream(event: Event) -> str:
    """The purpose that a round's noise is drawn for.

    Noise of another size is another draw. Were it the same one scaled, a round that ran twice would show
    the sum without any noise.
    """
    return f"noise {event.noise_multiplier!r} {event.clip_norm!r}"


def _hook(task: "Task", train: tuple[str, ...]) -> None:
    """Per-example gradients: of low-rank layers by themselves, of other trained layers by Opacus.

    The hooks stay while the same tensors train. What a client that failed in the middle of a pass left
    in them is cleared away.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    task.low_rank.singly = True

    for module in task.model.modules():
        for name in ("activations", "max_batch_len"):
            vars(module).pop(name, None)
    for parameter in task.model.parameters():
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter, parameter.grad_sample = 0, None
            vars(parameter).pop("_current_grad_sample", None)
    if not task.own:  # layers of fused clients make them all
        return
    if vars(task.model).get("fedlora_hooked") == train:
        return
    _unhook(task)  # from tensors that trained before
    for name, module in task.model.named_modules():
        if isinstance(module, _BatchNorm):
            raise SettingError(
                "model.base", f"{name} normalises over the batch, so examples are not apart; DP-SGD cannot use it"
            )
    _hooks(task)
    vars(task.model)["fedlora_hooked"] = train


def _unhook(task: "Task") -> None:
    for handle in getattr(task.model, "autograd_grad_sample_hooks", ()):
        handle.remove()
    for name in ("autograd_grad_sample_hooks", "fedlora_hooked"):
        vars(task.model).pop(name, None)


def apart(task: "Task", adapter: Adapter, train: tuple[str, ...], batch: Any) -> "list[torch.Tensor]":
    """The gradient of each example, (examples, *shape) for each of `train`, as a private client's pass makes them.

    Raises:
        SettingError: the model cannot be trained privately.
        ContractError: the gradients are not of examples.
    """
    parameters = task.begin(adapter, train)
    try:
        _hook(task, train)
        _backward(task, batch)
        _make_safe(parameters, len(batch["targets"]))
        return [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]
    finally:  # as if there had been no pass
        _unhook(task)
        for parameter in parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]


def _hooks(task: "Task") -> None:
    """Opacus's hooks, for modules too that see the examples one after another in a row without padding."""
    import torch
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    def linear(
        layer: torch.nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each example `sum_t g_t x_t^T` over its tokens, in float32, and without padding anything."""
        if (lies := task.low_rank.find(backprops)) is None:
            return of_batch(layer, activations, backprops)  # type: ignore[no-any-return]
        found = {}
        if layer.weight.requires_grad:
            sides = (backprops[0], activations[0][0])
            wide = layer.in_features >= layer.out_features
            made = by_example(*(sides if wide else sides[::-1]), lies)
            found[layer.weight] = made if wide else made.transpose(1, 2)
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = torch.stack([g.sum(0) for g in torch.split(backprops[0].float(), lies.lengths)])
        return found

    def norm(
        layer: torch.nn.LayerNorm, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each example `sum_t g_t x_t`, x normalised; Opacus's own wants a bias."""
        if layer.bias is not None:
            return of_norm(layer, activations, backprops)  # type: ignore[no-any-return]
        x = torch.nn.functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
        return {layer.weight: (x * backprops).float().view(len(x), -1, *layer.weight.shape).sum(1)}

    class Hooks(GradSampleHooks):  # type: ignore[misc]
        GRAD_SAMPLERS: ClassVar = {
            **GradSampleHooks.GRAD_SAMPLERS,
            torch.nn.Linear: linear,
            torch.nn.LayerNorm: norm,
        }

        def capture_backprops_hook(self, module: Any, *arguments: Any, **options: Any) -> None:
            if getattr(module, "activations", None):  # none where all of the module rests in this step
                super().capture_backprops_hook(module, *arguments, **options)

        def rearrange_grad_samples(
            self, *, module: Any, backprops: torch.Tensor, loss_reduction: str, batch_first: bool
        ) -> tuple[list[torch.Tensor], torch.Tensor]:
            activations = module.activations.pop()
            lies = task.low_rank.lie(backprops, module)
            module.max_batch_len = task.low_rank.examples
            if lies is None or type(module) is torch.nn.Linear:
                return activations, backprops
            # Padding comes back as zeros, which add nothing to the gradient of any example.
            return [lies.batch(a) for a in activations], lies.batch(backprops)

    of_batch, of_norm = (GradSampleHooks.GRAD_SAMPLERS[kind] for kind in (torch.nn.Linear, torch.nn.LayerNorm))
    # Not strict: Opacus refuses any buffer, also the position ids of a frozen encoder.
    Hooks(task.model, strict=False, loss_reduction="sum")


def _backward(task: "Task", batch: Any) -> "torch.Tensor":
    """Leave per-example gradients on the parameters; the sum of the losses."""
    with warnings.catch_warnings():  # a frozen A passes no gradient to the input of its B, as it should be
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        with task.autocast():
            loss = task.losses(batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _fill(parameters: "list[torch.Tensor]", examples: int, all: bool = False) -> None:
    """Per-example gradients of zero for what rests, or for all in an empty batch."""
    for parameter in parameters:
        if all or not parameter.requires_grad:
            parameter.grad_sample = parameter.new_zeros((examples, *parameter.shape))  # type: ignore[attr-defined]


def _make_safe(parameters: "list[torch.Tensor]", examples: int) -> int:
    """Per-example gradients in float32, so that norms are exact, and without examples that overflowed.

    An example whose gradient is not finite is left out of the sum; the noise is not.

    Args:
        parameters: that train, with their gradients.
        examples: of the pass.

    Returns:
        How many examples were left out.

    Raises:
        ContractError: there is not one gradient for each example, so that clipping would not bound its part.
    """
    import torch

    samples = []
    for parameter in parameters:
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, torch.Tensor):
            raise ContractError("a trained tensor has no per-example gradient: it took no part in the loss")
        if sample.shape != (examples, *parameter.shape):
            raise ContractError(f"a trained tensor has {len(sample)} gradients, and there are {examples} examples")
        samples.append(sample.float())  # (examples, *shape)
    finite = torch.isfinite(torch.stack([s.flatten(1).sum(1) for s in samples])).all(0)  # (examples,)
    left_out = int((~finite).sum())
    for parameter, sample in zip(parameters, samples, strict=True):
        if left_out:
            sample[~finite] = 0.0
        parameter.grad_sample = sample  # type: ignore[attr-defined]
    return left_out
