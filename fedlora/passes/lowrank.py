"""A linear layer with low-rank factors in as few products as it takes, and the gradients of single examples.

    y = x W^T + b + s (x A^T) B^T

with the frozen W (out x in), A (r x in) and B (out x r). For tokens t with the gradient `g_t` of `y_t`

    dB = s sum_t g_t (A x_t)^T      dA = s sum_t (B^T g_t) x_t^T      dx_t = W^T g_t + s A^T B^T g_t

Where a private client asks for them, the sums are taken over the tokens of each example by itself. What a layer
makes of something that all examples share, such as a table of relative positions, is then laid out once for each
of them, so that its gradient comes back for each. A gradient that lies in any other way is refused.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fedlora.errors import ContractError
from fedlora.passes import quantized

if TYPE_CHECKING:
    import torch

    from fedlora.passes.packing import Segments

Find = Callable[["torch.Tensor"], "Segments | None"]
"""How the examples lie in a tensor; None where the first dimension holds them."""


class LowRank:
    """The layers of a model that run this way.

    Attributes:
        layers: themselves.
        find: how the examples lie in a tensor of the last pass.
        singly: whether backward passes leave `grad_sample`, (examples, *shape) in float32, in place of `grad`.
        examples: of the pass.
        sequences: of an example: as many rows of a padded batch are its own, one after another.
        shares: layers that were given something that all examples of a pass share.
    """

    def __init__(self, model: Any, find: Find, product: bool = True) -> None:
        """Take over every layer with plain factors beside a linear layer; the others stay as they are.

        Args:
            model: with the factors in it.
            find: gives the examples of a row, where it is one.
            product: whether the kind of adapter is such a product; else no layer is taken over.
        """
        self.singly, self.examples, self.sequences, self.find = False, 0, 1, find
        self.layers = list(_plain(model)) if product else []
        self.shares: set[Any] = set()
        self._names = {module: name for name, module in model.named_modules()}
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)
        for module in model.modules():
            if hasattr(module, "apart"):  # `fedlora.kinds.modules.Scatter`
                module.apart = lambda: self.singly
            if hasattr(module, "disentangled_attention_bias"):  # DeBERTa v2 and v3
                module.disentangled_attention_bias = partial(_laid_out, module.disentangled_attention_bias)

    def _forward(self, layer: Any, x: "torch.Tensor") -> "torch.Tensor":
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        copies = self.copies(layer, x) if self.singly else 1
        if self.singly and copies == 1:
            self.lie(x, layer)
        y: torch.Tensor = _function().apply(x, copies, layer, a, b, layer.scaling["default"], self)
        return y

    def copies(self, layer: Any, x: "torch.Tensor") -> int:
        """How often what a layer makes of `x` is laid out: once, or for each sequence where they all share `x`."""
        rows = self.examples * self.sequences
        if rows == 1 or len(x) > 1 or self.find(x) is not None:
            return 1
        self.shares.add(layer)
        return rows

    def lie(self, x: "torch.Tensor", layer: Any) -> "Segments | None":
        """How the examples of this pass lie in a tensor; None where the first dimension holds their sequences.

        Args:
            x: an input, an output or a gradient.
            layer: whose it is.

        Raises:
            ContractError: they do not lie in it: what is taken for an example's would be of several.
        """
        lies = self.find(x)
        found, rows = (len(x), self.sequences) if lies is None else (len(lies.lengths), 1)
        if found != self.examples * rows:
            raise ContractError(
                f"{self._names.get(layer, type(layer).__name__)} runs on {found} rows where there are "
                f"{self.examples} examples: whose a gradient is cannot be told"
            )
        return lies

    def samples(
        self, layer: Any, whole: "torch.Tensor", left: "torch.Tensor", right: "torch.Tensor"
    ) -> "torch.Tensor":
        """`sum_t left_t right_t^T` over the tokens of each example, (examples, width, other width) in float32.

        Args:
            layer: whose they are.
            whole: the gradient in the shape that says where the examples are.
            left: (tokens, width) of all examples, or of what they share.
            right: (tokens, other width), likewise.

        Raises:
            ContractError: the first dimension is not the examples' sequences.
        """
        import torch

        if (lies := self.lie(whole, layer)) is not None:
            return by_example(left, right, lies)
        tokens = whole.shape[1:-1].numel()
        left, right = (x.float().view(-1, tokens, x.shape[-1]) for x in (left, right))
        product = torch.bmm if len(left) == len(right) else torch.matmul  # of which one of the two is shared
        made = product(left.transpose(1, 2), right)  # (sequences of all, width, other width)
        return made if self.sequences == 1 else made.view(-1, self.sequences, *made.shape[1:]).sum(1)


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

    from fedlora.passes.factored import FactoredLinear

    for module in model.modules():
        plain = type(module) is Linear and type(module.base_layer) in (torch.nn.Linear, FactoredLinear)
        if plain or (isinstance(module, LoraLayer) and quantized.is_held(module.base_layer)):
            pair = (module.lora_A["default"], module.lora_B["default"])
            varies = getattr(module, "lora_variant", None)  # of peft, such as DoRA: another product
            if not varies and all(type(factor) is torch.nn.Linear and factor.bias is None for factor in pair):
                yield module


@cache
def _function() -> Any:
    """The product as autograd sees it."""
    import torch

    from fedlora.passes import factored

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: torch.Tensor,
            copies: int,
            layer: Any,
            a: torch.Tensor,
            b: torch.Tensor,
            scaling: float,
            layers: LowRank,
        ) -> torch.Tensor:
            """In the precision of the frozen weight; laid out for each example where they share `x`."""
            base = layer.base_layer
            flat, low, high = (t.to(quantized.dtype(base)) for t in (x.reshape(-1, x.shape[-1]), a, b))
            inner = flat @ low.t()  # (tokens, r)
            y = factored.product(base, flat).addmm_(inner, high.t(), alpha=scaling)
            ctx.save_for_backward(flat, inner, low, high)
            ctx.layers, ctx.layer, ctx.factors = layers, layer, (a, b)
            ctx.scaling, ctx.was = scaling, (x.shape, x.dtype)
            # Not a view of it for autograd: some models change in place what a layer gives them.
            whole: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
            return whole if copies == 1 else whole.repeat(copies, *[1] * (whole.dim() - 1))

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            """For the input and the factors; those of single examples go to `grad_sample`."""
            x, inner, low, high = ctx.saved_tensors
            shape, dtype = ctx.was
            flat = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
            left = (flat @ high.t().contiguous().t()).mul_(ctx.scaling)  # (tokens, r); quicker with B on its side
            dx = da = db = None
            if ctx.needs_input_grad[0]:
                dx = factored.back(ctx.layer.base_layer, flat).addmm_(left, low)
                dx = dx.view(-1, *shape).sum(0).to(dtype) if len(flat) > len(x) else dx.view(shape).to(dtype)
            a, b = ctx.factors
            if ctx.layers.singly:
                if ctx.needs_input_grad[3]:
                    add_sample(a, ctx.layers.samples(ctx.layer, gradient, left, x))
                if ctx.needs_input_grad[4]:
                    made = ctx.layers.samples(ctx.layer, gradient, inner * ctx.scaling, flat)
                    add_sample(b, made.transpose(1, 2))
            else:
                if ctx.needs_input_grad[3]:
                    da = (left.t() @ x).to(a.dtype)
                if ctx.needs_input_grad[4]:
                    db = (inner.t() @ flat).mul_(ctx.scaling).t().to(b.dtype)
            return dx, None, None, da, db, None, None

    return Product


def add_sample(parameter: Any, sample: "torch.Tensor") -> None:
    """Leave per-example gradients: a layer that a pass goes through twice has two terms.

    Raises:
        ContractError: the two are of other numbers of examples.
    """
    before = getattr(parameter, "grad_sample", None)
    if before is not None and before.shape != sample.shape:
        raise ContractError(f"a layer gives {len(before)} and {len(sample)} gradients: they are not of examples")
    parameter.grad_sample = sample if before is None else before + sample


@cache
def _as_it_is() -> Any:
    """Within it, what is laid out for each example already is not repeated for them once more."""
    import torch
    from torch.overrides import TorchFunctionMode

    class AsItIs(TorchFunctionMode):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.rows = rows

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.repeat and len(args[0]) == self.rows:
                return args[0]
            return function(*args, **(kwargs or {}))

    return AsItIs


def _laid_out(bias: Callable[..., Any], query: "torch.Tensor", *told: Any, **named: Any) -> Any:
    """DeBERTa's part of attention by positions: it repeats its table for each example and head of `query`."""
    with _as_it_is()(len(query)):
        return bias(query, *told, **named)
