"""What lies below the lowest factors never changes: it is computed once for each example and kept.

Where factors sit in upper layers alone, what enters the lowest of those layers depends on the example and on
nothing that trains, travels or is merged. `fedlora.passes.kept` has where it is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fedlora.data.store import Examples


class Prefix:
    """The layers below the lowest factors, and what came out of them.

    Attributes:
        blocks: how many they are.
        row: the tokens of the next pass above those layers, (1, tokens, width); None to compute them.
        kept: gives what is kept of examples, (total tokens, width); None of those that are not known.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        """Stand in for the blocks below the lowest factors, in their order."""
        self.blocks = len(blocks)
        self.row: torch.Tensor | None = None
        self.kept: Callable[[Examples], NDArray[Any] | None] = lambda examples: None
        self._ends = False
        self._gives: int | None = None  # of what a block gives: 0 for the tokens alone, else the length of a tuple
        for block in blocks:
            block.forward = partial(self._block, block.forward, block is blocks[-1])

    def find(self, examples: "Examples", rows: NDArray[np.int64]) -> NDArray[Any] | None:
        """The tokens of some examples above those layers, (tokens, width), if they are kept."""
        whole = None if self._ends else self.kept(examples)
        if whole is None:
            return None
        ends = examples.offsets
        return np.concatenate([whole[ends[row] : ends[row + 1]] for row in rows])

    def forget(self) -> Callable[[], None]:
        """Compute these layers too from now on, for each example in its own pass; gives how to end that.

        What is kept came of passes of many examples, whose last bits depend on all that were in them.
        """
        before, self.kept = self.kept, lambda examples: None
        return lambda: setattr(self, "kept", before)

    def come(self, run: Callable[[], Any]) -> "torch.Tensor":
        """What comes out of those layers in a pass, (1, tokens, width); it goes no further."""
        self._ends = True
        try:
            run()
        except _Enough as enough:
            out: torch.Tensor = enough.args[0]
            return out
        finally:
            self._ends = False
        raise AssertionError("the pass goes through the layers below the lowest factors")

    def _block(self, forward: Any, last: bool, hidden: "torch.Tensor", *args: Any, **told: Any) -> Any:
        if self.row is not None and self._gives is not None:
            made = self.row if last else hidden
            return (made, *[None] * (self._gives - 1)) if self._gives else made
        out = forward(hidden, *args, **told)
        self._gives = len(out) if isinstance(out, tuple) else 0
        if last and self._ends:
            raise _Enough(out[0] if self._gives else out)
        return out


class _Enough(Exception):
    """The pass need go no further."""


def below(body: Any, prefix: str, modules: Sequence[str]) -> list[Any]:
    """The blocks of a body that lie below the lowest layer with factors; none where that is not known.

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
