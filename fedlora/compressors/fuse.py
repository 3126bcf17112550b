"""FuseGPT's choice of blocks (Pei et al., 2024, https://arxiv.org/abs/2411.14507): the least needed are left out.

The macro influence of a block i is how far the last hidden states X turn where it is passed by, over the tokens of
public texts:

    MI_i = 1 - mean over tokens of cos(X, X without i)

The block of least influence goes, and the influence of the others is measured anew without it, against the whole
model, until `keep` of the blocks are left. The paper then grafts what went onto neighbours, and trains the graft;
here nothing is grafted, and what a run trains has to make up for it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedlora.compressors.contract import TEXTS, Statistic
from fedlora.compressors.pruner import Part, Pass, Pruned, Pruner, blocks_of, depth

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Fuse(Pruner):
    """Fewer blocks: those go without which last hidden states of public texts turn least."""

    takes: ClassVar[tuple[Literal["texts"], ...]] = (TEXTS,)
    needs: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    part: ClassVar[tuple[str, str]] = ("block", "left out")

    def goes_by(self, model: Any, layers: Sequence[str]) -> list[str]:
        """None: texts alone."""
        depth(model, blocks_of(model)[1])
        return []

    def prune(self, model: Any, known: Mapping[str, Statistic], passes: Sequence[Pass]) -> Pruned:
        """The blocks that are left, in their order."""
        name, blocks = blocks_of(model)
        gone: dict[int, float] = {}
        whole = [each() for each in passes] if self.keep < 1 else []
        while len(blocks) - len(gone) > max(int(self.keep * len(blocks)), 1):
            turned = {
                i: _turned(passes, whole, [blocks[j] for j in (*gone, i)])
                for i in range(len(blocks))
                if i not in gone
            }
            least = min(turned, key=turned.__getitem__)
            gone[least] = turned[least]
        left = [i for i in range(len(blocks)) if i not in gone]
        config: dict[str, Any] = {depth(model, blocks): len(left)}
        told = model.config.get_text_config()
        for key, value in told.to_dict().items():  # such as what kind of attention each block has
            if isinstance(value, list) and len(value) == len(blocks) and not key.endswith("_id"):
                config[key] = [value[i] for i in left]
        state = {
            new: tensor
            for old, tensor in model.state_dict().items()
            if (new := _renamed(old, f"{name}.", left)) is not None
        }
        parts = {f"{name}.{i}": Part((1,), None if i in left else 0, gone.get(i, 0.0)) for i in range(len(blocks))}
        return Pruned(config, state, parts)


def _turned(passes: Sequence[Pass], whole: "Sequence[torch.Tensor]", blocks: Sequence[Any]) -> float:
    """How far last hidden states turn where some blocks are passed by."""
    import torch

    near, tokens = 0.0, 0
    with passed_by(blocks):
        for each, before in zip(passes, whole, strict=True):
            near += float(torch.nn.functional.cosine_similarity(each(), before, dim=1).double().sum())
            tokens += len(before)
    return 1 - near / tokens


@contextlib.contextmanager
def passed_by(blocks: Sequence[Any]) -> Iterator[None]:
    """Blocks give on what they are given."""
    handles = [block.register_forward_hook(_given_on, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _given_on(block: Any, given: tuple[Any, ...], named: Mapping[str, Any], out: Any) -> Any:
    hidden = given[0] if given else named["hidden_states"]
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _renamed(name: str, blocks: str, left: Sequence[int]) -> str | None:
    """The name that a weight has in the model of fewer blocks; None where its block is gone."""
    if not name.startswith(blocks):
        return name
    number, _, rest = name.removeprefix(blocks).partition(".")
    return f"{blocks}{left.index(int(number))}.{rest}" if int(number) in left else None
