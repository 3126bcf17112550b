"""Reflections, after Householder Projector (Song et al., 2023, https://arxiv.org/abs/2307.08012).

    W' = W + alpha / r * U diag(d) V^T,   U = H(u_1) .. H(u_r) E,   V = H(v_1) .. H(v_r) E
    H(u) = I - 2 u u^T / ||u||^2,         E the first r columns of an identity

The vectors u_i (out) and v_i (in) begin as unit vectors of the seed, and d (r) as zero; all of them train. U and V
are orthonormal at every step, so d are singular values, and no penalty is needed to keep them so. The paper
writes whole weights of a generator in this way, from their own SVD; here it is a change beside a frozen weight.

The change is linear in d alone. Averaged vectors are vectors of another frame, and averaged frames are not
orthonormal, so that

    U(sum_k p_k u_k) diag(sum_k p_k d_k) V(sum_k p_k v_k)^T  !=  sum_k p_k U_k diag(d_k) V_k^T

How far apart these are is logged each round as `aggregation_error`. Strategies that are exact by linearity refuse
this kind, and `fedex_lora` merges what the averages miss. Vectors have no gradient while d is zero, as A of LoRA
has none while B is.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora import factors
from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.factors import Matrix
from fedlora.kinds.contract import Facts, Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.frames import check_rest, saved_sides
from fedlora.kinds.lora import Lora
from fedlora.lazy import Thin
from fedlora.seeding import generator

_PROBES = 64
_STEP = 1e-4
_TINY = 1e-30  # so that a vector of zeros reflects nothing


@dataclass(frozen=True)
class Householder(Lora):
    """A weight's change is `alpha / r * U @ diag(d) @ V^T`, with U and V made of reflections that train too."""

    parts: ClassVar[Mapping[str, Part]] = {
        "left": Part("seeded", True),
        "right": Part("seeded", True),
        "values": Part("zero", True),
    }
    ordinary: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    facts: ClassVar[Facts] = Facts("u, v, d (r)", "s sqrt(r)")

    def most(self, out: int, into: int) -> int | None:
        """The smaller side of a layer."""
        return min(out, into)

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with V^T, d and U in the place of A and B."""
        import torch

        from fedlora.kinds.modules import Mapped, Scales

        wrapped = super().wrap(model, heads, task_type)
        for layer in self.held(wrapped).values():
            into, out = layer.lora_A["default"].in_features, layer.lora_B["default"].out_features
            layer.lora_A["default"] = Mapped(lambda v: frame(v.T).T, (self.r, into))
            layer.lora_B["default"] = torch.nn.Sequential(Scales(self.r), Mapped(frame, (out, self.r)))
        return wrapped

    def role(self, name: str) -> str:
        """`left`, `right`, `values`, or `head`."""
        if ".lora_A." in name:
            return "right"
        if ".lora_B." in name:
            return "values" if name.endswith(".0.weight") else "left"
        return "head"

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """As many vectors and numbers."""
        cut = {"left": (slot.shape[0], rank), "right": (rank, slot.shape[-1]), "values": (rank,)}
        return cut.get(slot.role, slot.shape)

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Unit vectors, and zero for d."""
        if slot.role not in ("left", "right"):
            return super().initial(slot, rng, weights)
        drawn = rng.standard_normal(slot.shape)
        unit: Matrix = drawn / np.linalg.norm(drawn, axis=int(slot.role == "right"), keepdims=True)
        return unit.astype(np.float32)

    def sides(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Matrix]]:
        """The tensors of each layer by role, in float64."""
        found: dict[str, dict[str, Matrix]] = {}
        for role in self.parts:
            for module, name in modules_of(layout, role):
                found.setdefault(module, {})[role] = adapter[name].astype(np.float64)
        return found

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """U diag(d) and V^T of each layer."""
        return {
            module: (frame(told["left"]) * told["values"], frame(told["right"].T).T)
            for module, told in self.sides(layout, adapter).items()
        }

    def exact(self, moving: Collection[str]) -> bool:
        """Where d moves alone."""
        return not {"left", "right"} & set(moving)

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s sqrt(r)` where d moves; where vectors do, by seeded draws."""
        gain = {}
        for module, told in self.sides(layout, adapter).items():
            d = told["values"]
            squares = float(len(d)) if "values" in moving else 0.0
            for role in {"left", "right"} & set(moving):
                vectors = told[role] if role == "left" else told[role].T
                squares += _moved(vectors, d)
            gain[module] = self.scaling() * math.sqrt(squares)
        return gain

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(r)`: vectors move nothing while d is zero."""
        return self.scaling() * math.sqrt(self.r)

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The reflections of the singular vectors of a change of rank r at most, and its singular values."""
        taken: Adapter = {}
        names = {role: dict(modules_of(layout, role)) for role in self.parts}
        for module, thin in self.change(layout, drawn).items():
            left, right = saved_sides(saved, module, *thin)
            u, s, vt = factors.svd(left, right)
            u, s, vt = u[:, : self.r], s[: self.r], vt[: self.r]
            check_rest(module, Thin(left, right), Thin(u * s, vt), f"of rank {self.r} at most")
            (one, signs), (other, more) = _reflections(u, self.r), _reflections(vt.T, self.r)
            d = np.zeros(self.r)
            d[: len(s)] = s * (signs * more)[: len(s)] * (saved.scaling / self.scaling())
            made = {"left": one, "right": other.T, "values": d}
            taken |= {names[role][module]: np.ascontiguousarray(t, np.float32) for role, t in made.items()}
        return taken


def frame(vectors: Any) -> Any:
    """`H(v_1) .. H(v_r) E`, orthonormal (n x r), of vectors (n x r); of NumPy or torch."""
    r = vectors.shape[1]
    made = 0.0 * vectors
    made[range(r), range(r)] = 1.0
    for i in reversed(range(r)):
        v = vectors[:, i]
        made = made - (2.0 / (v @ v + _TINY)) * v[:, None] * (v @ made)[None]
    return made


def _moved(vectors: Matrix, d: Matrix) -> float:
    """The expected square of how far `U diag(d)` moves, to first order, for noise of variance 1 on its vectors."""
    rng, squares = generator(0, "reflections", *vectors.shape), 0.0
    for _ in range(_PROBES):
        noise = _STEP * rng.standard_normal(vectors.shape)
        apart = (frame(vectors + noise) - frame(vectors - noise)) / (2 * _STEP)
        squares += float(np.square(apart * d).sum()) / _PROBES
    return squares


def _reflections(whole: Matrix, r: int) -> tuple[Matrix, Matrix]:
    """Vectors (n x r) whose reflections make an orthonormal frame (n x k) but for signs of its columns, (r)."""
    from scipy.linalg import qr

    (packed, tau), upper = qr(whole, mode="raw")
    vectors, signs = np.zeros((len(whole), r)), np.ones(r)
    k = whole.shape[1]
    vectors[:, :k] = np.where(tau != 0, np.tril(packed, -1) + np.eye(len(whole), k), 0.0)
    signs[:k] = np.sign(np.diag(upper))
    return vectors, signs
