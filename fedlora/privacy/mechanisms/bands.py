"""Banded matrix factorisation: noise of which each step takes back a part of the steps before.

With `Z_t` independent normal vectors and C a lower triangular Toeplitz matrix of b bands c_0 .. c_{b-1}, step t
of a client, counted over its whole run from 0, has instead of DP-SGD's noise, `sigma` times the clipping
bound times `Z_t`, as much of

    x = C^-1 Z,   x_t = (Z_t - sum_{1 <= j < b} c_j x_{t-j}) / c_0

A column of C has norm 1; the last ones are shorter. The weights hold the sums A of all steps so far, and so the
noise `A C^-1 Z`, which grows slower than `A Z`. For steps of plain SGD, that is: others may follow, at the same
epsilon. The c are those that leave the least of it, as the root mean square over the steps of a run. The search
begins at the root of the prefix sums, c_0 = 1, c_j = c_{j-1} (2j - 1) / (2j) (Fichtenberger, Henzinger and
Upadhyay, 2023, https://arxiv.org/abs/2202.11205), cut off after b (bands are fitted so by McKenna, 2024,
https://arxiv.org/abs/2405.15913). Any c of norm 1 keep the promise.

Row i of a client is in group i mod b, and step t takes each row of group t mod b with probability `b B / n`
(cyclic Poisson sampling). **T steps cost what ceil(T / b) steps of the Poisson-subsampled Gaussian at that rate
and sigma do** (Choquette-Choo et al., 2023, https://arxiv.org/abs/2306.08153; `amplified_bandmf_event` of
jax_privacy is the same event). Why, and what else that takes:

- To release `g + x` is to release `C g + Z`: everybody knows C. The steps in which a row may take part are b
  apart, and their columns of C have no entry in common. So each is a Gaussian of its own on a vector no longer
  than the bound, and the rest of these entries follows from what was released before and from other rows.
- T steps in a row are at most ceil(T / b) turns of each group. A step's number is how many steps the client *paid*
  for before on equal terms. So it never goes back, whatever was lost or is repeated, and the steps that were taken
  are among the first T that were paid for. One that was skipped is a release that nobody got.
- A new block under another key leaves C banded (block diagonal), and the groups take turns as before:
  it costs nothing.
- Steps on other terms, under another C, or of another count of numbers, have a Z of their own, with a past that
  never was: what is released is a part of what that mechanism would release.

No noise is on disk. What a process has not kept it draws again from the key, from the block's first step on.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError
from fedlora.privacy.accounting import MAX_NOISE_MULTIPLIER, Event
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.noise import Stream, fresh_key
from fedlora.seeding import Root, key, stream

Noise = NDArray[np.float64]
Coefficients = tuple[float, ...]

CHOICES = (1, 2, 4, 8, 16, 32)  # that `auto` tries
ROOM = 2**28  # bytes of past noise that a process keeps
FITTED = 2**14  # steps that bands are fitted to at most; those of a longer run differ little
_DIGITS = 4  # of each coefficient over the first: far more than the noise tells, and than machines differ by
_ORDERS = (1.5, *range(2, 17), 20, 24, 32, 48, 64, 96, 128, 256)  # of Renyi DP
_LEAST = 0.01  # noise multiplier: below it epsilon is in the thousands


@lru_cache(maxsize=256)
def coefficients(bands: int, steps: int) -> Coefficients:
    """c_0 .. c_{b-1}, of norm 1, that leave the least noise in the weights of a run of so many steps.

    They are rounded, so that every machine finds the same.
    """
    if bands == 1:
        return (1.0,)
    from scipy.optimize import minimize

    told = {"method": "L-BFGS-B", "jac": True, "bounds": [(0.0, 1.0)] * (bands - 1)}
    found = minimize(_logarithm, root(bands)[1:], args=(min(steps, FITTED),), **told)
    whole = np.array([1.0, *found.x.round(_DIGITS)])
    return tuple(float(c) for c in whole / np.linalg.norm(whole))


def root(bands: int) -> Noise:
    """The first b coefficients of the square root of the prefix sums, (bands,)."""
    js = np.arange(1, bands)
    return np.cumprod([1.0, *((2 * js - 1) / (2 * js))])


def _logarithm(later: Noise, steps: int) -> tuple[float, Noise]:
    """The logarithm of a mean square noise in the weights, at a column of norm 1, and its gradient.

    With p the first column of `A C^-1`, which is that of A convolved with d, that of `C^-1`, the mean square is
    `sum_t (T - t) / T p_t^2`, and p moves by `-(p * d)`, j steps later, with c_j.

    Args:
        later: c_1 .. c_{b-1} at c_0 = 1, (bands - 1,).
        steps: T.
    """
    from scipy.signal import correlate, lfilter

    c = np.array([1.0, *later])
    d = lfilter([1.0], c, np.eye(1, steps)[0])
    p = np.cumsum(d)
    left = (steps - np.arange(steps)) / steps * p
    mean, norm = float(left @ p), float(c @ c)
    pulls = correlate(left, lfilter([1.0], c, p), "full", "fft")[steps - 1 :]  # of each delay, (steps,)
    slope = np.zeros(len(c))
    slope[: min(len(c), steps)] = -2 * pulls[: len(c)] / mean
    return math.log(mean * norm), (slope + 2 * c / norm)[1:]


@lru_cache(maxsize=64)
def inverse(c: Coefficients, steps: int) -> Noise:
    """The first column of C^-1, (steps,): what of `Z_0` each step carries."""
    from scipy.signal import lfilter

    made: Noise = lfilter([1.0], c, np.eye(1, steps)[0])
    return made


def in_weights(c: Coefficients, steps: int) -> Noise:
    """After each step, the deviation of the noise in the weights over that of one step of DP-SGD, (steps,).

    The norms of the rows of `A C^-1`; of one band sqrt(t + 1).
    """
    rows: Noise = np.sqrt(np.cumsum(np.cumsum(inverse(c, steps)) ** 2))
    return rows


def error(bands: int, steps: int) -> float:
    """The root mean square of `in_weights` over the steps of a run."""
    return float(np.sqrt(np.mean(in_weights(coefficients(bands, steps), steps) ** 2)))


def choose(
    target: float, delta: float, rate: float, steps: int, noise: Callable[[float, int], float], spare: int = 0
) -> int:
    """The bands with the least noise in the weights at an epsilon, of `CHOICES`; the fewest of equals.

    Renyi DP is quick, and shows about where they are. One band is always among those that are compared.

    Args:
        target: epsilon.
        delta: of the target.
        rate: B / n, with which a step of DP-SGD takes an example.
        steps: of the run.
        noise: finds the noise multiplier for the target, of a sampling rate and a number of steps.
        spare: turns beyond those of the steps that epsilon leaves room for.
    """
    fit = [b for b in CHOICES if b == 1 or (b <= steps and b * rate <= 1)]

    def left(b: int, found: Callable[[float, int], float]) -> float:
        return found(min(b * rate, 1.0), -(-steps // b) + spare) * error(b, steps)

    about = min(fit, key=lambda b: left(b, lambda *told: _roughly(target, delta, *told)))
    exact = {b: left(b, noise) for b in fit if b == 1 or 1 / 2 <= b / about <= 2}
    return min(exact, key=lambda b: exact[b])


@lru_cache(maxsize=4096)
def _roughly(target: float, delta: float, rate: float, steps: int) -> float:
    """The noise multiplier at which Poisson sampling costs an epsilon, by Renyi DP at a few orders, to 0.1 %."""
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        rdp = compute_rdp(q=rate, noise_multiplier=math.exp(log_noise), steps=steps, orders=_ORDERS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order is", UserWarning)
            spent = float(get_privacy_spent(orders=_ORDERS, rdp=rdp, delta=delta)[0])
        return math.log(max(spent, 1e-12) / target)

    low, high = math.log(0.3), math.log(2.0)
    while excess(high) > 0 and high < math.log(MAX_NOISE_MULTIPLIER):
        low, high = high, high + math.log(4)
    while excess(low) < 0 and low > math.log(_LEAST):
        low, high = low - math.log(2), low
    if excess(low) * excess(high) > 0:  # beyond what anybody trains with
        return math.exp(high if excess(high) > 0 else low)
    return math.exp(brentq(excess, low, high, xtol=1e-3))


class Past:
    """The noise of clients' steps so far: what is not kept is drawn again from the key, bit for bit.

    Attributes:
        root: a simulation's seed; None: each block of a client has a key of the operating system, in memory alone.
        room: bytes that are kept, least recently used first out.
    """

    def __init__(self, root: Root | None, room: int = ROOM) -> None:
        self.root, self.room = root, room
        self._blocks: dict[int, tuple[bytes, int, int]] = {}  # of each client: key, first step, next step
        self._kept: OrderedDict[tuple[bytes, int], tuple[int, list[Noise]]] = OrderedDict()

    def block(self, client: int, first: int, steps: int) -> tuple[Root, int]:
        """The key of a client's block, and its first step.

        Under a key that is drawn here no step comes twice: where the count goes back, a new block begins.

        Args:
            client: its id.
            first: step of the round, counted over the client's run.
            steps: of the round.
        """
        if self.root is not None:
            return self.root, 0
        key, began, after = self._blocks.get(client, (b"", 0, -1))
        if first < after or not key:
            key, began = fresh_key(), first
        self._blocks[client] = key, began, first + steps
        return key, began

    def noise(
        self, path: Sequence[int | str], root: Root, began: int, c: Coefficients, step: int, size: int
    ) -> Noise:
        """The x of a step, (size,).

        Args:
            path: whose it is, and what for.
            root: key of the block.
            began: first step of the block.
            c: c_0 .. c_{b-1}.
            step: counted over the client's run.
            size: numbers that train.
        """
        mine = key(root, "bands", *path, size)
        after, past = self._kept.pop((mine, began), (began, []))
        if after > step:  # a round that runs again
            after, past = began, []
        for s in range(after, step + 1):
            x = stream(mine, s).standard_normal(size)
            for weight, before in zip(c[1:], reversed(past), strict=False):
                x -= weight * before
            x /= c[0]
            past = [*past[max(len(past) - len(c) + 2, 0) :], x]
        self._kept[mine, began] = step + 1, past
        while sum(x.nbytes for _, kept in self._kept.values() for x in kept) > self.room:
            self._kept.popitem(last=False)
        return past[-1].copy()


class Correlated:
    """The noise of a client's next step at each call, where DP-SGD draws from a `Stream`."""

    def __init__(self, mechanism: "BandedGaussian", past: Past, client: int, first: int) -> None:
        """The noise of a round's steps.

        Args:
            mechanism: of the round.
            past: the noise of the steps before.
            client: whose.
            first: number of the round's first step.
        """
        self._past, self._path, self._c = past, (client, mechanism.purpose), mechanism.coefficients
        self._root, self._began = past.block(client, first, mechanism.steps)
        self._step = first

    @property
    def variance(self) -> float:
        """Of the next step's noise in each number."""
        return float((inverse(self._c, self._step - self._began + 1) ** 2).sum())

    def standard_normal(self, size: int) -> Noise:
        """The x of the next step, (size,)."""
        drawn = self._past.noise(self._path, self._root, self._began, self._c, self._step, size)
        self._step += 1
        return drawn


@dataclass(frozen=True, kw_only=True)
class BandedGaussian(ExampleGaussian):
    """The steps of one client in one round, under noise of `bands` bands.

    Attributes:
        sample_rate: with which a step takes each row of the group whose turn it is.
        coefficients: c_0 .. c_{b-1}, of norm 1 at most.
    """

    coefficients: Coefficients

    def __post_init__(self) -> None:
        if self.adapts:
            raise ContractError("bands hold for a bound that is fixed")
        super().__post_init__()
        if not (self.coefficients and self.coefficients[0] > 0 and math.hypot(*self.coefficients) <= 1 + 1e-9):
            raise ContractError("the coefficients of bands have norm 1 at most, and the first is positive")

    @property
    def bands(self) -> int:
        """b, and how many groups take turns."""
        return len(self.coefficients)

    def event(self, clip_norm: float | None = None) -> Event:
        """All steps."""
        return replace(super().event(clip_norm), bands=self.bands)

    @property
    def most_units(self) -> int:
        """Those of the largest group."""
        return math.ceil(self.total / self.bands)

    def tossed(self, coins: Stream, step: int) -> NDArray[np.bool_]:
        """Whom the coins take, of the group whose turn it is, (total,)."""
        turn = np.arange(self.total) % self.bands == step % self.bands
        drawn: NDArray[np.bool_] = super().tossed(coins, step) & turn
        return drawn

    @property
    def purpose(self) -> str:
        """What the noise is drawn for: steps that are counted together, over as many rows, share it."""
        return f"{super().purpose} {self.sample_rate!r} {self.coefficients} {self.total}"

    def noise(self, draws: Any) -> Correlated:
        """What the optimiser takes the noise of each step from.

        Args:
            draws: a `fedlora.client.Rng`.
        """
        return Correlated(self, draws.past or Past(draws.root), draws.client, draws.first)


def banded(plain: ExampleGaussian, c: Coefficients) -> BandedGaussian:
    """DP-SGD's steps with banded noise: as many examples a step, of the group whose turn it is."""
    told = {f.name: getattr(plain, f.name) for f in fields(plain)}
    rate = plain.sample_rate * len(c)
    return BandedGaussian(**{**told, "sample_rate": 1.0 if 1 < rate < 1 + 1e-9 else rate, "coefficients": c})
