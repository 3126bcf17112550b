"""Frozen linear layers in 4 or 8 bits by a budget of memory, and what rounding loses as a first adapter.

LQ-LoRA (Guo et al., 2023, https://arxiv.org/abs/2311.12023), by the weights alone:

    W ~ Q + L1 L2,    Q in few bits, L1 (out x r), L2 (r x in)

By turns, from Q = 0: L1 L2 is the best of rank r of `W - Q`, and Q is `W - L1 L2` rounded, as long as the error
falls. L2 becomes the adapter's A, with rows as long as drawn ones are, and L1 what its B begins with. So the first
round begins from W as far as rank r can mend it, and where A is frozen all is as in FFA-LoRA. A frozen weight is Q
from then on: an adapter for W itself is what was trained, less L1 L2.

With e_lc the error of layer l in c bits and b_lc the bits that it takes then, the layers' bits are

    argmin sum_lc e_lc^2 x_lc,    sum_c x_lc = 1,  sum_lc b_lc x_lc <= bits * numbers,  x_lc in {0, 1}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora import seeding
from fedlora.errors import SettingError
from fedlora.factors import Factors, Matrix
from fedlora.kinds.contract import PREFIX, Saved
from fedlora.kinds.frames import on_one_thread, rounded
from fedlora.passes import quantized

if TYPE_CHECKING:
    import torch

CHOICES = (4, 8)
KEY = "model.quantize"

_BLOCK, _GROUP = 64, 256  # numbers that share a scale in 4 bits, and scales that share one of their own
_TURNS, _PASSES, _BESIDE = 4, 4, 8  # of Q and L1 L2; of a subspace over W; directions beside those asked for
_LENGTH = 3**-0.5  # of a row of A as it is drawn
Round = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Split:
    """A weight in two parts.

    Attributes:
        rest: W - L1 L2, which is to be rounded, (out, in).
        factors: L1 (out x r) and L2 (r x in); None without a rank.
        error: ||W - L1 L2 - Q||_F.
    """

    rest: "torch.Tensor"
    factors: Factors | None
    error: float


def hold(
    model: Any, names: Sequence[str], mended: Sequence[str], bits: float, rank: int, device: str
) -> dict[str, Factors]:
    """Hold linear layers of a model in 4 or 8 bits each.

    Args:
        model: in float32, on a CPU.
        names: of the layers.
        mended: those of them whose loss is wanted as factors.
        bits: of a number, in the mean over the layers.
        rank: of the factors.
        device: that the layers are for.

    Returns:
        L1 and L2 of the mended ones, by name.

    Raises:
        SettingError: a layer is of another kind, or the budget is too small.
    """
    import torch

    layers = {name: model.get_submodule(name) for name in names}
    if odd := [name for name, layer in layers.items() if type(layer) is not torch.nn.Linear]:
        raise SettingError(KEY, f"{odd[0]} is {type(layers[odd[0]]).__name__}, no plain linear layer: write 4bit")
    ranks = {name: rank if name in mended else 0 for name in names}
    weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
    errors = np.array([[_error(weights[name], c, ranks[name]) for c in CHOICES] for name in names])
    sizes = np.array([weights[name].numel() for name in names])
    costs = np.array([[cost(tuple(weights[name].shape), c) for c in CHOICES] for name in names])
    chosen = choose(errors**2, costs, bits * float(sizes.sum()))
    made: dict[str, Factors] = {}
    for name, at in zip(names, chosen, strict=True):
        part = split(weights[name], CHOICES[at], ranks[name])
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, held(layers[name], part.rest, CHOICES[at], device))
        if part.factors is not None:
            made[name] = part.factors
    return made


def _error(weight: "torch.Tensor", bits: int, rank: int) -> float:
    return split(weight, bits, rank).error if fits(weight, bits) else np.inf


def fits(weight: "torch.Tensor", bits: int) -> bool:
    """Whether a weight can be held so: in 4 bits it is a whole number of blocks."""
    return bits == 8 or weight.numel() % _BLOCK == 0


def cost(shape: tuple[int, int], bits: int) -> float:
    """Bits that a weight takes, with its scales: of blocks, of these in 8 bits, or of rows."""
    out, into = shape
    if bits == 8:
        return 8.0 * out * into + 32.0 * out
    return out * into * (4 + 8 / _BLOCK + 32 / (_BLOCK * _GROUP))


def choose(errors: Matrix, costs: Matrix, budget: float) -> NDArray[np.int64]:
    """The choice of each layer: the least errors in all that the budget pays for.

    Args:
        errors: squared, (layers x choices); infinite where a layer has no such choice.
        costs: bits, likewise.
        budget: bits of all layers.

    Raises:
        SettingError: it pays for no choice.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, choices = errors.shape
    able = np.isfinite(errors)
    one = np.kron(np.eye(count), np.ones(choices))
    found = milp(
        np.where(able, errors, 0).ravel() / max(errors[able].max(), np.finfo(float).tiny),
        integrality=np.ones(errors.size),
        bounds=Bounds(0, able.ravel().astype(float)),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs.ravel()[None] / budget, -np.inf, 1)],
    )
    if found.x is None:
        raise SettingError(f"{KEY}.bits", "the layers do not fit into so few bits: raise it")
    return np.asarray(found.x.reshape(count, choices).argmax(1))


def split(weight: "torch.Tensor", bits: int, rank: int) -> Split:
    """A weight as what is rounded and what factors hold.

    Args:
        weight: (out, in).
        bits: of Q.
        rank: of the factors; 0: there are none.
    """
    import torch

    whole, best, q = weight.double(), None, torch.zeros_like(weight)
    for _ in range(_TURNS if rank else 1):
        factors = top((whole - q.double()).numpy(), rank) if rank else None
        rest = whole if factors is None else whole - torch.from_numpy(np.float64(factors[0]) @ factors[1])
        q = round_to(rest.float(), bits)
        error = float((rest - q.double()).norm())
        if best is not None and error >= best.error:
            break
        best = Split(rest.float(), factors, error)
    assert best is not None
    return best


def top(matrix: Matrix, rank: int) -> Factors:
    """Nearly the best of a rank, by passes over a subspace: (out x r), and (r x in) with rows of one length.

    The strongest direction comes first. It is the same wherever it is made, to one in a million.
    """
    wide = min(rank + _BESIDE, *matrix.shape)
    begun = seeding.generator(0, "subspace").standard_normal((matrix.shape[1], wide))
    with on_one_thread():
        for _ in range(_PASSES):
            begun = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ begun)[0])[0]
        u, values, vt = np.linalg.svd(matrix @ begun, full_matrices=False)
    right = vt[:rank] @ begun.T
    sign = np.sign(np.take_along_axis(right, np.abs(right).argmax(1, keepdims=True), 1))
    left = u[:, :rank] * values[:rank] / _LENGTH
    return rounded(left * sign.T), rounded(right * sign * _LENGTH)


def round_to(weight: "torch.Tensor", bits: int) -> "torch.Tensor":
    """What a weight is once it was held in few bits, (out, in) in float32."""
    return quantized.weight(taken(held(None, weight, bits, "cpu")))


def taken(layer: Any) -> Any:
    """A layer that computes by the weight that it holds."""
    (found,) = quantized.hold(layer)
    return found


def held(layer: Any, weight: "torch.Tensor", bits: int, device: str) -> Any:
    """A layer of bitsandbytes that holds a weight, with the bias of another.

    Args:
        layer: whose bias it has; None: it has none.
        weight: (out, in) in float32.
        bits: 4 or 8.
        device: where it is to be.
    """
    import bitsandbytes as bnb
    import torch

    out, into = weight.shape
    if bits == 8:
        made = bnb.nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(into, out, bias=False, quant_type="nf4", compress_statistics=True)
        made.weight = bnb.nn.Params4bit(
            weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
        )
    if layer is not None and layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made.to(device)


def begun(factors: Mapping[str, Factors]) -> Saved:
    """An adapter that begins with factors."""
    sides = {f"{PREFIX}{name}.lora_{'BA'[i]}.weight": pair[i] for name, pair in factors.items() for i in (0, 1)}
    return Saved(sides, 1.0)


def change(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """What an adapter for the whole weights has less than one for the rounded ones."""
    return {name: (-left, right) for name, (left, right) in factors.items()}
