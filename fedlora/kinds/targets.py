"""Which layers of a model get a change of their weight, by names, by patterns, or all of them.

A target is the end of a layer's name, such as `q_proj` or `self_attn.q_proj`; a regular expression that the whole
name fits, as peft has it, where it holds more than letters, digits, `_`, `-` and dots; or `all-linear`.
"""

import re
from collections.abc import Sequence
from typing import Any

from fedlora.errors import SettingError
from fedlora.kinds.contract import under

ALL = "all-linear"
"""The target that stands for every linear layer but those of heads and the one that puts out tokens."""

_LITERAL = re.compile(r"[\w.-]+")


def is_pattern(target: str) -> bool:
    """Whether a target is a regular expression."""
    return not _LITERAL.fullmatch(target)


def fits(name: str, target: str) -> bool:
    """Whether the name of a layer is the target, ends in it, or fits it where that is a pattern."""
    if is_pattern(target):
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def choose(
    model: Any,
    heads: Sequence[str],
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    convolutions: bool = False,
) -> list[str]:
    """The names of the linear layers that are meant, outside of heads; and of convolutions that are named.

    Args:
        model: of transformers.
        heads: modules that federate whole.
        targets: what is meant.
        exclude: what is not, as targets are written; the name of any part of the model stands for all in it.
        layers: numbers of the blocks that have targets, from 0; None: all.
        convolutions: whether these may be named; `all-linear` means none of them.

    Raises:
        SettingError: a target, an excluded part or a block is not there, or nothing is left.
    """
    plain = linear_layers(model, heads)
    linear = [*plain, *(_convolutions(model, heads) if convolutions else ())]
    for target in targets:
        if target != ALL and not any(fits(name, target) for name in linear):
            raise SettingError("model.adapter.targets", _unmatched(model, target, linear))
    out = model.get_output_embeddings()
    last = [name for name, module in model.named_modules() if module is out]
    every = {*plain} - {*last}
    meant = [name for name in linear if any(fits(name, t) if t != ALL else name in every for t in targets)]
    for part in exclude:
        if not any(_within(name, part) for name, _ in model.named_modules()):
            raise SettingError("model.adapter.exclude", f"{part!r} is the name of no part of the model")
    left = [name for name in meant if not any(_within(name, part) for part in exclude)]
    for layer in layers or ():
        if not any(under(name, str(layer)) for name in left):
            raise SettingError("model.adapter.layers", f"no layer {layer} with targets; the first is 0")
    left = [name for name in left if layers is None or any(under(name, str(layer)) for layer in layers)]
    if not left:
        raise SettingError("model.adapter.targets", _nothing(model, linear))
    return left


def linear_layers(model: Any, heads: Sequence[str]) -> list[str]:
    """The names of a model's linear layers outside of its heads."""
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    return [name for name in layers if not any(under(f"{name}.", head) for head in heads)]


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, as torch has it or as GPT-2 does."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _convolutions(model: Any, heads: Sequence[str]) -> list[str]:
    """The names of a model's convolutions of images, of one group and padded with zeros, outside of its heads."""
    import torch

    found = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    plain = [n for n, m in found if m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)]
    return [name for name in plain if not any(under(f"{name}.", head) for head in heads)]


def _within(name: str, part: str) -> bool:
    return fits(name, part) or (not is_pattern(part) and under(f"{name}.", part))


def _unmatched(model: Any, target: str, linear: Sequence[str]) -> str:
    if not linear:
        return _nothing(model, linear)
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    what = "matches no linear layer of the model"
    for name, module in model.named_modules():
        if (
            fits(name, target) and "Linear" not in type(module).__name__
        ):  # those are of heads, which federate whole
            what = f"is {type(module).__name__}, and factors stand beside linear layers alone"
    if any(fits(name, target) for name, _ in model.named_parameters()):
        what = "is a tensor and no linear layer, as that of all experts together"
    return f"{target!r} {what}; its layers are {known}"


def _nothing(model: Any, linear: Sequence[str]) -> str:
    import torch

    if linear:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        return f"all that is named is excluded; the model's layers are {known}"
    convolutions = sum(isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d)) for m in model.modules())
    made = f", and {convolutions} convolutions" if convolutions else ""
    return f"the model has no linear layers{made}: take one with attention, such as a ViT for images"
