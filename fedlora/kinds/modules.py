"""What stands between A and B of a layer; imported where a model is."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Places = tuple[torch.Tensor, torch.Tensor]


class Scales(torch.nn.Module):
    """Each number times one of r factors: `y_i = x_i * weight[which_i]`, by default its own."""

    which: torch.Tensor

    def __init__(self, r: int, which: NDArray[np.int64] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(r))
        whose = torch.arange(r) if which is None else torch.from_numpy(which)
        self.register_buffer("which", whose, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (..., m), with as many of the first factors as there are at a lower rank."""
        return x * self.weight[self.which[: x.shape[-1]]]

    def pull(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients of the factors (k, r) of gradients of the products' factors (k, m)."""
        made = gradients.new_zeros(len(gradients), len(self.weight))
        return made.index_add(1, self.which[: gradients.shape[1]], gradients)


class Copies(torch.nn.Module):
    """Each number several times, one beside the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., r) to (..., count * r)."""
        return x.repeat_interleave(self.count, -1)


class Passing(torch.nn.Linear):
    """A linear layer that gives its input on, before its output."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """(..., in) to itself and (..., r)."""
        return x, super().forward(x)


class Through(torch.nn.Module):
    """Gives its input on."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["weight"] = torch.empty(0)  # whose precision peft asks for

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to itself."""
        return x


class _Fixed(torch.autograd.Function):
    """`x W^T` where W is made of values whose gradient somebody else takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of x (..., in) and W (out x in), in the precision of training."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        weight = weight.to(dtype)
        ctx.was = x.dtype
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x.to(dtype), weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """For x alone."""
        (weight,) = ctx.saved_tensors
        return ((gradient @ weight).to(ctx.was) if ctx.needs_input_grad[0] else None), None, None


class Mapped(torch.nn.Module):
    """A linear layer whose weight (out x in) is a function of other numbers.

    Attributes:
        change: gives the weight of the values, with their graph.
        apart: says whether a pass takes gradients for each example, by a hook, and not for all of them.
    """

    def __init__(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], frame: int | None = None
    ) -> None:
        super().__init__()
        self.change = change
        self.apart: Callable[[], bool] = lambda: False
        if frame is not None:
            self.frame = torch.nn.Parameter(torch.zeros(frame), requires_grad=False)
        self.values = torch.nn.Parameter(torch.zeros(shape))

    @property
    def weight(self) -> torch.Tensor:
        """What peft asks for the precision of."""
        return self.values

    def made(self, values: torch.Tensor) -> torch.Tensor:
        """The weight (out x in), in float32 whatever the precision of training."""
        with torch.autocast(values.device.type, enabled=False):
            return self.change(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if not self.apart():
            return torch.nn.functional.linear(x, self.made(self.values))
        y: torch.Tensor = _Fixed.apply(x, self.values, self.made(self.values.detach()))  # type: ignore[no-untyped-call]
        return y

    @torch.enable_grad()
    def pull(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Gradients of the values (k, *shape) of gradients of the weight, k of (out x in)."""
        values = self.values.detach().requires_grad_()
        weight = self.made(values)
        if weight.shape == values.shape:  # so that those of all examples are no more than what is asked for
            return torch.autograd.grad(weight, values, torch.stack([*gradients]), is_grads_batched=True)[0]
        return torch.stack([torch.autograd.grad(weight, values, g, retain_graph=True)[0] for g in gradients])


class _Product(torch.autograd.Function):
    """`x W^T` with the gradient of a few numbers of W alone, and that where somebody wants it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, places: Places, size: tuple[int, int], wanted: bool
    ) -> torch.Tensor:
        """Of x (..., in) and values (n,) at places of W (out x in), in the precision of training."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
        weight = values.new_zeros(size).index_put(places, values).to(dtype)
        ctx.wanted, ctx.was, x = wanted, x.dtype, x.to(dtype)
        ctx.save_for_backward(x, weight, *places)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """For x and the values."""
        x, weight, rows, columns = ctx.saved_tensors
        dx = (gradient @ weight).to(ctx.was) if ctx.needs_input_grad[0] else None
        if not (ctx.wanted and ctx.needs_input_grad[1]):
            return dx, None, None, None, None
        whole = gradient.flatten(0, -2).t().float() @ x.flatten(0, -2).float()  # (out, in)
        return dx, whole[rows, columns], None, None, None


class Scatter(torch.nn.Module):
    """A linear layer whose weight (out x in) is zero but at some places.

    Attributes:
        apart: says whether a pass takes gradients for each example, by a hook, and not for all of them.
    """

    def __init__(self, out: int, into: int, count: int) -> None:
        super().__init__()
        self.size = (out, into)
        self.apart: Callable[[], bool] = lambda: False
        self.support = torch.nn.Parameter(torch.zeros(2, count), requires_grad=False)
        self.values = torch.nn.Parameter(torch.zeros(count))

    def places(self) -> Places:
        """Rows and columns of the values, (n,) each."""
        rows, columns = self.support.long()
        return rows, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        y: torch.Tensor = _Product.apply(x, self.values, self.places(), self.size, not self.apart())  # type: ignore[no-untyped-call]
        return y


class Beside(torch.nn.Module):
    """The sum of what a `Scatter` makes of the first of two and a linear layer of the second."""

    def __init__(self, scatter: Scatter, linear: torch.nn.Module) -> None:
        super().__init__()
        self.scatter, self.linear = scatter, linear

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(..., in) and (..., r) to (..., out)."""
        made: torch.Tensor = self.scatter(both[0]) + self.linear(both[1])
        return made


class Twin(torch.nn.Module):
    """The sum of what two thin factors make of the first of two and a linear layer of the second."""

    def __init__(self, into: int, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.own_A = torch.nn.Linear(into, linear.in_features, bias=False)
        self.own_B = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.linear = linear

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(..., in) and (..., r) to (..., out)."""
        made: torch.Tensor = self.own_B(self.own_A(both[0])) + self.linear(both[1])
        return made
