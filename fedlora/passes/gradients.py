"""The gradient of each example by itself, as private training clips them.

Layers with low-rank factors give them by products of their own (`fedlora.passes.lowrank`); other trained layers by
Opacus's hooks, which here take examples one after another in a row without padding too.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.adapter import Tensor
from fedlora.errors import ContractError, SettingError
from fedlora.passes.lowrank import by_example

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Task


def hook(task: "Task", train: tuple[str, ...]) -> None:
    """Let a pass leave the gradient of each example: of low-rank layers by themselves, of other layers by Opacus.

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
    unhook(task)  # from tensors that trained before
    for name, module in task.model.named_modules():
        if isinstance(module, _BatchNorm):
            raise SettingError(
                "model.base", f"{name} normalises over the batch, so examples are not apart; DP-SGD cannot use it"
            )
    _hooks(task)
    vars(task.model)["fedlora_hooked"] = train


def unhook(task: "Task") -> None:
    """Take the hooks away."""
    for handle in getattr(task.model, "autograd_grad_sample_hooks", ()):
        handle.remove()
    for name in ("autograd_grad_sample_hooks", "fedlora_hooked"):
        vars(task.model).pop(name, None)


def apart(task: "Task", adapter: Mapping[str, Tensor], train: tuple[str, ...], batch: Any) -> "list[torch.Tensor]":
    """The gradient of each example, (examples, *shape) for each of `train`, as a private client's pass makes them.

    Raises:
        SettingError: the model cannot be trained privately.
        ContractError: the gradients are not of examples.
    """
    parameters = task.begin(adapter, train)
    try:
        hook(task, train)
        backward(task, batch)
        make_safe(parameters, len(batch["targets"]))
        return [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]
    finally:  # as if there had been no pass
        unhook(task)
        for parameter in parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]


def _hooks(task: "Task") -> None:
    """Opacus's hooks, for modules too that see the examples one after another in a row without padding."""
    import torch
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    from fedlora.kinds.modules import Mapped, Scales, Scatter

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

    def scales(
        layer: Scales, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each example `sum_t g_t * x_t`, summed over what has one factor."""
        x = activations[0]
        each = (x.float() * backprops.float()).reshape(len(x), -1, x.shape[-1]).sum(1)
        return {layer.weight: layer.pull(each)}

    def entries(
        layer: Scatter, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each example `sum_t g_t x_t^T` at the places."""
        places = layer.places()
        return {layer.values: torch.stack([whole[places] for whole in wholes(activations[0], backprops)])}

    def mapped(
        layer: Mapped, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each example `sum_t g_t x_t^T`, pulled back through the linear map."""
        return {layer.values: layer.pull(wholes(activations[0], backprops))}

    def convolution(
        layer: torch.nn.Conv2d, activations: list[torch.Tensor], backprops: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor]:
        """For each image `sum_p g_p x_p^T` over places p, x_p what the kernel sees there; one group, no bias.

        That of Opacus 1.6 is wrong where channels are last in memory.
        """
        told = {name: getattr(layer, name) for name in ("dilation", "padding", "stride")}
        seen = torch.nn.functional.unfold(activations[0].float(), layer.kernel_size, **told)  # (images, in h w, p)
        made = backprops.float().flatten(2) @ seen.transpose(1, 2)
        return {layer.weight: made.view(len(made), *layer.weight.shape)}

    def wholes(x: torch.Tensor, backprops: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each example `sum_t g_t x_t^T`, one after another: it is whole for a moment."""
        if (lies := task.low_rank.find(backprops)) is None:
            sides = zip(backprops.flatten(1, -2), x.flatten(1, -2), strict=True)
        else:
            sides = zip(*(torch.split(side[0], lies.lengths) for side in (backprops, x)), strict=True)
        return (g.float().t() @ x.float() for g, x in sides)

    class Hooks(GradSampleHooks):  # type: ignore[misc]
        GRAD_SAMPLERS: ClassVar = {
            **GradSampleHooks.GRAD_SAMPLERS,
            torch.nn.Linear: linear,
            torch.nn.LayerNorm: norm,
            Scales: scales,
            Scatter: entries,
            torch.nn.Conv2d: convolution,
            Mapped: mapped,
        }

        def capture_activations_hook(self, *arguments: Any) -> None:
            if not task.again.now:
                super().capture_activations_hook(*arguments)

        def capture_backprops_hook(self, module: Any, *arguments: Any, **options: Any) -> None:
            if getattr(module, "activations", None):  # none where all of the module rests in this step
                super().capture_backprops_hook(module, *arguments, **options)

        def rearrange_grad_samples(
            self, *, module: Any, backprops: torch.Tensor, loss_reduction: str, batch_first: bool
        ) -> tuple[list[torch.Tensor], torch.Tensor]:
            activations = module.activations.pop()
            lies = task.low_rank.lie(backprops, module)
            module.max_batch_len = task.low_rank.examples
            if lies is None and (count := task.low_rank.sequences) > 1:
                each = [x.reshape(-1, count, *x.shape[1:]) for x in (*activations, backprops)]
                return each[:-1], each[-1]
            if lies is None or type(module) in (torch.nn.Linear, Scatter, Mapped):
                return activations, backprops
            # Padding comes back as zeros, which add nothing to the gradient of any example.
            return [lies.batch(a) for a in activations], lies.batch(backprops)

    of_batch, of_norm = (GradSampleHooks.GRAD_SAMPLERS[kind] for kind in (torch.nn.Linear, torch.nn.LayerNorm))
    # Not strict: Opacus refuses any buffer, also the position ids of a frozen encoder.
    Hooks(task.model, strict=False, loss_reduction="sum")


def backward(task: "Task", batch: Any) -> "torch.Tensor":
    """Leave per-example gradients on the parameters; the sum of the losses."""
    with warnings.catch_warnings():  # a frozen A passes no gradient to the input of its B, as it should be
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        with task.autocast():
            loss = task.losses(batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def fill(parameters: "list[torch.Tensor]", examples: int, all: bool = False) -> None:
    """Per-example gradients of zero for what does not train, or for all in an empty batch."""
    for parameter in parameters:
        if all or not parameter.requires_grad:
            parameter.grad_sample = parameter.new_zeros((examples, *parameter.shape))  # type: ignore[attr-defined]


def make_safe(parameters: "list[torch.Tensor]", examples: int) -> int:
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
