"""A last layer of low rank: `model.head: {rank: r}`.

    W = U V

with V (r x in) drawn from the seed and frozen, as FFA-LoRA freezes A, and U (labels x r) trained, with the bias
where the layer has one. W is linear in U, so that the mean of the clients' U stands for the mean of their W. The
rows of V are orthogonal and of length `sqrt(in / r)`: what U reads is in the mean as long as what W would.
Exported, it is W, the layer that transformers knows.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.adapter import Adapter
from fedlora.errors import SettingError
from fedlora.kinds.contract import under
from fedlora.seeding import generator

_DOWN, _UP = "narrowed", "widened"  # what V and U are called, and no part of a model that transformers has


def narrow(
    model: Any, heads: Collection[str], labels: int, rank: int, seed: int, missing: Sequence[str]
) -> list[str]:
    """Put a last layer of low rank in the place of the one for so many labels.

    Args:
        model: of transformers.
        heads: what it has beside its body.
        labels: how many there are.
        rank: of the layer.
        seed: V is drawn from it.
        missing: weights that nobody trained yet.

    Returns:
        The weights that nobody trained, with those of the new layer.

    Raises:
        SettingError: there is no such layer, or the rank is not below its width.
    """
    import torch

    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear
        and layer.out_features == labels
        and any(under(f"{name}.", h) for h in heads)
    ]
    if not found:
        raise SettingError(
            "model.head", f"{type(model).__name__} has no linear layer of {labels} labels: write trained"
        )
    name, layer = found[-1]
    if rank >= layer.in_features:
        raise SettingError("model.head", f"rank {rank} is not below the {layer.in_features} numbers that it reads")
    place = layer.weight.device
    down = torch.nn.Linear(layer.in_features, rank, bias=False, device=place)
    up = torch.nn.Linear(rank, labels, bias=layer.bias is not None, device=place)
    if place.type != "meta":
        with torch.no_grad():
            down.weight.copy_(torch.from_numpy(_projection(layer.in_features, rank, seed)))
    above, _, own = name.rpartition(".")
    setattr(model.get_submodule(above), own, torch.nn.Sequential(OrderedDict([(_DOWN, down), (_UP, up)])))
    fresh = [f"{name}.{_UP}.{part}" for part, _ in up.named_parameters()]
    return [*(n for n in missing if not under(n, name)), *fresh]


def _projection(width: int, rank: int, seed: int) -> Any:
    """V, (rank, width) in float32."""
    drawn = np.linalg.qr(generator(seed, "head", "projection").standard_normal((width, rank)))[0]
    return (drawn.T * (width / rank) ** 0.5).astype(np.float32)


def is_frozen(name: str) -> bool:
    """Whether a tensor of a head stays as it was drawn whatever else of the head trains."""
    return under(name, _DOWN)


def whole(tensors: Mapping[str, Any]) -> Adapter:
    """Tensors by name, with W in the place of U and V."""
    made = {name: tensor for name, tensor in tensors.items() if not under(name, _DOWN) and not under(name, _UP)}
    for name, tensor in tensors.items():
        if under(name, _UP):
            down = tensors[name.replace(_UP, _DOWN).removesuffix(".bias").removesuffix(".weight") + ".weight"]
            made[name.replace(f".{_UP}", "")] = tensor if name.endswith(".bias") else tensor @ down
    return made
