"""LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    W' = W + alpha / r * B A,   A (r x in) drawn, B (out x r) zero at first

Under `rslora` the factor is `alpha / sqrt(r)`, which does not shrink the change as r grows.

The change is linear in B where A is frozen (FFA-LoRA), and in A where B is; in both at once it is not, so that
averaging them apart is not averaging the changes.
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor, pairs
from fedlora.errors import SettingError
from fedlora.kinds.contract import Facts, Gradients, Kind, Part, Saved, Weights, first_of_head, under
from fedlora.kinds.targets import ALL, choose, fits, is_pattern


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], rank: int) -> None:
    """Refuse a tensor to begin from that is of another shape.

    Raises:
        SettingError: with both.
    """
    if tensor.shape == shape:
        return
    side = 0 if ".lora_A." in name else 1
    if len(tensor.shape) == 2 and tensor.shape[1 - side] == shape[1 - side]:
        own = tensor.shape[side]
        raise SettingError("model.start", f"it has rank {own}, and model.adapter.r is {rank}: set it to {own}")
    raise SettingError(
        "model.start", f"its {name} is {tensor.shape}, and this base's {shape}: it is of another base"
    )


@dataclass(frozen=True)
class Lora(Kind):
    """A weight's change is `alpha / r * B @ A`, a product of two thin factors."""

    parts: ClassVar[Mapping[str, Part]] = {"A": Part("seeded", True), "B": Part("zero", True)}
    ordinary: ClassVar[bool] = True
    gradients: ClassVar[Gradients] = "product"
    facts: ClassVar[Facts] = Facts("A, B; B alone under ffa_lora", "s sqrt(out r / 3)")

    @property
    def width(self) -> int:
        """Rows of A as peft builds it."""
        return self.r

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """A loses rows and B columns."""
        cut = {"A": (rank, *slot.shape[1:]), "B": (*slot.shape[:1], rank, *slot.shape[2:])}
        return cut.get(slot.role, slot.shape)

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """Its A, and its B so that the change is the same under this scaling."""
        taken: Adapter = {}
        for b, a in pairs(layout):
            taken[b], taken[a] = saved.factors(layout[b].module)
            for name in (b, a):
                check_shape(name, taken[name], self.shape(layout[name], self.r), self.r)
            if saved.scaling != self.scaling():
                taken[b] = taken[b] * np.float32(saved.scaling / self.scaling())
        return taken

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B and A of each layer."""
        return {layout[b].module: (adapter[b], adapter[a]) for b, a in pairs(layout)}

    def exact(self, moving: Collection[str]) -> bool:
        """Unless A and B both move."""
        return not {"A", "B"} <= set(moving)

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s sqrt(out) ||A||_F` where B moves, `s sqrt(in) ||B||_F` where A does."""
        gain = {}
        for name, (b, a) in self.change(layout, adapter).items():
            of_b = len(b) * float(np.square(a, dtype=np.float64).sum()) if "B" in moving else 0.0
            of_a = a.shape[1] * float(np.square(b, dtype=np.float64).sum()) if "A" in moving else 0.0
            gain[name] = self.scaling() * (of_a + of_b) ** 0.5
        return gain

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(out r / 3)`: A's numbers have a variance of `1 / (3 in)`, and B is zero."""
        return self.scaling() * math.sqrt(out * self.r / 3)

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """Put factors beside the layers that are meant.

        Raises:
            SettingError: they are not there (`targets.choose`), or peft does not take one of them.
        """
        from peft import LoraConfig, get_peft_model

        chosen = choose(model, heads, self.targets, self.exclude, self.layers, self.convolutions)
        plain = not self.exclude and not any(t == ALL or is_pattern(t) for t in self.targets)
        names, others = (list(self.targets) if plain else chosen), [n for n, _ in model.named_modules()]
        more = [n for n in others if n not in chosen and any(fits(n, name) for name in names)]
        config = LoraConfig(
            r=self.width,
            lora_alpha=self.alpha,  # peft multiplies by it, so a float is right
            lora_dropout=0.0,
            # Ends of names where these mean the same to peft.
            target_modules=names if plain or not more else "|".join(map(re.escape, chosen)),
            layers_to_transform=list(self.layers) if plain and self.layers is not None else None,
            exclude_modules=[n for n in others if any(under(f"{n}.", head) for head in heads)] or None,
            modules_to_save=list(heads) or None,
            task_type=task_type,
            use_rslora=self.rslora,
        )
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # untied to be merged
            try:
                return get_peft_model(model, config)
            except ValueError as error:  # of layers whose weights their model reads by itself
                said = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
                raise SettingError(
                    "model.adapter.targets", f"{said}: leave it out, with model.adapter.exclude"
                ) from error

    def role(self, name: str) -> str:
        """`A`, `B` or `head`."""
        if ".lora_A." in name:
            return "A"
        return "B" if ".lora_B." in name else "head"

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """A uniform on +-1/sqrt(in) as peft draws it, B zero, head normal(0, 0.02) with zero bias."""
        if slot.role == "A":
            bound = slot.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5), as in peft and in the LoRA code
            return rng.uniform(-bound, bound, slot.shape).astype(np.float32)
        return first_of_head(slot, rng) if slot.role == "head" else np.zeros(slot.shape, np.float32)
