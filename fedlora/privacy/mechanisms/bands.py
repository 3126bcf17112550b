"""Banded matrix factorisation: noise of which each step takes back a part of the steps before.

With `Z_t` independent normal vectors and C a lower triangular Toeplitz matrix of b bands c_0 .. c_{b-1}, step t
of a client, counted over its whole run from 0, has instead of DP-SGD's noise, `sigma` times the clipping
bound times `Z_t`, as much of

    x = C^-1 Z,   x_t = (Z_t - sum_{1 <= j < b} c_j x_{t-j}) / c_0

The bands are those of the root of the prefix sums, c_0 = 1, c_j = c_{j-1} (2j - 1) / (2j) (Fichtenberger,
Henzinger and Upadhyay, 2023, https://arxiv.org/abs/2202.11205), cut off after b and scaled so that a column has
norm 1; the last columns are shorter. The weights hold the sums A of all steps so far, and so the noise
`A C^-1 Z`, which grows slower than `A Z`. For steps of plain SGD, that is: others may follow, at the same epsilon.

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
- Steps on other terms, or of another count of numbers, have a Z of their own, with a past that never was: what is
  released is a part of what that mechanism would release.

No noise is on disk. What a process has not kept it draws again from the key, from the block's first step on.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError
from fedlora.privacy.accounting import MAX_NOISE_MULTIPLIER, Event
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.noise import Stream, fresh_key
from fedlora.seeding import Root, key, stream

Noise = NDArray[np.float64]

CHOICES = (1, 2, 4, 8, 16, 32)  # that `auto` tries
ROOM = 2**28  # bytes of past noise that a process keeps
_ORDERS = (1.5, *range(2, 17), 20, 24, 32, 48, 64, 96, 128, 256)  # of Renyi DP
_LEAST = 0.01  # noise multiplier: below it epsilon is in the thousands


@cache
def coefficients(bands: int) -> Noise:
    """c_0 .. c_{b-1}, of norm 1, (bands,)."""
    root = np.array([math.prod((2 * i - 1) / (2 * i) for i in range(1, j + 1)) for j in range(bands)])
    scaled: Noise = root / math.sqrt(float(root @ root))
    scaled.flags.writeable = False
    return scaled


@lru_cache(maxsize=64)
def inverse(bands: int, steps: int) -> Noise:
    """The first column of C^-1, (steps,): what of `Z_0` each step carries."""
    from scipy.signal import lfilter

    made: Noise = lfilter([1.0], coefficients(bands), np.eye(1, steps)[0])
    return made


def in_weights(bands: int, steps: int) -> Noise:
    """After each step, the deviation of the noise in the weights over that of one step of DP-SGD, (steps,).

    The norms of the rows of `A C^-1`; of one band sqrt(t + 1).
    """
    rows: Noise = np.sqrt(np.cumsum(np.cumsum(inverse(bands, steps)) ** 2))
    return rows


def error(bands: int, steps: int) -> float:
    """The root mean square of `in_weights` over the steps of a run."""
    return float(np.sqrt(np.mean(in_weights(bands, steps) ** 2)))


def choose(target: float, delta: float, rate: float, steps: int, noise: Callable[[float, int], float]) -> int:
    """The bands with the least noise in the weights at an epsilon, of `CHOICES`; the fewest of equals.

    Renyi DP is quick, and shows about where they are. One band is always among those that are compared.

    Args:
        target: epsilon.
        delta: of the target.
        rate: B / n, with which a step of DP-SGD takes an example.
        steps: of the run.
        noise: finds the noise multiplier for the target, of a sampling rate and a number of steps.
    """
    fit = [b for b in CHOICES if b == 1 or (b <= steps and b * rate <= 1)]

    def left(b: int, found: Callable[[float, int], float]) -> float:
        return found(min(b * rate, 1.0), -(-steps // b)) * error(b, steps)

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

    def noise(self, path: Sequence[int | str], root: Root, began: int, bands: int, step: int, size: int) -> Noise:
        """The x of a step, (size,).

        Args:
            path: whose it is, and what for.
            root: key of the block.
            began: first step of the block.
            bands: b.
            step: counted over the client's run.
            size: numbers that train.
        """
        mine = key(root, "bands", *path, size)
        after, past = self._kept.pop((mine, began), (began, []))
        if after > step:  # a round that runs again
            after, past = began, []
        c = coefficients(bands)
        for s in range(after, step + 1):
            x = stream(mine, s).standard_normal(size)
            for weight, before in zip(c[1:], reversed(past), strict=False):
                x -= weight * before
            x /= c[0]
            past = [*past[max(len(past) - bands + 2, 0) :], x]
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
        self._past, self._path, self._bands = past, (client, mechanism.purpose), mechanism.bands
        self._root, self._began = past.block(client, first, mechanism.steps)
        self._step = first

    @property
    def variance(self) -> float:
        """Of the next step's noise in each number."""
        return float((inverse(self._bands, self._step - self._began + 1) ** 2).sum())

    def standard_normal(self, size: int) -> Noise:
        """The x of the next step, (size,)."""
        drawn = self._past.noise(self._path, self._root, self._began, self._bands, self._step, size)
        self._step += 1
        return drawn


@dataclass(frozen=True, kw_only=True)
class BandedGaussian(ExampleGaussian):
    """The steps of one client in one round, under noise of `bands` bands.

    Attributes:
        sample_rate: with which a step takes each row of the group whose turn it is.
        bands: b, and how many groups take turns.
    """

    bands: int

    def __post_init__(self) -> None:
        if self.adapts:
            raise ContractError("bands hold for a bound that is fixed")

    def event(self, clip_norm: float | None = None) -> Event:
        """All steps."""
        return replace(super().event(clip_norm), bands=self.bands)

    def taken(self, coins: Stream, step: int = 0) -> NDArray[np.bool_]:
        """Whom a step takes, of the group whose turn it is, (total,)."""
        turn = np.arange(self.total) % self.bands == step % self.bands
        drawn: NDArray[np.bool_] = super().taken(coins) & turn
        return drawn

    @property
    def purpose(self) -> str:
        """What the noise is drawn for: steps that are counted together, over as many rows, share it."""
        return f"{super().purpose} {self.sample_rate!r} {self.bands} {self.total}"

    def noise(self, draws: Any) -> Correlated:
        """What the optimiser takes the noise of each step from.

        Args:
            draws: a `fedlora.client.Rng`.
        """
        return Correlated(self, draws.past or Past(draws.root), draws.client, draws.first)


def banded(plain: ExampleGaussian, bands: int) -> BandedGaussian:
    """DP-SGD's steps with banded noise: as many examples a step, of the group whose turn it is."""
    told = {f.name: getattr(plain, f.name) for f in fields(plain)}
    rate = plain.sample_rate * bands
    return BandedGaussian(**{**told, "sample_rate": 1.0 if 1 < rate < 1 + 1e-9 else rate, "bands": bands})
