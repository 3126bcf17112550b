"""Frozen frames around what trains: how they are made, so that they are the same everywhere, and kinds of them.

The vectors of an SVD are open to a sign, and where singular values are equal, to any turn among them; those of
singular values of zero are open on both sides apart. `singular` settles all of it. Processors differ in last bits
(MiniLM's first 192 vectors: 4e-13 at most, 3e-15 on average), so frames are rounded to a coarser grid. Should some
differ all the same, the fingerprint of an instruction tells, and a worker with other frames refuses.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.errors import SettingError
from fedlora.factors import Matrix
from fedlora.kinds.contract import Facts, Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.lora import Lora
from fedlora.lazy import Lazy, Thin, Total, norm
from fedlora.seeding import generator

ALIKE = 1e-9
"""Singular values that differ by no more than this share of the largest are equal."""
_GRID = 2.0**20
"""Frames are whole multiples of one over this: coarser than what machines differ by."""
_REST = 1e-3
"""Share of a saved change that a kind may leave out when it begins from it."""


def drawn(rows: int, columns: int, rng: np.random.Generator) -> Tensor:
    """Orthonormal columns (rows x columns), uniform over all, to one in a million."""
    return rounded(_turned(rng.standard_normal((rows, columns))))


def rounded(matrix: Matrix) -> Tensor:
    """A frame to one in a million, so that it is the same wherever it is made."""
    return np.ascontiguousarray(np.round(matrix * _GRID) / _GRID, np.float32)


def largest(energy: Matrix, count: int, whole: float) -> NDArray[np.int64]:
    """The places of the largest of some energies (n,), descending; of those that are alike the first.

    Args:
        energy: (n,).
        count: how many.
        whole: the energy that they are shares of; what differs by `ALIKE` of it is alike.
    """
    grid = ALIKE * whole or 1.0  # finer, rounding would choose
    return np.argsort(-np.round(energy / grid), kind="stable")[:count]


def dense(slot: Slot, weights: Weights) -> Matrix:
    """The weight of a tensor's layer, (out x in).

    Raises:
        SettingError: it holds values that are not finite.
    """
    weight = np.ascontiguousarray(weights(slot.module).detach().double().cpu().numpy())
    if not np.isfinite(weight).all():
        raise SettingError("model.base", f"the weight of {slot.module} holds values that are not finite")
    return weight


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """A decomposition on several threads has other last bits, and vectors that are nearly open turn by them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_weight(slot: Slot, weights: Weights, r: int) -> Tensor:
    """The first r singular vectors of a layer's weight, for its A or its B."""
    u, vt = singular(dense(slot, weights), r)
    return rounded(vt if slot.role == "A" else u)


def singular(weight: Matrix, r: int) -> tuple[Matrix, Matrix]:
    """The first r singular vectors of a weight, the same for whichever SVD finds them.

    The largest number of each right vector is positive. Right vectors of equal values are turned so that their
    products with fixed random vectors form an upper triangle with a positive diagonal, left ones along with them.

    Args:
        weight: (out x in).
        r: at most the smaller side.

    Returns:
        U (out x r) and V^T (r x in).
    """
    import torch

    with on_one_thread():
        found = torch.linalg.svd(torch.from_numpy(weight), full_matrices=False)
    u, s, vt = (part.numpy() for part in found)
    sign = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1, keepdims=True), 1))  # (k, 1)
    u, vt = u * sign.T, vt * sign
    begin, slack = 0, ALIKE * s[0]
    while begin < r:
        if s[begin] <= slack:  # the two sides have nothing to do with each other
            u[:, begin:] = _beside(u[:, :begin], u.shape[1] - begin)
            vt[begin:] = _beside(vt[:begin].T, len(vt) - begin).T
            break
        end = begin + 1
        while end < len(s) and s[end - 1] - s[end] <= slack:
            end += 1
        if end - begin > 1:
            turn = _turned(vt[begin:end] @ _probe(vt.shape[1], end - begin))
            u[:, begin:end], vt[begin:end] = u[:, begin:end] @ turn, turn.T @ vt[begin:end]
        begin = end
    return u[:, :r], vt[:r]


def _turned(matrix: Matrix) -> Matrix:
    """Q of QR, with the diagonal of R positive."""
    q, upper = np.linalg.qr(matrix)
    made: Matrix = q * np.where(np.diag(upper) < 0, -1.0, 1.0)
    return made


def _beside(vectors: Matrix, count: int) -> Matrix:
    """Orthonormal vectors (n x count) beside some (n x k)."""
    probe = _probe(len(vectors), count)
    for _ in range(2):
        probe = _turned(probe - vectors @ (vectors.T @ probe))
    return probe


def _probe(rows: int, columns: int) -> Matrix:
    return generator(0, "probe", rows, columns).standard_normal((rows, columns))


@dataclass(frozen=True)
class Still(Lora):
    """B trains, and A stays as it was made."""

    parts: ClassVar[Mapping[str, Part]] = {"A": Part("seeded", False), "B": Part("zero", True)}

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The B of a change whose rows lie among those of this A, and of no other."""
        taken: Adapter = {}
        made, factors = self.change(layout, drawn), dict(modules_of(layout, "B"))
        for module, name in factors.items():
            a, (left, right) = made[module][1], saved_sides(saved, module, *made[module])
            low = right @ np.linalg.pinv(a.astype(np.float64))  # (m, r)
            made_by = f"made by the A that the seed draws for {plugins.called(type(self))}"
            check_rest(module, Thin(left, right), Thin(left, low @ a), made_by)
            taken[name] = self.spread((saved.scaling / self.scaling() * (left @ low)).astype(np.float32))
        return taken

    def spread(self, b: Tensor) -> Tensor:
        """B as it trains, of one that stands before A."""
        return b


@dataclass(frozen=True)
class Framed(Lora):
    """A matrix R trains between frozen B and A: the change is `s B R A`."""

    ordinary: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    role_between: ClassVar[str] = "core"
    """The role of what is between."""

    @abstractmethod
    def frame(self, slot: Slot, rng: np.random.Generator, weights: Weights) -> Tensor:
        """The first value of A or B."""

    def between(self) -> Any:
        """What stands between A and B, as a module."""
        import torch

        return torch.nn.Linear(self.r, self.r, bias=False)

    def dense(self, between: Any) -> Any:
        """The matrix R that it stands for."""
        return between

    def most(self, out: int, into: int) -> int | None:
        """The smaller side of a layer."""
        return min(out, into)

    def gain(self, out: int, into: int) -> float | None:
        """`s r`: both frames are orthonormal."""
        return self.scaling() * self.r

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with R between A and B."""
        import torch

        wrapped = super().wrap(model, heads, task_type)
        for name, module in list(wrapped.named_modules()):
            if name.endswith(".lora_B"):
                module["default"] = torch.nn.Sequential(self.between(), module["default"])
        return wrapped

    def role(self, name: str) -> str:
        """`A`, `B`, that of what is between, or `head`."""
        role = super().role(name)
        return self.role_between if role == "B" and name.endswith(".0.weight") else role

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """R loses rows and columns."""
        return (rank, rank) if slot.role == self.role_between else super().shape(slot, rank)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B R and A of each layer."""
        names = dict(modules_of(layout, self.role_between))
        plain = super().change(layout, adapter)
        return {module: (b @ self.dense(adapter[names[module]]), a) for module, (b, a) in plain.items()}

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The R of a change that these frames can write, and of no other."""
        names, taken = dict(modules_of(layout, self.role_between)), {}
        for module, (b, a) in super().change(layout, drawn).items():
            left, right = saved_sides(saved, module, b, a)
            found = self.fit(b.astype(np.float64), a.astype(np.float64), left, right)
            check_rest(module, Thin(left, right), Thin(b @ self.dense(found), a), self.where())
            taken[names[module]] = (found * (saved.scaling / self.scaling())).astype(np.float32)
        return taken

    def where(self) -> str:
        """Where all changes lie that it can write."""
        return f"between the first {self.r} singular vectors of this base's weight"

    def fit(self, b: Matrix, a: Matrix, left: Matrix, right: Matrix) -> Matrix:
        """The R for which `B R A` is next to `left right`."""
        return (b.T @ left) @ (right @ a.T)

    def exact(self, moving: Collection[str]) -> bool:
        """Where what is between moves alone, as it does."""
        return not {"A", "B"} & set(moving)

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s ||B||_F ||A||_F`: with orthonormal frames `s r`."""
        if self.role_between not in moving:
            return dict.fromkeys(super().change(layout, adapter), 0.0)
        return {m: self.scaling() * self.lengths(b, a) for m, (b, a) in super().change(layout, adapter).items()}

    def lengths(self, b: Tensor, a: Tensor) -> float:
        """The root of the expected square of `B N A`, with N of variance 1."""
        return float(np.linalg.norm(b) * np.linalg.norm(a))

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Frames for A and B where there are weights, zero for what is between."""
        if slot.role not in ("A", "B") or weights is None:
            return super().initial(slot, rng, weights)
        return self.frame(slot, rng, weights)


@dataclass(frozen=True)
class Diagonal(Framed):
    """r numbers train between frozen B and A: the change is `s B diag(d) A`."""

    parts: ClassVar[Mapping[str, Part]] = {
        "A": Part("derived", False),
        "B": Part("derived", False),
        "values": Part("zero", True),
    }
    facts: ClassVar[Facts] = Facts("d (r)", "s sqrt(r)")
    role_between: ClassVar[str] = "values"

    def between(self) -> Any:
        """One factor for each of the r."""
        from fedlora.kinds.modules import Scales

        return Scales(self.r)

    def dense(self, between: Any) -> Any:
        """`diag(d)`."""
        return np.diag(between)

    def gain(self, out: int, into: int) -> float | None:
        """`s sqrt(r)`: each pair of vectors has length 1."""
        return self.scaling() * math.sqrt(self.r)

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """D loses numbers."""
        return (rank,) if slot.role == self.role_between else super().shape(slot, rank)

    def fit(self, b: Matrix, a: Matrix, left: Matrix, right: Matrix) -> Matrix:
        """By least squares."""
        gram = (b.T @ b) * (a @ a.T)
        found: Matrix = np.linalg.lstsq(gram, ((b.T @ left) * (a @ right.T)).sum(1), rcond=None)[0]
        return found

    def lengths(self, b: Tensor, a: Tensor) -> float:
        """`sqrt(sum_i ||b_i||^2 ||a_i||^2)`."""
        return float(np.linalg.norm(np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)))


def saved_sides(saved: Saved, module: str, b: Tensor, a: Tensor) -> tuple[Matrix, Matrix]:
    """B and A of a saved change in float64.

    Raises:
        SettingError: it is of another base.
    """
    left, right = (side.astype(np.float64) for side in saved.factors(module))
    if left.shape[0] != len(b) or right.shape[1] != a.shape[1]:
        raise SettingError("model.start", f"its factors for {module} are of another base")
    return left, right


def check_rest(module: str, whole: Lazy, found: Lazy, where: str) -> None:
    """Refuse a saved change that is not what was found of it.

    Raises:
        SettingError: with where it should lie.
    """
    if norm(Total([(1.0, whole), (-1.0, found)])) > _REST * norm(whole):
        raise SettingError(
            "model.start",
            f"its change of {module} is not {where}: it is of another base, seed, rank or kind of adapter",
        )
