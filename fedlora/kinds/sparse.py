"""SLTrain (Han et al., 2024, https://arxiv.org/abs/2406.02214): thin factors, and values at places of the seed.

    W' = W + alpha / r * (B A + S(v)),   B (out x r) and v (n) train, zero at first

A (r x in) is drawn as LoRA's. S(v) has the n numbers of v at places that the seed draws, all different, and zeros
elsewhere: `n = density out in`. Neither A nor the places train or travel. The paper trains such a sum from
scratch, A too; here it is a change of a frozen weight, and it is linear in all that travels, together:

    sum_k p_k (B_k A + S(v_k)) = (sum_k p_k B_k) A + S(sum_k p_k v_k)

S(v) is of full rank with but a few values a row, so that this change is no product of thin factors
(`fedlora.lazy`). An export is a LoRA of the rank that the change needs: up to the smaller side of a layer, where
it has more numbers than the weight. Noise reaches the weight as `s sqrt(out r / 3 + n)`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.kinds.contract import Facts, Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.frames import Still, check_rest, saved_sides
from fedlora.lazy import Lazy, Scattered, Thin, Total


@dataclass(frozen=True)
class Sparse(Still):
    """A weight's change is `alpha / r * (B @ A + S(v))`, with values v at places that the seed draws."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("seeded", False),
        "B": Part("zero", True),
        "support": Part("seeded", False),
        "values": Part("zero", True),
    }
    ordinary: ClassVar[bool] = False
    thin: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    facts: ClassVar[Facts] = Facts("B, v (n)", "s sqrt(out r / 3 + n)")

    density: float = 0.01
    """Share of a weight's numbers that change by themselves, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse a support of nothing.

        Raises:
            ValueError: density is not a share.
        """
        if (
            isinstance(self.density, bool)
            or not isinstance(self.density, int | float)
            or not 0 < self.density <= 1
        ):
            raise ValueError(f"density is {self.density!r}, and should be above 0 and at most 1")

    def count(self, out: int, into: int) -> int:
        """How many values a layer (out x in) has: one at least."""
        return max(1, int(self.density * out * into))

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with the values beside B."""
        from fedlora.kinds.modules import Beside, Passing, Scatter

        wrapped = super().wrap(model, heads, task_type)
        for module in list(wrapped.modules()):
            if hasattr(module, "lora_A"):
                first, last = module.lora_A["default"], module.lora_B["default"]
                into, out = first.in_features, last.out_features
                module.lora_A["default"] = Passing(into, self.r, bias=False)
                module.lora_B["default"] = Beside(Scatter(out, into, self.count(out, into)), last)
        return wrapped

    def role(self, name: str) -> str:
        """`A`, `B`, `support`, `values`, or `head`."""
        last = name.rpartition(".scatter.")
        return last[2] if last[1] and ".lora_B." in name else super().role(name)

    def beside(self, role: str, out: int, into: int) -> tuple[int, ...]:
        """As many values, and their places, as the density says."""
        sizes = {"values": (self.count(out, into),), "support": (2, self.count(out, into))}
        return sizes.get(role) or super().beside(role, out, into)

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Places as rows and columns, row by row; the rest as LoRA's."""
        if slot.role != "support" or weights is None:
            return super().initial(slot, rng, weights)
        out, into = weights(slot.module).shape
        places = np.sort(rng.choice(out * into, slot.shape[1], replace=False))
        return np.stack(np.divmod(places, into)).astype(np.float32)  # exact up to 2^24 rows and columns

    def lazy(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Mapping[str, Lazy]:
        """`B A + S(v)` of each layer."""
        places, values = (dict(modules_of(layout, role)) for role in ("support", "values"))
        made: dict[str, Lazy] = {}
        for module, (b, a) in super().change(layout, adapter).items():
            rows, columns = adapter[places[module]].astype(np.int64)
            scattered = Scattered(rows, columns, adapter[values[module]], (len(b), a.shape[1]))
            made[module] = Total([(1.0, Thin(b, a)), (1.0, scattered)])
        return made

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """As wide as it takes."""
        return {module: whole.factors() for module, whole in self.lazy(layout, adapter).items()}

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The B and v of a change that they can write: row by row, B by all but the places, and v by these."""
        taken: Adapter = {}
        names = {role: dict(modules_of(layout, role)) for role in self.parts}
        ratio = saved.scaling / self.scaling()
        for module, thin in super().change(layout, drawn).items():
            a = thin[1].astype(np.float64)
            left, right = saved_sides(saved, module, *thin)
            rows, columns = drawn[names["support"][module]].astype(np.int64)
            b, values = np.empty(thin[0].shape), np.empty(len(rows))
            for i in range(len(b)):
                row, mine = left[i] @ right, columns[rows == i]
                b[i] = np.linalg.lstsq(np.delete(a, mine, 1).T, np.delete(row, mine), rcond=None)[0]
                values[rows == i] = (row - b[i] @ a)[mine]
            found = Total([(1.0, Thin(b, a)), (1.0, Scattered(rows, columns, values, (len(b), a.shape[1])))])
            check_rest(module, Thin(left, right), found, "made by the A and the places that this seed draws")
            taken[names["B"][module]] = (ratio * b).astype(np.float32)
            taken[names["values"][module]] = (ratio * values).astype(np.float32)
        return taken

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """LoRA's, and `s sqrt(n)` where v moves."""
        plain = Still(self.r, self.alpha, self.targets, rslora=self.rslora).noise_gain(layout, adapter, moving)
        of_values = {
            module: self.scaling() * math.sqrt(adapter[name].size) if "values" in moving else 0.0
            for module, name in modules_of(layout, "values")
        }
        return {module: math.hypot(gain, of_values[module]) for module, gain in plain.items()}

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(out r / 3 + n)`."""
        return self.scaling() * math.sqrt(out * self.r / 3 + self.count(out, into))
