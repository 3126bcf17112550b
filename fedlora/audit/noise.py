"""Whether an update holds the noise that is stated: measured tensor by tensor, and compared from update to update.

No canary is needed for this, and no guess. What a client sends stands for `e = g + n` in units of the clipping
bound: a sum g of at most as many clipped gradients as a step drew examples, and Gaussian noise n, drawn when g was
settled. Whatever g is, two things hold of the true mechanism:

- **Size.** `||e||^2 / s^2` over d numbers is at least chi-squared with d degrees of freedom, so that too small a
  sum over all updates refutes the stated deviation s. After several local steps g may have taken back noise of
  the steps before; then a bound on that is allowed for, or one step's noise alone is asked for.
- **Freshness.** For an update e that was there before n was drawn, `<e / ||e||, n>` is normal with deviation s,
  so that `|<e, e'>| / ||e||` is at most the bound on ||g'|| and a few s. Noise that is used again, even with
  the other sign or beside noise of its own, makes it some `s sqrt(d)`.

Both are stated with a chance of `LEVEL` that any of all the tests accuses the true mechanism.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.privacy.mechanisms.bands import Coefficients

LEVEL = 1e-6  # the chance that any test accuses the true mechanism
KEPT = 20_000  # numbers of an update that are compared with those of others, at most
TOLD = 3  # updates that hold each other's noise, said by name


@dataclass(frozen=True, eq=False)
class Seen:
    """One update, as the server sees it, in units of the clipping bound.

    Attributes:
        client: whose.
        round: from 1.
        steps: that the client took.
        rate: the sampling rate of a step.
        noise: the stated noise multiplier.
        examples: that the client holds, canaries among them where they all went in.
        names: of the tensors.
        sizes: of the tensors.
        worth: of each tensor how many steps' noise its variance is; nan where nobody can say.
        squares: of each tensor the squared norm.
        kept: some of the numbers of each tensor, at the same places in each update.
        parts: along the client's canaries, of each tensor, (tensors, canaries).
        coefficients: of the bands of the noise; of more than one, groups of examples take turns.
        first: number of its first step, counted over the client's run; of banded noise alone.
        reach: by how much a gradient may be longer in it, where banded noise was taken apart.
    """

    client: int
    round: int
    steps: int
    rate: float
    noise: float
    examples: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    worth: NDArray[np.float64]
    squares: NDArray[np.float64]
    kept: tuple[NDArray[np.float32], ...]
    parts: NDArray[np.float64]
    coefficients: Coefficients = (1.0,)
    first: int = 0
    reach: float = 1.0

    @property
    def bands(self) -> int:
        """Of the noise."""
        return len(self.coefficients)

    def __str__(self) -> str:
        return f"client {self.client} in round {self.round}"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What was found.

    Attributes:
        updates: how many were measured.
        least: the measured deviation over the stated one, in the tensor that speaks most against it; gradients
            add to it.
        where: that tensor.
        short: tensors that hold less noise than is stated.
        repeated: updates that hold one noise, in words, the first few.
        repeats: how many pairs there are.
        visible: whether so many numbers would show it if noise were used again.
        skipped: why nothing was measured; empty if it was.
    """

    updates: int = 0
    least: float = math.nan
    where: str = ""
    short: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    repeats: int = 0
    visible: bool = False
    skipped: str = ""

    @property
    def refuted(self) -> bool:
        """Whether the noise is not what is stated."""
        return bool(self.short or self.repeats)

    def lines(self) -> list[str]:
        """In words."""
        if self.skipped:
            return [f"not measured: {self.skipped}"]
        told = []
        if self.short:
            told.append(f"too little in {', '.join(self.short)}")
        if self.repeats:
            pairs = f"{self.repeats} pair{'s' * (self.repeats > 1)} of updates"
            told.append(f"used again in {pairs}: {'; '.join(self.repeated)}{' ...' * (self.repeats > TOLD)}")
        if not told:
            again = "none of it used again" if self.visible else "too few numbers to say whether any is used again"
            told.append(f"as stated in each tensor of {self.updates} updates, {again}")
        if self.where:
            told.append(f"measured {self.least:.3f} of the stated deviation in {self.where}, the least likely")
        return told


def worth(config: Mapping[str, Any], role: str, steps: int, lr: float) -> float:
    """How many steps' noise, as variance, a tensor of that role holds after a round; nan where nobody can say.

    Args:
        config: of the strategy: `turns` skips a tensor in some steps, `proximal-mu` shrinks what earlier
            steps moved, `low-pass` filters.
        role: of the tensor.
        steps: that the client took.
        lr: its learning rate.
    """
    if config.get("low-pass") and role in ("A", "B"):
        return math.nan
    turns = str(config.get("turns", "")).split(",")
    kept = (1 - lr * float(config.get("proximal-mu", 0.0))) ** 2
    moves = [role not in turns or turns[step % len(turns)] == role for step in range(steps)]
    return float(sum(kept ** (steps - 1 - step) for step, does in enumerate(moves) if does))


def places(sizes: tuple[int, ...], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Of each tensor the numbers that are kept, the same in tensors of one size."""
    total = sum(sizes)
    chosen = {n: np.sort(rng.permutation(n)[: math.ceil(n * min(KEPT / total, 1))]) for n in sorted(set(sizes))}
    return [chosen[n] for n in sizes]


def measure(seen: Sequence[Seen], canaries: int, level: float = LEVEL) -> Noise:
    """Test the size and the freshness of the noise in all updates.

    Args:
        seen: the updates, in the order in which they came.
        canaries: that a client may hold.
        level: the chance that any test accuses the true mechanism; a quarter is for how many examples a step
            draws, a quarter for the sizes, a half for the comparisons.
    """
    if not seen:
        return Noise(skipped="no update came")
    each = level / 8 / len(seen)
    later = [_drawn(s, s.steps - 1, canaries, each) for s in seen]
    least, where, short = _sizes(seen, later, level / 4)
    pairs, visible = _pairs(seen, [_drawn(s, s.steps, canaries, each) for s in seen], level / 2)
    alike = [f"{a} and {b}" if a is not b else f"two tensors of {a}" for a, b in pairs[:TOLD]]
    return Noise(
        updates=len(seen),
        least=least,
        where=where,
        short=short,
        repeated=tuple(dict.fromkeys(alike)),
        repeats=len(pairs),
        visible=visible,
    )


def _drawn(seen: Seen, steps: int, canaries: int, level: float) -> float:
    """What the clipped gradients of some steps sum up to at most: examples may agree, canaries are orthogonal."""
    from scipy.stats import binom

    rate = min(seen.rate, 1.0)
    each = (-(-n // seen.bands) for n in (seen.examples, canaries))  # those whose turn it is
    examples, planted = (float(binom.isf(level / 2, steps * n, rate)) for n in each)
    return seen.reach * (examples + math.sqrt(steps * planted))


def _sizes(seen: Sequence[Seen], later: Sequence[float], level: float) -> tuple[float, str, tuple[str, ...]]:
    """The tensor with the least noise, over what is stated, and those that hold too little.

    Args:
        seen: the updates.
        later: of each what the gradients of all steps but the first sum up to at most.
        level: the chance that any tensor is accused wrongly.
    """
    from scipy.stats import chi2

    found: dict[str, NDArray[np.float64]] = {}  # evidence, degrees of freedom, squared norm, its expectation
    for update, most in zip(seen, later, strict=True):
        for name, size, noisy, square in zip(
            update.names, update.sizes, update.worth, update.squares, strict=True
        ):
            if not noisy > 0:  # it rested, or nobody can say
                continue
            unit = update.noise**2
            every = noisy > 1 and math.sqrt(noisy * size) - most / update.noise > math.sqrt(size)
            asked, back = (noisy, most) if every else (min(noisy, 1.0), 0.0)  # the last step's noise stays whole
            row = ((math.sqrt(square) + back) ** 2 / (asked * unit), size, square, size * noisy * unit)
            found[name] = found.get(name, np.zeros(4)) + row
    if not found:
        return math.nan, "", ()
    chances = {name: float(chi2.cdf(row[0], row[1])) for name, row in found.items()}
    short = tuple(name for name, chance in chances.items() if chance <= level / len(found))
    where = min(chances, key=chances.__getitem__)
    return math.sqrt(found[where][2] / found[where][3]), where, short


def _pairs(seen: Sequence[Seen], drawn: Sequence[float], level: float) -> tuple[list[tuple[Seen, Seen]], bool]:
    """Updates in which one noise is found twice, and whether it would be."""
    from scipy.stats import norm

    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, update in enumerate(seen):
        alike.setdefault((update.names, update.sizes), []).append(i)
    count = sum(_comparisons(len(rows), seen[rows[0]].sizes) for rows in alike.values())
    deviations = float(norm.isf(level / 2 / max(count, 1)))
    pairs, visible = [], True
    for rows in alike.values():
        updates = [seen[i] for i in rows]
        noise = np.array([u.noise * math.sqrt(u.steps) for u in updates])
        most = np.array([drawn[i] for i in rows])
        blocks = [np.stack([u.kept[t] for u in updates]) for t in range(len(updates[0].sizes))]
        numbers = sum(block.shape[1] for block in blocks)
        visible &= bool(np.all(noise * math.sqrt(numbers) > 1.2 * (most + deviations * noise)))
        whole = np.zeros((len(rows), len(rows)))
        for block in (*blocks, None):
            products = whole if block is None else (block @ block.T).astype(np.float64)
            size = numbers if block is None else block.shape[1]
            whole = whole + products if block is not None else whole
            pairs += [(updates[a], updates[b]) for a, b in _found(products, size, noise, most, deviations)]
        for s, t in _twins(updates[0].sizes):
            for i, update in enumerate(updates):
                if update.steps == 1:
                    two = np.stack([blocks[s][i], blocks[t][i]])
                    products = (two @ two.T).astype(np.float64)
                    both = np.array([i, i])
                    if any(_found(products, two.shape[1], noise[both], most[both], deviations)):
                        pairs.append((update, update))
    return list(dict.fromkeys(pairs)), visible


def _found(
    products: NDArray[np.float64],
    size: int,
    noise: NDArray[np.float64],
    most: NDArray[np.float64],
    deviations: float,
) -> Iterator[tuple[int, int]]:
    """Which rows' inner products no gradient and no chance explains; the first of a pair came first."""
    norms = np.sqrt(products.diagonal())
    noise = np.maximum(noise, norms / math.sqrt(size))  # more noise than is stated is no fault
    at_most = norms[:, None] * (most + deviations * noise)
    return zip(*np.nonzero(np.triu(np.abs(products) > at_most, 1)), strict=True)


def _twins(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Tensors of one size, that could hold one noise."""
    return [(s, t) for s, t in combinations(range(len(sizes)), 2) if sizes[s] == sizes[t]]


def _comparisons(updates: int, sizes: tuple[int, ...]) -> int:
    return (len(sizes) + 1) * updates * (updates - 1) // 2 + updates * len(_twins(sizes))
