"""Rotation, after SST (Zhao et al., 2024, https://arxiv.org/abs/2405.15481): merge, and begin in other directions.

After every k-th round all that was learnt is added to the frozen weights, and the frozen parts are drawn anew:

    W <- W + s change(theta)        the same function as before
    frozen parts <- draw t / k of the seed,  theta <- 0

So a small kind reaches another subspace every k rounds, and the whole change is of a rank that grows, at the bytes
of the small kind and a merge every k rounds. In SST directions are drawn among the singular vectors of the weight,
in proportion to singular values. Here they are drawn from the seed, as `core` and `lora` draw them first: nothing
but the round is looked at, and no SVD is taken at any site.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora import plugins
from fedlora.adapter import Tensor
from fedlora.kinds.contract import Kind
from fedlora.schedules.contract import Schedule, Turned, redrawn


@dataclass(kw_only=True)
class Rotate(Schedule):
    """Every few rounds the change is merged into the base, and the frozen parts are drawn anew from the seed."""

    merges: ClassVar[bool] = True

    every: int = 5

    def refuses(self, kind: Kind, trained: Collection[str]) -> str | None:
        """Frozen parts must be there, and come from the seed alone; the change must be thin, as a merge is."""
        still = {role: part for role, part in kind.parts.items() if role not in trained}
        name = plugins.called(type(kind))
        if not kind.thin:
            return f"{name} has a change that is no product of thin factors, and a merge is one"
        if not still:
            return f"{name} has no frozen part to draw anew under this strategy, which trains all of it"
        if derived := [role for role, part in still.items() if part.origin != "seeded" or part.weighs]:
            return f"{name} takes {derived[0]} from the base, where there is one, and no other draw of it"
        return None

    def draw(self, round: int) -> int:
        """As many as there were rotations before the round."""
        return (round - 1) // self.every

    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """After every k-th round the change as a merge, zeros, and new frozen parts."""
        if round % self.every:
            return Turned({})
        scaling = self.kind.scaling()
        base = {m: (scaling * left, right) for m, (left, right) in self.kind.change(self.layout, adapter).items()}
        zero = {role for role, part in self.kind.parts.items() if part.origin == "zero"}
        anew = [name for name, slot in self.layout.items() if slot.role in zero]
        zeros = {name: np.zeros_like(adapter[name]) for name in anew}
        drawn = redrawn(self.kind, self.layout, self.seed, self.shapes, self.draw(round + 1))
        return Turned({**zeros, **drawn}, base, anew)
