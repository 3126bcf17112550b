"""A frozen linear layer of low rank, as two thinner ones; imported where a model is.

    y = L (R x) + b,    L (out x k), R (k x in)

It takes `k (out + in)` products a token where the whole weight takes `out in`. To all others it is one linear
layer: an adapter stands beside the whole of it, `y + s B A x`, and `weight` is `L R`, made when somebody asks.
"""

from typing import Any

import torch

from fedlora.passes import quantized


class FactoredLinear(torch.nn.Linear):
    """A linear layer whose weight is a product of two frozen factors.

    Attributes:
        left: L, (out, k).
        right: R, (k, in).
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = left.shape[0], right.shape[1]
        self.left, self.right = (torch.nn.Parameter(side, requires_grad=False) for side in (left, right))
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """L R, (out, in): a new tensor each time, so that a change of it changes nothing here."""
        return self.left @ self.right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        linear = torch.nn.functional.linear
        return linear(linear(x, self.right), self.left, self.bias)


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a frozen linear layer, whole, of low rank or held in few bits, makes of `x`, (tokens, in)."""
    if isinstance(layer, FactoredLinear):
        made: torch.Tensor = layer.forward(x)
        return made
    return torch.nn.functional.linear(x, quantized.weight(layer), layer.bias)


def back(layer: Any, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of its input, (tokens, in), by that of its output, (tokens, out)."""
    if isinstance(layer, FactoredLinear):
        return (gradient @ layer.left) @ layer.right
    return gradient @ quantized.weight(layer)
