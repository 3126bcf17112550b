"""A linear layer with low-rank factors in as few products as it takes, and the gradients of single examples.

    y = x W^T + b + s (x A^T) B^T

with the frozen W (out x in), A (r x in) and B (out x r). For tokens t with the gradient `g_t` of `y_t`

    dB = s sum_t g_t (A x_t)^T      dA = s sum_t (B^T g_t) x_t^T      dx_t = W^T g_t + s A^T B^T g_t

Where a private client asks for them, the sums are taken over the tokens of each example by itself.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fedlora import quantized

if TYPE_CHECKING:
    import torch

    from fedlora.packing import Segments

Find = Callable[["torch.Tensor"], "Segments | None"]
"""How the examples lie in a tensor; None where the first dimension holds them."""


class LowRank:
    """The layers of a model that run this way.

    Attributes:
        layers: themselves.
        find: how the examples lie in a tensor of the last pass.
        singly: whether backward passes leave `grad_sample`, (examples, *shape) in float32, in place of `grad`.
    """

    def __init__(self, model: Any, find: Find) -> None:
        """Take over every layer with plain factors beside a linear layer; the others stay as they are."""
        self.singly, self.find, self.layers = False, find, list(_plain(model))
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)

    def _forward(self, layer: Any, x: "torch.Tensor") -> "torch.Tensor":
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        y: torch.Tensor = _function().apply(x, layer.base_layer, a, b, layer.scaling["default"], self)
        return y

    def samples(self, whole: "torch.Tensor", left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
        """`by_example`, where `whole` is the gradient in the shape that says where the examples are."""
        import torch

        if (lies := self.find(whole)) is None:
            left, right = (x.float().view(len(whole), -1, x.shape[-1]) for x in (left, right))
            return torch.bmm(left.transpose(1, 2), right)
        return by_example(left, right, lies)


def by_example(left: "torch.Tensor", right: "torch.Tensor", lies: "Segments") -> "torch.Tensor":
    """`sum_t left_t right_t^T` over the tokens of each example, (examples, width, other width) in float32.

    Args:
        left: (tokens, width).
        right: (tokens, other width); it is quicker with the larger width.
        lies: the tokens of each example.
    """
    import torch

    left, right = left.float(), right.float()
    made = left.new_empty((len(lies.lengths), left.shape[1], right.shape[1]))
    sides = torch.split(left.t(), lies.lengths, 1), torch.split(right, lies.lengths)
    for product, one, other in zip(made, *sides, strict=True):
        torch.mm(one, other, out=product)
    return made


def _plain(model: Any) -> Iterator[Any]:
    import torch
    from peft.tuners.lora.layer import Linear, LoraLayer

    for module in model.modules():
        plain = type(module) is Linear and type(module.base_layer) is torch.nn.Linear
        if plain or (isinstance(module, LoraLayer) and quantized.is_held(module.base_layer)):
            pair = (module.lora_A["default"], module.lora_B["default"])
            if all(type(factor) is torch.nn.Linear and factor.bias is None for factor in pair):
                yield module


@cache
def _function() -> Any:
    """The product as autograd sees it."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: torch.Tensor,
            base: Any,
            a: torch.Tensor,
            b: torch.Tensor,
            scaling: float,
            layers: LowRank,
        ) -> torch.Tensor:
            """In the precision of the frozen weight."""
            weight = quantized.weight(base)
            flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # (tokens, in)
            low, high = a.to(weight.dtype), b.to(weight.dtype)
            inner = flat @ low.t()  # (tokens, r)
            y = torch.nn.functional.linear(flat, weight, base.bias).addmm_(inner, high.t(), alpha=scaling)
            ctx.save_for_backward(flat, inner, low, high)
            ctx.layers, ctx.base, ctx.factors = layers, base, (a, b)
            ctx.scaling, ctx.was = scaling, (x.shape, x.dtype)
            return y.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            """For the input and the factors; those of single examples go to `grad_sample`."""
            x, inner, low, high = ctx.saved_tensors
            shape, dtype = ctx.was
            flat = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
            left = (flat @ high.t().contiguous().t()).mul_(ctx.scaling)  # (tokens, r); quicker with B on its side
            dx = da = db = None
            if ctx.needs_input_grad[0]:
                dx = (flat @ quantized.weight(ctx.base)).addmm_(left, low).view(shape).to(dtype)
            a, b = ctx.factors
            if ctx.layers.singly:
                if ctx.needs_input_grad[2]:
                    add_sample(a, ctx.layers.samples(gradient, left, x))
                if ctx.needs_input_grad[3]:
                    add_sample(b, ctx.layers.samples(gradient, inner * ctx.scaling, flat).transpose(1, 2))
            else:
                if ctx.needs_input_grad[2]:
                    da = (left.t() @ x).to(a.dtype)
                if ctx.needs_input_grad[3]:
                    db = (inner.t() @ flat).mul_(ctx.scaling).t().to(b.dtype)
            return dx, None, da, db, None, None

    return Product


def add_sample(parameter: Any, sample: "torch.Tensor") -> None:
    """Leave per-example gradients: a layer that a pass goes through twice has two terms."""
    before = getattr(parameter, "grad_sample", None)
    parameter.grad_sample = sample if before is None else before + sample
