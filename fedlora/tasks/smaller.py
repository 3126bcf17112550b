"""A base that was made smaller, as a folder: written once, and held by every worker.

`manifest.json` says what was cut, by which statistic and at what cost, with the error of each layer; it is written
last, so that a folder with one is whole. The weights are in one of two forms:

- `factors.safetensors`: two factors for each layer that was cut (`NAME.left`, `NAME.right`), all else as it was.
  This is the smaller one. transformers knows no such model, and refuses the folder, as it finds no weights there.
- `model.safetensors`: an ordinary folder of transformers. It holds the factors multiplied out, the same function
  and as large as the base was; or a model of the same make with fewer units or blocks.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import SettingError
from fedlora.kinds.targets import linear_layers
from fedlora.tasks.located import FACTORS, MANIFEST, is_factored

if TYPE_CHECKING:
    import torch

KEY = "model.base"
WEIGHTS = "model.safetensors"


def manifest(folder: Path | str) -> dict[str, Any]:
    """What the manifest of a folder says.

    Raises:
        SettingError: there is none, or it is not that of these weights.
    """
    file = Path(folder) / MANIFEST
    try:
        told = json.loads(file.read_bytes())
        layers, known = dict(told["layers"]), told["fingerprint"]
        fine = all({"shape", "rank", "transposed"} <= layer.keys() for layer in layers.values())
        weights = Path(folder) / (FACTORS if is_factored(folder) else WEIGHTS)
        found = fingerprint(weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingError(KEY, f"{file}: is missing or damaged: make the folder again") from error
    if not fine or known != found:
        raise SettingError(KEY, f"{folder}: {weights.name} is not what {MANIFEST} was written for: make it again")
    return dict(told)


def fingerprint(file: Path) -> str:
    """Of all bytes of a file of weights."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def check_whole_bits(path: str, quantize: object) -> None:
    """Refuse to hold a base of factors in few bits.

    Raises:
        SettingError: it is one.
    """
    if quantize is not None and is_factored(path):
        raise SettingError("model.quantize", "the base holds its weights as factors, in full: leave it out")


def check_merges(layers: Iterable[Any]) -> None:
    """Refuse to add to a weight that is a product of factors.

    Raises:
        SettingError: one of the layers has such a weight.
    """
    from fedlora.passes.factored import FactoredLinear

    if any(isinstance(layer, FactoredLinear) for layer in layers):
        raise SettingError(KEY, "this strategy adds to the frozen weights, and here they are products of factors")


def pretrained(auto: Any, path: str, *, config: Any = None, revision: str = "main", **told: Any) -> Any:
    """As `from_pretrained` of a class of transformers; of a base of factors, these multiplied out.

    Args:
        auto: the class, such as `AutoModelForCausalLM`.
        path: a folder or a Hub id.
        config: of the model; by default its own.
        revision: of a Hub id.
        told: further arguments.

    Raises:
        SettingError: the folder is damaged.
    """
    if not is_factored(path):
        named = {} if config is None else {"config": config}
        return auto.from_pretrained(path, revision=revision, **named, **told)
    from transformers import AutoConfig

    if config is None:
        config, told = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **told)
    cls = auto._model_mapping[type(config)]
    model = cls.from_pretrained(None, config=config, state_dict=_whole(path), **told)
    found = model[0] if isinstance(model, tuple) else model
    found.config._name_or_path = found.name_or_path = path
    return model


def thinned(model: Any, path: str) -> Any:
    """A model of a base of factors with the factors in it, in place of what they multiply to; others as they are.

    Args:
        model: of transformers; on the device `meta` it gets the shapes.
        path: of the base.

    Raises:
        SettingError: the model has no such layers.
    """
    from fedlora.passes.factored import FactoredLinear

    if not is_factored(path):
        return model
    cut = {n: layer for n, layer in manifest(path)["layers"].items() if layer["rank"] is not None}
    held = _tensors(path)
    named = {name: model.get_submodule(name) for name in linear_layers(model, ())}
    for saved, name in paired(cut, named).items():
        layer, told = named[name], cut[saved]
        sides = [
            held[f"{saved}.{side}"].to(layer.weight.dtype).to(layer.weight.device) for side in ("left", "right")
        ]
        if [sides[0].shape[0], sides[1].shape[1]] != told["shape"]:
            raise SettingError(KEY, f"{path}: the factors of {saved} have other shapes than {MANIFEST} says")
        parent, _, last = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.detach()
        setattr(model.get_submodule(parent), last, FactoredLinear(sides[0], sides[1], bias))
    return model


def factors(folder: Path | str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The factors of a base that was cut, by the name of its layers: (out, k) and (k, in).

    Raises:
        SettingError: the folder is damaged.
    """
    held, layers = _tensors(str(folder)), manifest(folder)["layers"]
    cut = [name for name, layer in layers.items() if layer["rank"] is not None]
    return {n: (held[f"{n}.left"].float().numpy(), held[f"{n}.right"].float().numpy()) for n in cut}


def paired(saved: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Which layer of a model each saved one is: its name may begin with that of the body, or lack it.

    What a model of another task has not, such as a pooler, is left out.

    Raises:
        SettingError: one is several, or none is there.
    """
    found: dict[str, str] = {}
    for one in saved:
        fits = [n for n in names if n == one or n.endswith(f".{one}") or one.endswith(f".{n}")]
        if len(fits) > 1:
            raise SettingError(KEY, f"the base was cut at {one}, and this model has {len(fits)} of that name")
        found |= dict.fromkeys((one,), fits[0]) if fits else {}
    if saved and not found:
        raise SettingError(KEY, f"the base was cut at {min(saved)}, which this model has not: it is another one")
    return found


def write(
    folder: Path, model: Any, cuts: Mapping[str, Any], told: Mapping[str, Any], whole: bool
) -> dict[str, Any]:
    """Write the weights of a model whose layers are cut, and the manifest; what that says.

    Args:
        folder: that is there.
        model: of transformers, uncut.
        cuts: of its layers, by name; each with `left`, `right` and `rank`.
        told: what else the manifest says; its `layers` have `transposed`.
        whole: multiply the factors out.
    """
    import torch
    from safetensors.torch import save_file

    state: dict[str, torch.Tensor] = dict(model.state_dict())
    kept: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        cut = cuts.get(layer) if last == "weight" else None
        if cut is not None and cut.rank is not None:
            sides = [torch.from_numpy(side).to(tensor.dtype) for side in (cut.left, cut.right)]
            if whole:
                made = (torch.from_numpy(cut.left) @ torch.from_numpy(cut.right)).to(tensor.dtype)
                tensor.copy_(made.T if told["layers"][layer]["transposed"] else made)
            kept |= {f"{layer}.left": sides[0], f"{layer}.right": sides[1]}
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue  # tied to one that is kept
        seen.add(place)
        kept[name] = tensor.contiguous()
    if whole:
        return ordinary(folder, model, told)
    model.config.save_pretrained(str(folder))
    save_file(kept, folder / FACTORS, metadata={"format": "pt"})
    return _told(folder, told, FACTORS)


def ordinary(folder: Path, model: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model as transformers does, in one file of weights, and the manifest; what that says.

    Args:
        folder: that is there.
        model: of transformers.
        told: what else the manifest says.
    """
    model.save_pretrained(str(folder), max_shard_size="1TB")
    return _told(folder, told, WEIGHTS)


def _told(folder: Path, told: Mapping[str, Any], weights: str) -> dict[str, Any]:
    made = {**told, "loads_without_fedlora": weights == WEIGHTS, "fingerprint": fingerprint(folder / weights)}
    (folder / MANIFEST).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def _tensors(path: str) -> dict[str, "torch.Tensor"]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(Path(path) / FACTORS))
    except Exception as error:  # whatever its bytes made the library trip over
        raise SettingError(KEY, f"{path}: {FACTORS} cannot be read: make the folder again") from error


def _whole(path: str) -> dict[str, "torch.Tensor"]:
    """The weights of a base of factors, each whole, by the names that transformers saves them under."""
    held, layers = _tensors(path), manifest(path)["layers"]
    for name, layer in layers.items():
        if layer["rank"] is not None:
            left, right = (held.pop(f"{name}.{side}") for side in ("left", "right"))
            whole = left @ right
            held[f"{name}.weight"] = whole.T.contiguous() if layer["transposed"] else whole
    return held
