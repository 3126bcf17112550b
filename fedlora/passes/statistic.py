"""What an example adds to a statistic of the layers of a model: bounded, and apart from all other examples.

With x_t the inputs of a layer at the tokens t of an example, and g_t the gradients of its outputs there,

    gram        G = sum_t x_t x_t^T,  (in x in)
    mean        the diagonal of G,  (in,)
    row_fisher  f_j = sum_o (sum_t g_to x_tj)^2,  (in,)

Of L matrices in all, each of an example is scaled to length `w / sqrt(L)` in the Frobenius norm, whatever its
length was: what an example adds to all of them together is at most w long. So no bound need be chosen, and all
examples and layers weigh alike; a statistic counts up to a factor, layer by layer. w is 1, or for the rows of a
person one over their number: the mean of what is at most 1 long is at most 1 long.

Layers that are given the same inputs share one gram. A layer takes part if it sees each example's tokens by
themselves, once in a pass; others, such as an expert that is given some tokens of all examples, have no statistic.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError, UserError

if TYPE_CHECKING:
    import torch

    from fedlora.passes.lowrank import Find

_SLACK = 1e-4  # a length in float32 is that of what is added but for less than this
_LEAST = 1e-30  # of the largest number of an example: what is all below it adds nothing


class Collector:
    """Adds what examples contribute up, pass by pass.

    Attributes:
        shared: of each layer that has a statistic, the layer whose statistic it is.
        sums: of each of the latter, in float64.
    """

    def __init__(
        self, layers: Mapping[str, Any], kind: str, find: "Find", trial: Callable[[], int], sequences: int = 1
    ) -> None:
        """See which layers see examples by themselves, and which share their inputs.

        Args:
            layers: modules by name, each called with (..., tokens, in).
            kind: of the statistic.
            find: how the examples lie in a row; None where the first dimension holds them.
            trial: passes some examples of no one, several at once, and says how many.
            sequences: of an example, one after another.

        Raises:
            UserError: no layer does.
        """
        self.kind, self.find = kind, find
        self._mask: torch.Tensor | None = None
        self._sequences = sequences
        self._weights: torch.Tensor | None = None
        self._passed: set[str] = set()
        calls: dict[str, list[tuple[Any, tuple[int, ...]]]] = {name: [] for name in layers}
        with self._hooked(layers, lambda name, layer, x, y: calls[name].append((x, self._lies(x)))):
            count = trial()
        fine = {n: c[0][0] for n, c in calls.items() if len(c) == 1 and c[0][1] == (count,)}
        self.shared: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, x in fine.items():
            own = name if kind == "row_fisher" else first.setdefault(id(x), name)
            self.shared[name] = own
        if not fine:
            raise UserError(
                "no layer here sees each example by itself, as where blocks share their weights: "
                "take a compressor that goes by the weights alone, such as welore"
            )
        owners = {own: layers[own] for own in dict.fromkeys(self.shared.values())}
        self._owners, self._bound = owners, (1 - _SLACK) / math.sqrt(len(owners))
        widths = {own: fine[own].shape[-1] for own in owners}
        self.sums: dict[str, NDArray[np.float64]] = {
            own: np.zeros((width, width) if kind == "gram" else width) for own, width in widths.items()
        }

    def take(self) -> dict[str, NDArray[np.float64]]:
        """The sums so far, which begin again at zero."""
        made = self.sums
        self.sums = {name: np.zeros_like(total) for name, total in made.items()}
        return made

    @contextlib.contextmanager
    def adding(self, weights: Sequence[float], mask: "torch.Tensor | None" = None) -> Iterator[None]:
        """Have the pass that is made meanwhile, forward and for `row_fisher` back, add to the sums.

        Args:
            weights: w of each example, at most 1.
            mask: which cells of a padded batch hold a token, (examples * sequences, longest); None: all do.

        Raises:
            ContractError: a layer was not called just once, or does not hold as many examples.
        """
        import torch

        self._weights = torch.tensor(list(weights), dtype=torch.float32)
        self._mask, self._passed = mask, set()
        with self._hooked(self._owners, self._see):
            yield
        if missing := self._owners.keys() - self._passed:
            raise ContractError(f"{sorted(missing)[0]} took no part in a pass")

    @contextlib.contextmanager
    def _hooked(self, layers: Mapping[str, Any], see: Callable[[str, Any, Any, Any], None]) -> Iterator[None]:
        def called(name: str, layer: Any, args: tuple[Any, ...], y: Any) -> None:
            see(name, layer, args[0], y)

        handles = [layer.register_forward_hook(partial(called, name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _lies(self, x: "torch.Tensor") -> tuple[int, ...]:
        """How many examples there are in an input; empty where they do not lie in it one by one."""
        if x.dim() != 3:
            return ()
        lies = self.find(x)
        return (len(x) // self._sequences if lies is None else len(lies.lengths),)

    def _see(self, name: str, layer: Any, x: "torch.Tensor", y: "torch.Tensor") -> None:
        if self.kind == "row_fisher":
            if not y.requires_grad:
                return  # a pass of the base alone, beside the one that teaches
            y.register_hook(partial(self._add, name, x.detach()))  # type: ignore[no-untyped-call]
        else:
            self._add(name, x.detach(), None)

    def _add(self, name: str, x: "torch.Tensor", gradient: "torch.Tensor | None") -> None:
        """Add what each example contributes to one sum."""
        import torch

        assert self._weights is not None
        if name in self._passed or self._lies(x) != (len(self._weights),):
            raise ContractError(f"{name} does not hold each example once: its part could not be bounded")
        self._passed.add(name)
        lengths, pick = self._tokens(x)
        rows = pick(x).float()  # (tokens, in)
        parts = torch.split(rows, lengths)
        weights = self._weights.to(x.device)
        if self.kind == "gram":
            parts = tuple(_unit(p) for p in parts)
            small = [p @ p.T if len(p) < p.shape[1] else p.T @ p for p in parts]
            scales = self._scales(torch.stack([m.norm() for m in small]), weights)
            each = scales.sqrt().repeat_interleave(torch.tensor(lengths, device=x.device))
            rows = torch.cat(parts)
            scaled = torch.where(each[:, None] > 0, rows * each[:, None], 0.0)
            total = scaled.T @ scaled
        else:
            sides = parts if gradient is None else torch.split(pick(gradient).float(), lengths)
            made = [
                (_unit(p) ** 2).sum(0) if gradient is None else (_unit(_unit(g).T @ _unit(p)) ** 2).sum(0)
                for p, g in zip(parts, sides, strict=True)
            ]
            each = torch.stack(made)  # (examples, in)
            scales = self._scales(each.norm(dim=1), weights)[:, None]
            total = torch.where(scales > 0, each * scales, 0.0).sum(0)
        self.sums[name] += total.double().cpu().numpy()

    def _scales(self, lengths: "torch.Tensor", weights: "torch.Tensor") -> "torch.Tensor":
        """What brings each to its length; 0 for one that is zero, or not finite."""
        import torch

        fine = torch.isfinite(lengths) & (lengths > 0)
        return torch.where(fine, weights * self._bound / lengths.where(fine, torch.ones_like(lengths)), 0.0)

    def _tokens(self, x: "torch.Tensor") -> "tuple[list[int], Callable[[torch.Tensor], torch.Tensor]]":
        """How many tokens each example has, and what picks these of a tensor like an input, (tokens, width)."""
        if (lies := self.find(x)) is not None:
            return lies.lengths, lambda t: t[0]
        mask = self._mask
        if mask is None or mask.shape != x.shape[:2]:
            mask = x.new_ones(x.shape[:2]).bool()
        mask = mask.bool()
        counts = mask.sum(1).view(-1, self._sequences).sum(1)
        return counts.tolist(), lambda t: t[mask]


def _unit(part: "torch.Tensor") -> "torch.Tensor":
    """A tensor over its largest number, so that float32 loses no square of what counts; zeros where it is tiny.

    A length that came out too small would scale an example up beyond its bound.
    """
    import torch

    if not part.numel():
        return part
    most = part.abs().max()
    return torch.where(most > _LEAST, part / most, torch.zeros_like(part))
