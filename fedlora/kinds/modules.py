"""What stands between A and B of a layer; imported where a model is."""

import torch


class Scales(torch.nn.Module):
    """Each of r numbers times one of its own: `y = x * weight`."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of (..., r)."""
        return x * self.weight


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


class Scatter(torch.nn.Module):
    """A linear layer whose weight (out x in) is zero but at some places."""

    def __init__(self, out: int, into: int, count: int) -> None:
        super().__init__()
        self.out, self.into = out, into
        self.support = torch.nn.Parameter(torch.zeros(2, count), requires_grad=False)
        self.values = torch.nn.Parameter(torch.zeros(count))

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the values, (n,) each."""
        rows, columns = self.support.long()
        return rows, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        weight = self.values.new_zeros((self.out, self.into)).index_put(self.places(), self.values)
        return torch.nn.functional.linear(x, weight)


class Beside(torch.nn.Module):
    """The sum of what a `Scatter` makes of the first of two and a linear layer of the second."""

    def __init__(self, scatter: Scatter, linear: torch.nn.Module) -> None:
        super().__init__()
        self.scatter, self.linear = scatter, linear

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(..., in) and (..., r) to (..., out)."""
        made: torch.Tensor = self.scatter(both[0]) + self.linear(both[1])
        return made
