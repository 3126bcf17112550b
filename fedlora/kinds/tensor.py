"""TeRA (Gu et al., 2025, https://arxiv.org/abs/2509.03234): a vector for each layer in one random tensor network.

The change of a weight is seen as a tensor with two modes for the outputs, out = o1 o2, and two for the inputs,
in = i1 i2, each side split as evenly as it can be. A Tucker network with a rank of r in each mode writes it:

    W' = W + alpha / r * T x_1 (P diag(d)) x_2 Q x_3 X x_4 Y,   d (r) trains, zero at first

P (o1 x r), Q (o2 x r), X (i1 x r), Y (i2 x r) and the core T (r x r x r x r) come from the seed. As in the paper
all layers of one shape share them, and each has a vector of its own: the rank of the change, up to r^2, has
nothing to do with how many numbers train. The paper trains a diagonal in each mode. Their product is not linear,
so here that of the first mode trains alone, and averaging is exact:

    sum_k p_k T(d_k) = T(sum_k p_k d_k)

With T an orthogonal matrix (r^2 x r^2) the change is `s B diag(d_p of each pair) A`. B (out x r^2) is P and Q by
pairs (p, q), and A (r^2 x in) is T times X and Y by pairs; these two are what a layer holds. Pairs stand in the
order of the larger of the two, so that the first k^2 of them are those of rank k. Noise on d reaches the weight as
`s r`, as with `core`, which has r^2 numbers.

The equations are made of the paper's abstract. Its first values and its number of modes may be others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Slot, Tensor
from fedlora.factors import Matrix
from fedlora.kinds import frames
from fedlora.kinds.contract import Facts, Part, Weights


@dataclass(frozen=True)
class TeRA(frames.Diagonal):
    """A weight's change is a seeded tensor network that layers of a shape share, scaled by a vector of its own."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("seeded", False),
        "B": Part("seeded", False),
        "values": Part("zero", True),
    }
    facts: ClassVar[Facts] = Facts("d (r)", "s r")

    @property
    def width(self) -> int:
        """Pairs of the two modes of a side."""
        return self.r**2

    def between(self) -> Any:
        """One factor for all pairs with the same first place."""
        from fedlora.kinds.modules import Scales

        return Scales(self.r, pairs(self.r)[0])

    def dense(self, between: Any) -> Any:
        """`diag(d of each pair)`."""
        return np.diag(between[pairs(len(between))[0]])

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """A and B lose pairs, d numbers."""
        return super().shape(slot, rank if slot.role == self.role_between else rank**2)

    def most(self, out: int, into: int) -> int | None:
        """The smallest mode."""
        return min(split(out)[0], split(into)[0])

    def stream(self, slot: Slot) -> str:
        """That of all layers of a shape."""
        return f"{slot.role} {slot.shape}" if slot.role in ("A", "B") else super().stream(slot)

    def where(self) -> str:
        """In the network of this seed."""
        return "in the tensor network that this seed draws"

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Frames for A and B, zero for d."""
        return self.frame(slot, rng, weights) if slot.role in ("A", "B") else super().initial(slot, rng, weights)

    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """P and Q by pairs; X and Y by pairs, turned by T."""
        sizes = split(slot.shape[0] if slot.role == "B" else slot.shape[1])
        one, other = (frames.drawn(size, self.r, rng).astype(np.float64) for size in sizes)
        i, j = pairs(self.r)
        made = (one[:, None, i] * other[None, :, j]).reshape(-1, self.width)  # (o1 o2, r^2)
        if slot.role == "A":
            made = frames.drawn(self.width, self.width, rng).astype(np.float64) @ made.T
        return frames.rounded(made)

    def gain(self, out: int, into: int) -> float | None:
        """`s r`: a number of d moves r pairs of vectors of length 1."""
        return self.scaling() * self.r

    def fit(self, b: Matrix, a: Matrix, left: Matrix, right: Matrix) -> Matrix:
        """The mean over the pairs that a number moves, as frames are orthonormal."""
        found: Matrix = np.bincount(pairs(self.r)[0], ((b.T @ left) * (a @ right.T)).sum(1)) / self.r
        return found


def split(size: int) -> tuple[int, int]:
    """The two factors of a size that are closest to its root, the smaller first."""
    first = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return first, size // first


def pairs(rank: int) -> NDArray[np.int64]:
    """All (p, q) below a rank, (2, rank^2), by the larger of the two: the first k^2 are those below k."""
    grid = np.indices((rank, rank)).reshape(2, -1)
    return grid[:, np.argsort(grid.max(0), kind="stable")]
