"""FLoRA's core space (Si et al., 2024, https://arxiv.org/abs/2405.14739): only an r x r core trains.

    W' = W + alpha / r * U G V,   U (out x r) and V (r x in) drawn from the seed, orthonormal; G zero at first

The paper trains U and V too. Here they stay as the seed draws them, so that r^2 numbers a layer train and travel,
and with them the change is linear:

    sum_k p_k U G_k V = U (sum_k p_k G_k) V

A convolution (out x in x h x w) has a core with a rank for each dimension, r of the outputs, min(r, in) of the
inputs, and all of height and width. It runs as three convolutions one after another, V, G and U:

    change[o, i, y, x] = sum_ab U[o, a] G[a, b, y, x] V[b, i]

Noise on G reaches the weight as it is: `s r` for each unit of it, where FFA-LoRA's is `s sqrt(out r / 3)`; of a
convolution `s sqrt(numbers of G)`. So the core affords a rank that is a multiple of FFA's, up to the smaller side
of a layer. LoRA-XS is the same with frames from the weight's own singular vectors.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor, pairs
from fedlora.kinds import frames
from fedlora.kinds.contract import PREFIX, Facts, Part, Saved, Weights, modules_of
from fedlora.lazy import Thin


@dataclass(frozen=True)
class Core(frames.Framed):
    """A weight's change is `alpha / r * U @ G @ V`, with U and V orthonormal and drawn from the seed."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("seeded", False),
        "B": Part("seeded", False),
        "core": Part("zero", True),
    }
    facts: ClassVar[Facts] = Facts("G (r x r)", "s r")
    convolutions: ClassVar[bool] = True

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with G between A and B; beside a convolution all three are convolutions."""
        import torch

        wrapped = super().wrap(model, heads, task_type)
        for layer in self.held(wrapped).values():
            if isinstance(base := layer.get_base_layer(), torch.nn.Conv2d):
                inner = min(self.r, base.in_channels)
                layer.lora_A["default"] = torch.nn.Conv2d(base.in_channels, inner, 1, bias=False)
                told: Any = {
                    name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation")
                }
                layer.lora_B["default"][0] = torch.nn.Conv2d(inner, self.r, bias=False, **told)
        return wrapped

    def where(self) -> str:
        """Between the frames of this seed."""
        return "between the frames that this seed draws"

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """All that the rank and the layer hold."""
        ranks = {"A": (0,), "B": (1,), "core": (0, 1)}.get(slot.role, ())
        if len(slot.shape) == 2:  # which a layer may be asked for at any rank
            return super().shape(slot, rank)
        return tuple(min(rank, size) if i in ranks else size for i, size in enumerate(slot.shape))

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Frames for U and V, zero for G."""
        return self.frame(slot, rng, weights) if slot.role in "AB" else super().initial(slot, rng, weights)

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Orthonormal, from the seed."""
        if slot.role == "B":
            return frames.drawn(slot.shape[0], slot.shape[1], rng).reshape(slot.shape)
        return np.ascontiguousarray(frames.drawn(slot.shape[1], slot.shape[0], rng).T).reshape(slot.shape)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B R and A of each layer; of a convolution U, and G with V in it, (r x in h w)."""
        cores = dict(modules_of(layout, "core"))
        made = {}
        for b, a in pairs(layout):
            u, v, g = adapter[b], adapter[a], adapter[cores[layout[b].module]]
            if g.ndim == 4:
                right = np.einsum("abyx,bi->aiyx", g, v[:, :, 0, 0])
                made[layout[b].module] = (u[:, :, 0, 0], right.reshape(len(g), -1))
            else:
                made[layout[b].module] = (u @ g, v)
        return made

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s ||U||_F ||V||_F sqrt(h w)`: with orthonormal frames `s` and the root of how many numbers G has."""
        cores = dict(modules_of(layout, "core"))
        gain = {}
        for b, a in pairs(layout):
            kernel = math.prod(adapter[cores[layout[b].module]].shape[2:])
            length = float(np.linalg.norm(adapter[b]) * np.linalg.norm(adapter[a])) * kernel**0.5
            gain[layout[b].module] = self.scaling() * length if "core" in moving else 0.0
        return gain

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The G of a change that these frames can write, and of no other."""
        flat = {name: slot for name, slot in layout.items() if len(slot.shape) < 4}
        taken = super().adopt(flat, drawn, saved)
        cores = dict(modules_of(layout, "core"))
        for b, a in ((b, a) for b, a in pairs(layout) if b not in flat):
            module, u, v = layout[b].module, drawn[b][:, :, 0, 0], drawn[a][:, :, 0, 0]
            left, right = (side.astype(np.float64) for side in saved.factors(module))
            left = left[:, :, 0, 0]
            g = np.einsum("oa,om,miyx,bi->abyx", u, left, right, v, optimize=True)
            found = np.einsum("abyx,bi->aiyx", g, v).reshape(len(g), -1)
            frames.check_rest(module, Thin(left, right.reshape(len(right), -1)), Thin(u, found), self.where())
            taken[cores[module]] = (g * (saved.scaling / self.scaling())).astype(np.float32)
        return taken

    def export(
        self, layout: Layout, adapter: Mapping[str, Tensor], merged: Change | None = None
    ) -> tuple[Adapter, int | None]:
        """As an ordinary LoRA, whose A beside a convolution has its kernel."""
        tensors, rank = super().export(layout, adapter, merged)
        inputs = {slot.module: slot.shape[1] for slot in layout.values() if slot.role == "A"}
        for slot in layout.values():
            if slot.role == "core" and len(slot.shape) == 4:
                a, b = (f"{PREFIX}{slot.module}.lora_{side}.weight" for side in "AB")
                tensors[a] = tensors[a].reshape(len(tensors[a]), inputs[slot.module], *slot.shape[2:])
                tensors[b] = tensors[b][:, :, None, None]
        return tensors, rank
