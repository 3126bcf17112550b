"""MoDeGPT (Lin et al., 2024, https://arxiv.org/abs/2408.09632): fewer units in each MLP, by the Nystrom method.

An MLP is `W_d h(x)`, with h (n,) its units and C = E[h h^T] (n x n) their second moments, the gram of the layer
after them. k units S are kept, those of the largest ridge leverage, and that layer makes up for the others as far
as C says that these follow from the kept ones:

    s_i = [C (C + l I)^-1]_ii,      W_d -> W_d C[:, S] C[S, S]^-1       (out x k)

It is the best for the mean squared error of the outputs, given S. The paper takes l = 1; here it is what C has
beyond k directions, over k (Cohen, Musco and Musco, 2017, https://arxiv.org/abs/1511.07263), so that it needs no
scale. Of a noised C the noise is taken out first, and the ridge that this leaves in C keeps the inverse tame.
Where noise drowns all, leverages are equal, and the units stay that W_d gives the most weight.

The paper also cuts queries and keys, values and outputs. Not here: heads of another width than hidden size over
heads are beyond what most configurations can say. It shares the cut unevenly over blocks; here all keep as many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.compressors.contract import Kind, Statistic
from fedlora.compressors.noised import symmetric
from fedlora.compressors.pruner import Part, Pass, Pruned, Pruner, mlps, remade, sides_of, turned
from fedlora.errors import SettingError
from fedlora.factors import Matrix

if TYPE_CHECKING:
    import torch

_SLACK = 1e-6  # of the mean square of a unit, added to each: float32 made the sums
_ALIKE = 9  # digits to which leverages that differ by rounding alone are equal


@dataclass(kw_only=True)
class MoDeGPT(Pruner):
    """Fewer units in the MLP of each block; the layer after them makes up for the others."""

    takes: ClassVar[tuple[Kind, ...]] = ("gram",)
    needs: ClassVar[bool] = True
    part: ClassVar[tuple[str, str]] = ("MLP", "narrower")

    def goes_by(self, model: Any, layers: Sequence[str]) -> list[str]:
        """The layer after the units of each block."""
        key, units, found = mlps(model)
        downs = [mlp.down for mlp in found]
        if missing := [name for name in downs if name not in layers]:
            raise SettingError("compress.targets", f"modegpt cuts all blocks alike, and {missing[0]} is left out")
        kept = _count(self.keep, units)
        shapes = {name: tensor.shape for name, tensor in remade(model, {key: kept}, None).state_dict().items()}
        changed = {name for name, tensor in model.state_dict().items() if shapes.get(name) != tensor.shape}
        ups = [(name, model.get_submodule(name)) for mlp in found for name in mlp.ups]
        meant = {f"{name}.weight" for name in (*downs, *(name for name, _ in ups))}
        meant |= {f"{name}.bias" for name, layer in ups if layer.bias is not None}
        if kept < units and (strange := changed ^ meant):
            raise SettingError("compress.use", f"{min(strange)} hangs on the units in another way: take lord")
        return downs

    def prune(self, model: Any, known: Mapping[str, Statistic], passes: Sequence[Pass]) -> Pruned:
        """As many units in each block, those that say most of the others."""
        import torch

        key, units, found = mlps(model)
        kept, state, parts = _count(self.keep, units), dict(model.state_dict()), {}
        for mlp in found:
            down = model.get_submodule(mlp.down)
            weight = down.weight.detach().double().numpy()
            weight = weight.T if turned(down) else weight
            units_kept, mended, error = narrowed(weight, *symmetric(*_noisy(known[mlp.down])), kept)
            parts[mlp.down] = Part(sides_of(down), kept if kept < units else None, error)
            made = torch.from_numpy(np.ascontiguousarray(mended.T if turned(down) else mended))
            state[f"{mlp.down}.weight"] = made.to(down.weight.dtype)
            for name in mlp.ups:
                _pick(state, name, model.get_submodule(name), torch.from_numpy(units_kept))
        return Pruned({key: kept}, state, parts)


def narrowed(weight: Matrix, values: Matrix, turn: Matrix, kept: int) -> tuple[NDArray[np.int64], Matrix, float]:
    """The units that are kept, and what the layer after them becomes.

    Args:
        weight: W_d, (out x n).
        values: eigenvalues of C, descending and above 0, (n,).
        turn: its eigenvectors in columns, (n x n).
        kept: k.

    Returns:
        S, ascending; the layer, (out x k); and the part of the length of its outputs that is lost.
    """
    if kept == len(values):
        return np.arange(kept), weight, 0.0
    gram = turn * values @ turn.T
    ridge = max(values[kept:].sum() / kept, np.finfo(float).tiny)
    leverage = (turn**2) @ (values / (values + ridge))
    order = np.lexsort((-np.linalg.norm(weight, axis=0), -np.round(leverage, _ALIKE)))
    units = np.sort(order[:kept])
    inner = gram[np.ix_(units, units)] + _SLACK * values.mean() * np.eye(kept)
    mended = np.linalg.solve(inner, gram[units] @ weight.T).T
    off = weight.copy()
    off[:, units] -= mended
    lost, whole = (np.einsum("ij,jk,ik", w, gram, w) for w in (off, weight))
    return units, mended, float(np.sqrt(max(lost, 0.0) / max(whole, np.finfo(float).tiny)))


def _count(keep: float, units: int) -> int:
    return max(int(keep * units), 1)


def _noisy(statistic: Statistic) -> tuple[Matrix, float]:
    return statistic.values, statistic.deviation


def _pick(state: "dict[str, torch.Tensor]", name: str, layer: Any, units: "torch.Tensor") -> None:
    """Leave a layer with some of its outputs."""
    state[f"{name}.weight"] = layer.weight.detach().index_select(1 if turned(layer) else 0, units)
    if layer.bias is not None:
        state[f"{name}.bias"] = layer.bias.detach()[units]
