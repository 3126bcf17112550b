"""Two adapters side by side, as FedDPA has them (Yang et al., NeurIPS 2024, https://arxiv.org/abs/2403.19211).

    W' = W + alpha / r * (B A + B' A'),   B and B' (out x r) train, zero at first

A and A' (r x in) are drawn from the seed and frozen here, each by itself. So the change is linear in B and B',
and a strategy can average one and leave the other with its client (`dual_lora`). Where both are averaged it is
FFA-LoRA of rank 2 r, at its bytes.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.kinds.contract import Facts, Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.frames import Still


@dataclass(frozen=True)
class Dual(Still):
    """A weight's change is `alpha / r * (B @ A + own_B @ own_A)`, with frozen A and own_A."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("seeded", False),
        "B": Part("zero", True),
        "own_A": Part("seeded", False),
        "own_B": Part("zero", True),
    }
    ordinary: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    facts: ClassVar[Facts] = Facts("B, B'", "s sqrt(2 out r / 3)")

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with the other pair beside B."""
        from fedlora.kinds.modules import Passing, Twin

        wrapped = super().wrap(model, heads, task_type)
        for module in list(wrapped.modules()):
            if hasattr(module, "lora_A"):
                into, last = module.lora_A["default"].in_features, module.lora_B["default"]
                module.lora_A["default"] = Passing(into, self.r, bias=False)
                module.lora_B["default"] = Twin(into, last)
        return wrapped

    def role(self, name: str) -> str:
        """`A`, `B`, `own_A`, `own_B`, or `head`."""
        own = next((role for role in ("own_A", "own_B") if f".lora_B.{role}." in name), "")
        return own or super().role(name)

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """Both A lose rows, and both B columns."""
        return super().shape(_plain(slot), rank)

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """As LoRA's, both."""
        return super().initial(_plain(slot), rng, weights)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """Both B side by side, and both A."""
        b, a = (dict(modules_of(layout, role)) for role in ("own_B", "own_A"))
        return {
            module: (
                np.concatenate([left, adapter[b[module]]], axis=1),
                np.concatenate([right, adapter[a[module]]], axis=0),
            )
            for module, (left, right) in super().change(layout, adapter).items()
        }

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """Both B of a change whose rows lie among those of both A."""
        taken, own = super().adopt(layout, drawn, saved), dict(modules_of(layout, "own_B"))
        for module, name in modules_of(layout, "B"):
            taken[name], taken[own[module]] = np.split(taken[name], 2, axis=1)
        return taken

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s sqrt(out)` times the norm of the A whose B move."""
        gain = {}
        for module, (left, right) in self.change(layout, adapter).items():
            halves = zip(("B", "own_B"), np.split(right, 2), strict=True)
            seen = sum(float(np.square(a, dtype=np.float64).sum()) for role, a in halves if role in moving)
            gain[module] = self.scaling() * math.sqrt(len(left) * seen)
        return gain

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(2 out r / 3)`."""
        return self.scaling() * math.sqrt(2 * out * self.r / 3)


def _plain(slot: Slot) -> Slot:
    return replace(slot, role=slot.role.removeprefix("own_"))
