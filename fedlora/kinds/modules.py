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
