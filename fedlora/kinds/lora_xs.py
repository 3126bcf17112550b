"""LoRA-XS (Balazy et al., 2024, https://arxiv.org/abs/2405.17604): only an r x r core trains.

    W' = W + alpha / r * B R A,   B (out x r) and A (r x in) the first singular vectors of W, R zero at first

B and A come from the base model, so that only r^2 numbers a layer train and travel, and the change is linear in
them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.errors import SettingError
from fedlora.kinds.contract import Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.lora import Lora


@dataclass(frozen=True)
class LoraXS(Lora):
    """A weight's change is `alpha / r * B @ R @ A`, with frozen singular vectors B and A of the weight itself."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("derived", False),
        "B": Part("derived", False),
        "core": Part("zero", True),
    }
    ordinary: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with R between A and B."""
        import torch

        wrapped = super().wrap(model, heads, task_type)
        for name, module in list(wrapped.named_modules()):
            if name.endswith(".lora_B"):
                core = torch.nn.Linear(self.r, self.r, bias=False)
                module["default"] = torch.nn.Sequential(core, module["default"])
        return wrapped

    def role(self, name: str) -> str:
        """`A`, `B`, `core` or `head`."""
        role = super().role(name)
        return "core" if role == "B" and name.endswith(".0.weight") else role

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """The core loses rows and columns."""
        return (rank, rank) if slot.role == "core" else super().shape(slot, rank)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B R and A of each layer."""
        cores = dict(modules_of(layout, "core"))
        plain = super().change(layout, adapter)
        return {module: (b @ adapter[cores[module]], a) for module, (b, a) in plain.items()}

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The core `B^T (B' A') A^T` of a change between these singular vectors, and of no other."""
        cores, taken = dict(modules_of(layout, "core")), {}
        for module, (b, a) in super().change(layout, drawn).items():
            left, right = (side.astype(np.float64) for side in saved.factors(module))
            if left.shape[0] != len(b) or right.shape[1] != a.shape[1]:
                raise SettingError("model.start", f"its factors for {module} are of another base")
            core = (b.T.astype(np.float64) @ left) @ (right @ a.T)
            rest, whole = left @ right - b @ core @ a, left @ right
            if np.linalg.norm(rest) > 1e-3 * np.linalg.norm(whole):
                raise SettingError(
                    "model.start",
                    f"its change of {module} is not between the first {self.r} singular vectors of this base's "
                    "weight: it is of another base, rank or kind of adapter",
                )
            taken[cores[module]] = (core * (saved.scaling / self.scaling())).astype(np.float32)
        return taken

    def exact(self, moving: Collection[str]) -> bool:
        """Where the core moves alone, as it does."""
        return not {"A", "B"} & set(moving)

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s ||B||_F ||A||_F`: with orthonormal vectors `s r`."""
        norms = {m: np.linalg.norm(b) * np.linalg.norm(a) for m, (b, a) in super().change(layout, adapter).items()}
        return {m: self.scaling() * float(n) if "core" in moving else 0.0 for m, n in norms.items()}

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Singular vectors for A and B, zero for the core.

        Raises:
            SettingError: a layer has fewer than r of them.
        """
        import torch

        if slot.role not in ("A", "B") or weights is None:
            return super().initial(slot, rng, weights)
        weight = weights(slot.module).detach().double().cpu()
        if self.r > min(weight.shape):
            raise SettingError(
                "model.adapter.r",
                f"{slot.module} is {weight.shape[0]} x {weight.shape[1]} and has no {self.r} singular vectors; "
                f"take r of at most {min(weight.shape)}",
            )
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        u, vt = u[:, : self.r], vt[: self.r]
        sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()  # (r, 1): an SVD leaves it open
        found: torch.Tensor = vt * sign if slot.role == "A" else u * sign.T
        return found.float().contiguous().numpy()
