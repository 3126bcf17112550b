"""The Pruner contract: a base of the same make with fewer parts, which transformers loads as it loads the base.

What a pruner leaves out are units of each block's MLP, or whole blocks. The configuration says how many are left,
so that all blocks must be alike. What it makes needs nothing of fedlora: merges, few bits and exports work with
it.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.compressors.contract import Compressor, Statistic
from fedlora.errors import SettingError
from fedlora.kinds.targets import linear_layers

if TYPE_CHECKING:
    import torch

KEY = "compress.use"
UNITS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")
"""What configurations call the units of an MLP."""

_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
Pass = Callable[[], "torch.Tensor"]
"""Has a model pass some public texts: the last hidden states of their tokens, (tokens, width)."""


@dataclass(frozen=True)
class Part:
    """What became of a part.

    Attributes:
        shape: of it before: the weight (out, in) of the layer after an MLP's units; of a block (1,).
        kept: units, or 0 of a block that goes; None where it stays whole.
        error: part of the length of its outputs that is lost, or how far last hidden states turned without it.
    """

    shape: tuple[int, ...]
    kept: int | None
    error: float = 0.0


@dataclass(frozen=True)
class Pruned:
    """A model of fewer parts.

    Attributes:
        config: keys of its configuration that changed.
        state: its weights, by name.
        parts: what became of each part, by name.
    """

    config: Mapping[str, Any]
    state: Mapping[str, "torch.Tensor"]
    parts: Mapping[str, Part]


@dataclass(kw_only=True)
class Pruner(Compressor):
    """A way to leave parts of a base out, in all blocks alike."""

    factors: ClassVar[bool] = False
    part: ClassVar[tuple[str, str]]
    """What a part is called, and what becomes of it, as in `2 blocks left out`."""

    @abstractmethod
    def prune(self, model: Any, known: Mapping[str, Statistic], passes: Sequence[Pass]) -> Pruned:
        """What is left of a model, which stays as it is.

        Args:
            model: of transformers, in evaluation.
            known: the statistics of the layers that it goes by.
            passes: of public texts, where it takes those.
        """


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block.

    Attributes:
        ups: names of the layers whose outputs are its units: one, or with a gate two.
        down: of the layer whose inputs they are.
    """

    ups: tuple[str, ...]
    down: str


def blocks_of(model: Any) -> tuple[str, list[Any]]:
    """The blocks of a model, and the name of their list.

    Raises:
        SettingError: there is no such list, or more than one.
    """
    import torch

    lists = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
    held = {n: m for n, m in lists.items() if len({type(one) for one in m}) == 1 and linear_layers(m, ())}
    outer = [n for n in held if not any(n.startswith(f"{other}.") for other in held)]
    if len(outer) != 1:
        raise SettingError(KEY, f"the model has {len(outer)} lists of blocks, and needs one: take lord")
    return outer[0], list(held[outer[0]])


def depth(model: Any, blocks: Sequence[Any]) -> str:
    """The key of the configuration that says how many blocks there are.

    Raises:
        SettingError: there is none.
    """
    told = model.config.get_text_config()
    keys = [key for key in _DEPTH if getattr(told, key, None) == len(blocks)]
    if not keys:
        raise SettingError(KEY, f"the configuration does not say that there are {len(blocks)} blocks: take lord")
    return keys[0]


def mlps(model: Any) -> tuple[str, int, list[Mlp]]:
    """The key of the configuration that says how many units an MLP has, their number, and the MLP of each block.

    Raises:
        SettingError: a block has none that can be told from its other layers.
    """
    (name, blocks), told = blocks_of(model), model.config.get_text_config()
    key = next((key for key in UNITS if hasattr(told, key)), "")
    units = (getattr(told, key, None) or 4 * told.hidden_size) if key else 0  # GPT-2 says nothing for four times
    found = []
    for number, block in enumerate(blocks):
        sides = {n: sides_of(block.get_submodule(n)) for n in linear_layers(block, ())}
        ups = tuple(f"{name}.{number}.{n}" for n, (out, into) in sides.items() if out == units != into)
        downs = [f"{name}.{number}.{n}" for n, (out, into) in sides.items() if into == units != out]
        if not 1 <= len(ups) <= 2 or len(downs) != 1:
            raise SettingError(KEY, f"{name}.{number} has no MLP of two or three layers with units: take lord")
        found.append(Mlp(ups, downs[0]))
    return key, int(units), found


def turned(layer: Any) -> bool:
    """Whether a linear layer keeps its weight as (in x out)."""
    return type(layer).__name__ == "Conv1D"


def sides_of(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = layer.weight.shape
    return (second, first) if turned(layer) else (first, second)


def remade(model: Any, config: Mapping[str, Any], state: Mapping[str, "torch.Tensor"] | None) -> Any:
    """A model of the same class with some keys of its configuration changed.

    Args:
        model: of transformers.
        config: the keys, with their values.
        state: its weights; None: it has shapes alone.

    Raises:
        SettingError: the weights are of other shapes: something else of the model has as many parts.
    """
    import torch

    told = copy.deepcopy(model.config)
    for key, value in config.items():
        setattr(told.get_text_config(), key, value)
    with torch.device("cpu" if state is not None else "meta"):
        made = type(model)._from_config(told, dtype=model.dtype).eval()
    if state is not None:
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise SettingError(KEY, "parts of this model hang together in another way: take lord") from error
    return made
