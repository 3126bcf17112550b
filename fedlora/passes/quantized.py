"""Frozen linear layers that bitsandbytes holds in 4 or 8 bits, unfolded for each product.

bitsandbytes stores the weights; its own products are not used. Those of 8 bits round the input too, and treat
apart whatever column is large for any token of the batch (LLM.int8(), https://arxiv.org/abs/2208.07339): an
example's gradient would depend on those beside it, and clipping it would not bound its part. Others cast biases
for good on the way. Here a layer is a linear layer whose weight is made when it is needed, forward and back.
"""

import copy
from collections.abc import Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fedlora.errors import SettingError

if TYPE_CHECKING:
    import torch


def hold(model: "torch.nn.Module") -> Iterator[Any]:
    """Take over the layers of a model whose weights are held so: themselves, to compute in float32 at first.

    Raises:
        SettingError: one has a weight that is no whole number of blocks.
    """
    import torch

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.is_floating_point():
            _take(name, layer)
            yield layer


def _take(name: str, layer: Any) -> None:
    import torch

    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        if state.shape.numel() % state.blocksize:
            shape = " x ".join(map(str, state.shape))
            raise SettingError("model.quantize", f"{name} is {shape}, no whole blocks: write 8bit")
        # A block to a row: bitsandbytes 0.50 mixes up the scales of rows that share one, on a CPU.
        layer.fedlora_blocks = copy.copy(state)
        layer.fedlora_blocks.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    layer.forward = partial(_forward, layer)
    compute_in(layer, torch.float32)


def compute_in(layer: Any, dtype: "torch.dtype") -> None:
    """Let a held layer's products be of that precision; its bias must be too."""
    layer.fedlora_dtype = dtype


def is_held(layer: Any) -> bool:
    """Whether a layer's weight is held in few bits."""
    return "fedlora_dtype" in vars(layer)


def dtype(layer: Any) -> "torch.dtype":
    """The precision of a linear layer's products."""
    found: torch.dtype = layer.fedlora_dtype if is_held(layer) else next(layer.parameters()).dtype
    return found


def weight(layer: Any) -> "torch.Tensor":
    """A frozen weight in the precision of its products: itself, or unfolded, (out, in)."""
    held: torch.Tensor = layer.weight
    if not is_held(layer):
        return held
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    whole: torch.Tensor
    if (blocks := vars(layer).get("fedlora_blocks")) is None:
        whole = int8_vectorwise_dequant(held.data, layer.weight.SCB)
    else:
        whole = dequantize_4bit(held.data, blocks).view(layer.weight.quant_state.shape)
    return whole.to(dtype(layer))


def _forward(layer: Any, x: "torch.Tensor") -> "torch.Tensor":
    y: torch.Tensor = _function().apply(x, layer)
    return y


@cache
def _function() -> Any:
    """The product as autograd sees it; no unfolded weight outlives it."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
            """In the precision that the layer has now."""
            ctx.layer, ctx.was = layer, x.dtype
            frozen = weight(layer)
            return torch.nn.functional.linear(x.to(frozen.dtype), frozen, layer.bias)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            """For the input alone."""
            return (gradient @ weight(ctx.layer)).to(ctx.was), None

    return Product
