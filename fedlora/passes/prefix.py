"""What lies below the lowest factors never changes: it is computed once for each example and kept.

Where factors sit in upper layers alone, what enters the lowest of those layers depends on the example and on
nothing that trains, travels or is merged. A client's examples pass through the layers below all at once, in
batches that depend on its partition alone, so that a result does not depend on who ran before.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fedlora.data.store import Examples, Partition

LIMIT = 256 * 2**20  # bytes that a worker keeps; the client that was there longest ago goes first

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """What a client's examples are above the frozen layers."""

    partition: "Partition"
    rows: dict[int, "torch.Tensor"]  # of each example, (tokens, width)
    size: int  # bytes


class Prefix:
    """The layers below the lowest factors, and what came out of them.

    Attributes:
        row: the tokens of the next pass above those layers, (1, tokens, width); None to compute them.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        """Stand in for the blocks below the lowest factors, in their order."""
        self.row: torch.Tensor | None = None
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._now: list[Kept] = []
        self._filling = False
        for block in blocks:
            block.forward = partial(self._block, block.forward, block is blocks[-1])

    @contextlib.contextmanager
    def of(self, partition: "Partition", run: Callable[[NDArray[np.int64]], Any], size: int) -> Iterator[None]:
        """Know a client's examples for a while.

        Args:
            partition: the client's examples.
            run: a pass of the model over some of them.
            size: about how many of them pass at once.
        """
        kept = self._kept.pop(partition.client, None)
        if kept is None or kept.partition.examples is not partition.examples:
            kept = self._fill(partition, run, size)
        if kept is not None:
            self._kept[partition.client] = kept
            while sum(k.size for k in self._kept.values()) > LIMIT:
                self._kept.popitem(last=False)
            self._now.append(kept)
        try:
            yield
        finally:
            self._now = [other for other in self._now if other is not kept]
            self.row = None

    def find(self, examples: "Examples", rows: NDArray[np.int64]) -> "torch.Tensor | None":
        """The tokens of some examples in one row, if they are the client's."""
        import torch

        for kept in self._now:
            if examples is kept.partition.examples and all(int(row) in kept.rows for row in rows):
                return torch.cat([kept.rows[int(row)] for row in rows])[None]
        return None

    def _fill(self, partition: "Partition", run: Callable[[NDArray[np.int64]], Any], size: int) -> Kept | None:
        """All of a client's examples; None where they take more than the limit."""
        import torch

        lengths = partition.examples.lengths(partition.rows)
        order = partition.rows[np.argsort(lengths, kind="stable")]
        found: dict[int, torch.Tensor] = {}
        self._filling = True
        try:
            for chunk in np.array_split(order, -(-len(order) // size)):
                try:
                    run(chunk)
                except _Enough as enough:
                    (whole,) = enough.args
                if whole[0].numel() * whole.element_size() / len(whole[0]) * lengths.sum() > LIMIT:
                    return None
                parts = torch.split(whole[0], partition.examples.lengths(chunk).tolist())
                found |= zip(chunk.tolist(), parts, strict=True)
        finally:
            self._filling = False
        return Kept(partition, found, sum(t.numel() * t.element_size() for t in found.values()))

    def _block(self, forward: Any, last: bool, hidden: "torch.Tensor", *args: Any, **told: Any) -> Any:
        if self.row is not None:
            return self.row if last else hidden
        out = forward(hidden, *args, **told)
        if last and self._filling:
            raise _Enough(out)
        return out


class _Enough(Exception):
    """The pass need go no further."""


def below(body: Any, prefix: str, modules: Sequence[str]) -> list[Any]:
    """The blocks of a body that lie below the lowest layer with factors; none where that cannot be told.

    Args:
        body: a transformers model without its head.
        prefix: of the names of its modules, with the dot.
        modules: names of all layers with factors.
    """
    import torch

    inside = [name.removeprefix(prefix) for name in modules if name.startswith(prefix)]
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.ModuleList) and inside and all(n.startswith(f"{name}.") for n in inside):
            lowest = min(int(n.removeprefix(f"{name}.").split(".")[0]) for n in inside)
            return list(module)[:lowest]
    return []
