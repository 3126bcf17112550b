"""LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    W' = W + alpha / r * B A,   A (r x in) drawn, B (out x r) zero at first

The change is linear in B where A is frozen (FFA-LoRA), and in A where B is; in both at once it is not, so that
averaging them apart is not averaging the changes.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor, pairs
from fedlora.errors import SettingError
from fedlora.kinds.contract import Gradients, Kind, Part, Saved, Weights, ends, first_of_head, linear_layers


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

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """A loses rows and B columns."""
        cut = {"A": (rank, *slot.shape[1:]), "B": (*slot.shape[:1], rank)}
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

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """Put factors beside every linear layer whose name ends in one of the targets.

        Raises:
            SettingError: a target matches no linear layer, or one of the layers is not there.
        """
        from peft import LoraConfig, get_peft_model

        layers, inside = linear_layers(model, heads)
        for target in self.targets:
            if not any(ends(name, (target,)) for name in layers):
                known = sorted({name.rsplit(".", 1)[-1] for name in layers})
                raise SettingError(
                    "model.adapter.targets",
                    f"{target!r} matches no linear layer of the model; its layers are {known}",
                )
        for layer in self.layers or ():
            if not any(f".{layer}." in f".{name}" and ends(name, self.targets) for name in layers):
                raise SettingError("model.adapter.layers", f"no layer {layer} with targets; the first is 0")
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # peft multiplies by it, so a float is right
            lora_dropout=0.0,
            target_modules=list(self.targets),
            layers_to_transform=None if self.layers is None else list(self.layers),
            exclude_modules=inside or None,
            modules_to_save=list(heads) or None,
            task_type=task_type,
        )
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # untied to be merged
            return get_peft_model(model, config)

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
