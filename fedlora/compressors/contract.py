"""The Compressor contract, and that of those which keep directions of a layer's outputs: which, and how many.

There a layer y = W x (W is out x in) becomes two thinner ones, `y = U (U^T W) x`, with U (out x k) the first k
left singular vectors of `W M`. M (in x in) is what a compressor puts its mind to: the identity, or the root of a
statistic of the layer's inputs. Whatever M is, the product of the two is the best of rank k in its norm
(Eckart and Young, 1936, https://doi.org/10.1007/BF02288367):

    U U^T W = argmin { ||(W - Z) M||_F : rank Z <= k },     ||(W - U U^T W) M||_F^2 = sum_{i > k} s_i(W M)^2

Two factors have `k (out + in)` numbers, so k stays below `out in / (out + in)`; a layer that would need more stays
whole. Those that leave a model of the same make, of fewer units or blocks, keep the contract of `pruner.py`. A
compressor is a function of weights and statistics alone: of noised statistics it costs no epsilon.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora.compressors.noised import spread, symmetric
from fedlora.factors import Matrix

Kind = Literal["gram", "row_fisher", "mean"]
"""What a statistic is: second moments of a layer's inputs (in x in); their diagonal, (in,); or the squared
gradient of the weight, summed over outputs, (in,)."""

TEXTS: Literal["texts"] = "texts"
"""What a compressor takes that has public texts passed, and goes by no sum over examples."""


@dataclass(frozen=True)
class Statistic:
    """What is known of the inputs of a layer, up to a factor.

    Attributes:
        kind: of it.
        values: a mean over examples: (in x in) of a gram, else (in,).
        deviation: of the noise in each of `values`; 0: there is none. For a gram it is that on its diagonal, and
            `1 / sqrt(2)` of it beside.
    """

    kind: Kind
    values: Matrix
    deviation: float = 0.0

    def root(self) -> Matrix:
        """M (in x in), or its diagonal (in,): the root of the statistic without what noise made of it."""
        if self.kind != "gram":
            found: Matrix = np.sqrt(spread(self.values, self.deviation))
            return found
        values, turn = symmetric(self.values, self.deviation)
        return turn * np.sqrt(values)


@dataclass(frozen=True)
class Spectrum:
    """A layer as a compressor sees it.

    Attributes:
        shape: of its weight, (out, in).
        left: U, as many orthonormal columns as a rank may have, (out x most).
        values: singular values of `W M`, descending, (m,).
    """

    shape: tuple[int, int]
    left: NDArray[np.float32]
    values: Matrix

    @property
    def most(self) -> int:
        """The highest rank at which two factors have fewer numbers than the weight; 0 where there is none."""
        out, into = self.shape
        return min((out * into - 1) // (out + into), len(self.values))

    def numbers(self, rank: int | None) -> int:
        """Numbers in two factors of a rank; of the whole weight where that is None."""
        out, into = self.shape
        return out * into if rank is None else rank * (out + into)


@dataclass(frozen=True)
class Cut:
    """What became of a layer.

    Attributes:
        shape: of its weight, (out, in).
        left: (out x k); None where it stays whole.
        right: (k x in); None likewise.
        error: `||W - left right||_F / ||W||_F`.
        weighted: the same of `W M`: the part of its length that is lost.
    """

    shape: tuple[int, int]
    left: NDArray[np.float32] | None = None
    right: NDArray[np.float32] | None = None
    error: float = 0.0
    weighted: float = 0.0

    @property
    def rank(self) -> int | None:
        """k; None where it stays whole."""
        return None if self.right is None else len(self.right)

    @property
    def numbers(self) -> int:
        """Numbers that it has now."""
        out, into = self.shape
        return out * into if self.rank is None else self.rank * (out + into)


@dataclass(kw_only=True)
class Compressor(ABC):
    """A way to make a base smaller.

    Attributes:
        keep: share of what it cuts that is kept, in (0, 1]; at 1 all stays as it is.
    """

    takes: ClassVar[tuple[Kind | Literal["texts"], ...]] = ()
    """The statistics that it can go by; none: the weights alone."""

    needs: ClassVar[bool] = False
    """Whether it cannot go without one."""

    layered: ClassVar[bool] = True
    """Whether it goes by linear layers, of which some can be named or left out."""

    factors: ClassVar[bool]
    """Whether it leaves frozen weights as products of factors, to which nothing can be added."""

    keep: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep should be above 0 and at most 1, not {self.keep}")

    @abstractmethod
    def goes_by(self, model: Any, layers: Sequence[str]) -> list[str]:
        """The layers whose weights or statistics it looks at.

        Args:
            model: of transformers.
            layers: names of those that may be cut.

        Raises:
            SettingError: the model is not made so that it can be cut in this way.
        """


@dataclass(kw_only=True)
class LowRank(Compressor):
    """A way to cut linear layers to low rank; `keep` is of their numbers."""

    factors: ClassVar[bool] = True

    def goes_by(self, model: Any, layers: Sequence[str]) -> list[str]:
        """All that may be cut."""
        return [*layers]

    def spectrum(self, weight: NDArray[np.floating], statistic: Statistic | None) -> Spectrum:
        """A layer as this compressor sees it.

        Args:
            weight: (out x in).
            statistic: of its inputs, where the compressor goes by one.
        """
        wide = weight.astype(np.float64)
        if statistic is not None:
            root = statistic.root()
            wide = wide * root if root.ndim == 1 else wide @ root
        left, values, _ = np.linalg.svd(wide, full_matrices=False)
        made = Spectrum((weight.shape[0], weight.shape[1]), np.zeros((len(left), 0), np.float32), values)
        return replace(made, left=left[:, : made.most].astype(np.float32))

    @abstractmethod
    def ranks(self, layers: Mapping[str, Spectrum]) -> dict[str, int | None]:
        """The rank of each layer, None where it stays whole; together at most `keep` of their numbers.

        Args:
            layers: by name.
        """


def compress(
    compressor: LowRank,
    weights: Mapping[str, NDArray[np.floating]],
    statistics: Mapping[str, Statistic],
) -> dict[str, Cut]:
    """What becomes of each layer.

    Args:
        compressor: that decides.
        weights: of the layers, (out x in) each, by name.
        statistics: of some or all of them. A layer without one stays whole where the compressor needs it.

    Returns:
        The cuts, by name, in the order of `weights`.
    """
    asked = [n for n in weights if compressor.keep < 1 and (n in statistics or not compressor.needs)]
    seen = {name: compressor.spectrum(weights[name], statistics.get(name)) for name in asked}
    ranks = compressor.ranks(seen)
    made = {}
    for name, weight in weights.items():
        shape = (weight.shape[0], weight.shape[1])
        if (rank := ranks.get(name)) is None:
            made[name] = Cut(shape)
            continue
        wide, left = weight.astype(np.float64), np.ascontiguousarray(seen[name].left[:, :rank])
        right = (left.T.astype(np.float64) @ wide).astype(np.float32)
        lost = np.linalg.norm(wide - left.astype(np.float64) @ right)
        energy = seen[name].values ** 2
        made[name] = Cut(
            shape,
            left,
            right,
            error=float(lost / max(np.linalg.norm(wide), np.finfo(float).tiny)),
            weighted=float(np.sqrt(energy[rank:].sum() / max(energy.sum(), np.finfo(float).tiny))),
        )
    return made


def alike(layers: Mapping[str, Spectrum], keep: float) -> dict[str, int | None]:
    """The same share of each layer's numbers; a layer too small for a rank of 1 stays whole."""
    ranks = {name: min(int(keep * s.numbers(None) / sum(s.shape)), s.most) for name, s in layers.items()}
    return {name: rank or None for name, rank in ranks.items()}


def under_budget(
    layers: Mapping[str, Spectrum], keep: float, offers: Mapping[str, NDArray[np.floating]]
) -> dict[str, int | None]:
    """As many directions as a share of all numbers pays for, the ones that are worth most first.

    Args:
        layers: by name.
        keep: the share.
        offers: what each direction of a layer is worth, descending, (m,); compared over layers.

    Returns:
        The rank of each layer, at least 1. One whose directions cost more than its whole weight stays whole, and
        costs no more than that.
    """
    budget = keep * sum(s.numbers(None) for s in layers.values())

    def taken(least: float) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name, s in layers.items():
            rank = max(int((offers[name] >= least).sum()), 1)
            found[name] = rank if rank <= s.most else None
        return found

    levels = np.unique(np.concatenate([*offers.values(), [0.0]]))  # ascending: the lowest takes most
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        cost = sum(layers[name].numbers(rank) for name, rank in taken(float(levels[middle])).items())
        low, high = (low, middle) if cost <= budget else (middle + 1, high)
    return taken(float(levels[low]))


def load(use: str, options: Mapping[str, object]) -> Compressor:
    """The compressor that a scenario or a command names, with its options.

    Raises:
        SettingError: nothing importable has that name, or an option is wrong.
    """
    made: Compressor = plugins.build(plugins.find_of("compressors", use, Compressor), options, "compress")
    return made
