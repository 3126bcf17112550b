"""The filter of LA-LoRA (https://arxiv.org/abs/2602.19926) on gradients, and what it leaves of their noise."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Task


def smooth(task: "Task", parameters: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]) -> None:
    """Filter gradients by [1, 4, 6, 4, 1] / 16 along the layer's own side, if the strategy asks for `low-pass`.

    A (r x in) along its inputs, B (out x r) along its outputs, other tensors not at all; beyond its ends a
    gradient is mirrored.
    """
    import torch

    if not config.get("low-pass"):
        return
    for name, parameter in parameters.items():
        if (role := task.layout[name].role) not in ("A", "B") or parameter.grad is None:
            continue
        filtered = _filtered(parameter.grad if role == "A" else parameter.grad.T)  # (r, in or out)
        parameter.grad = (filtered if role == "A" else filtered.T).contiguous(
            memory_format=torch.contiguous_format
        )


def noise_left(shape: Sequence[int], role: str, low_pass: bool) -> "torch.Tensor | float":
    """What filtering a gradient leaves of its noise's variance: 1, or for each number what `smooth` leaves.

    Args:
        shape: of the tensor.
        role: of the tensor.
        low_pass: whether gradients are filtered.
    """
    import torch

    if not low_pass or role not in ("A", "B"):
        return 1.0
    length = shape[1] if role == "A" else shape[0]
    few = min(length, 9)  # what mirrored ends do to their neighbours; between them all are alike
    squares = _filtered(torch.eye(few)).square().sum(0)
    row = torch.cat([squares[:4], squares[4].expand(length - 8), squares[5:]]) if length > few else squares
    return row if role == "A" else row[:, None]


def _filtered(rows: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import conv1d, pad

    kernel = rows.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]).view(1, 1, 5) / 16
    return conv1d(pad(rows.unsqueeze(1), (2, 2), mode="reflect"), kernel).squeeze(1)
