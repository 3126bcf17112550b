"""Fewer bytes for the same tensors: numbers of 16, 8 or 4 bits by stochastic rounding, the largest few, or some.

Rounding goes up or down by chance, so that what arrives is what was sent on average; see `Codec` for how far off
one number can be. The largest few are sent exactly and the rest not at all: that is biased, and the one who sends
keeps what was left out and adds it to what it sends next (error feedback; Karimireddy et al., 2019,
https://arxiv.org/abs/1901.09847). A mask picks numbers by chance and sends them times one over their share, which
is right on average (Konecny et al., 2016, https://arxiv.org/abs/1610.05492); a seed says where they were. Sizes
follow from the shape alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora.seeding import generator

BLOCK = 128  # numbers that share a scale
LEAST_SHARE = 1e-3  # of a tensor's numbers that may be kept: few bytes must not ask for much memory
Kind = Literal["fp16", "bf16", "int8", "int4", "top_k", "mask"]
Floats = NDArray[np.float32]

_SEED = 8  # bytes of a mask's seed
_LEVELS = {"int8": 127, "int4": 7}  # on each side of zero
_HALF = np.float32(np.finfo(np.float16).max)
_BRAIN = np.uint32(0x7F7F0000).view(np.float32)  # the largest bfloat16
_SMALL = np.float32(1e-36)  # a scale below it is none


@dataclass(frozen=True)
class Codec:
    """A way to write a tensor.

    With m the largest magnitude in a number's block of 128, a number x arrives within

    - fp16: `2^-10 |x| + 2^-24`, beyond +-65504 as that; bf16: `2^-7 |x|`
    - int8: `m / 127`; int4: `m / 7`; blocks below 1e-34 as zeros
    - top_k: itself or 0, and `||x - x'||^2 <= (1 - share) ||x||^2` over the tensor
    - mask: `n / k x` or 0, of a tensor of n numbers of which k are kept, all sets of k alike. Its mean is x, and
      `E ||x - x'||^2 = (n / k - 1) ||x||^2`.

    Attributes:
        kind: which.
        share: of the numbers that top_k or mask keeps.
    """

    kind: Kind
    share: float = 1.0

    def encode(self, tensor: Floats, rng: np.random.Generator) -> bytes:
        """The tensor as bytes; the rounding is drawn from `rng`."""
        flat = np.ascontiguousarray(tensor, np.float32).ravel()
        match self.kind:
            case "fp16":
                return _half(flat, rng).tobytes()
            case "bf16":
                bits = np.clip(flat, -_BRAIN, _BRAIN).view(np.uint32)
                up = rng.integers(0, 2**16, flat.size, np.uint32)
                size = np.minimum((bits & 0x7FFFFFFF) + up, 0x7F7FFFFF)
                return bytes(((size | bits & 0x80000000) >> 16).astype("<u2").tobytes())
            case "int8" | "int4":
                scale, whole = _whole(flat, _LEVELS[self.kind], rng)
                if self.kind == "int4":
                    half = np.append(whole, np.zeros(whole.size % 2, np.int8)).astype(np.uint8) & 15
                    whole = (half[::2] | half[1::2] << 4).view(np.int8)
                return scale.astype("<f4").tobytes() + whole.tobytes()
            case "top_k":
                kept = math.ceil(self.share * flat.size)
                order = np.argsort(-np.abs(flat), kind="stable")[:kept]
                order.sort()
                return order.astype("<u4").tobytes() + flat[order].astype("<f4").tobytes()
            case "mask":
                kept, seed = math.ceil(self.share * flat.size), int(rng.integers(2**63))
                return (
                    seed.to_bytes(_SEED, "little") + flat[_places(seed, flat.size, kept)].astype("<f4").tobytes()
                )


def decode(kind: str, data: bytes, shape: Sequence[int]) -> Floats:
    """The tensor that `Codec.encode` wrote.

    Raises:
        ValueError: it did not write that.
    """
    size = math.prod(shape)
    if kind == "fp16":
        flat = _read(data, "<f2", size).astype(np.float32)
    elif kind == "bf16":
        flat = (_read(data, "<u2", size).astype(np.uint32) << 16).view(np.float32)
    elif kind in _LEVELS:
        blocks, packed = -(-size // BLOCK), size if kind == "int8" else -(-size // 2)
        whole = _read(data[4 * blocks :], "i1", packed)
        if kind == "int4":
            both = np.stack([whole << 4, whole], axis=1).ravel()[:size]
            whole = both >> 4  # of a signed number: its sign comes along
        scale = _read(data[: 4 * blocks], "<f4", blocks)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as any update is
            flat = np.repeat(scale, BLOCK)[:size] * whole.astype(np.float32)
    elif kind == "top_k":
        kept = len(data) // 8
        if kept < LEAST_SHARE * size or kept > size:
            raise ValueError(f"{kept} of {size} numbers")
        order, values = _read(data[: 4 * kept], "<u4", kept), _read(data[4 * kept :], "<f4", kept)
        if kept and (order[-1] >= size or (np.diff(order.astype(np.int64)) <= 0).any()):
            raise ValueError("places that are not in order")
        flat = np.zeros(size, np.float32)
        flat[order] = values
    elif kind == "mask":
        kept = (len(data) - _SEED) // 4
        if kept < LEAST_SHARE * size or kept > size:
            raise ValueError(f"{kept} of {size} numbers")
        values = _read(data[_SEED:], "<f4", kept)
        flat = np.zeros(size, np.float32)
        most = np.finfo(np.float32).max * np.float64(kept / max(size, 1))
        places = _places(int.from_bytes(data[:_SEED], "little"), size, kept)
        flat[places] = np.clip(values, -most, most) * np.float32(size / max(kept, 1))
    else:
        raise ValueError(f"{kind:.20} is no way to write numbers")
    return flat.reshape(tuple(shape))


def _places(seed: int, size: int, kept: int) -> NDArray[np.int64]:
    """The numbers of a tensor that a mask keeps, ascending."""
    return np.sort(generator(seed, "mask").choice(size, size=kept, replace=False))


def _read(data: bytes, dtype: str, count: int) -> NDArray[Any]:
    if len(data) != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{len(data)} bytes for {count} numbers")
    return np.frombuffer(data, dtype)


def _half(flat: Floats, rng: np.random.Generator) -> NDArray[np.float16]:
    """The float16 below or above, each with the probability that makes the mean right."""
    flat = np.clip(flat, -_HALF, _HALF)
    near = flat.astype(np.float16)
    beyond = np.nextafter(near, np.where(flat >= near, _HALF, -_HALF).astype(np.float16))
    gap = beyond.astype(np.float32) - near
    chance = np.divide(flat - near, gap, out=np.zeros_like(flat), where=gap != 0)
    return np.where(rng.random(flat.size, np.float32) < chance, beyond, near).astype("<f2")


def _whole(flat: Floats, levels: int, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int8]]:
    """The scale of each block, and whole multiples of it from `-levels` to `levels`."""
    blocks = np.append(flat, np.zeros(-flat.size % BLOCK, np.float32)).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(levels)  # (blocks, 1)
    scale[scale < _SMALL] = 0.0
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    whole = np.floor(ratio + rng.random(blocks.shape, np.float32)).clip(-levels, levels)
    return scale[:, 0], whole.ravel()[: flat.size].astype(np.int8)
