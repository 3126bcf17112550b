"""Privacy events, the accountants that turn them into epsilon, and calibration.

Events are facts, epsilon is derived from them. The mechanism is the Poisson-subsampled Gaussian: each
step takes every example with probability `sample_rate`, clips each example's gradient to `clip_norm` in
L2 norm, sums, and adds Gaussian noise of standard deviation `noise_multiplier * clip_norm`. Under banded noise
(`fedlora.privacy.mechanisms.bands`) groups of examples take turns, and T steps count as ceil(T / bands).

Neighbouring datasets are those of zero-out (Kairouz et al., 2021, https://arxiv.org/abs/2103.00039,
Definition 1.1): they have equally many examples, and in one of them one example is replaced by a blank that
counts for nothing: in no sum of gradients, and where a bound adapts in no count. So how many examples a client
holds is public: it sets the sample rate. Taking the example out would change the sum of a step alike. So the
accountants of adding or removing one give the same epsilon. Where persons are protected
(`fedlora.privacy.mechanisms.persons`) they have the place of examples in all of this.

Each accountant gives an upper bound that holds, so the least of them may be stated: `pld`, privacy loss
distributions of Google's dp-accounting, is never looser than the others by more than its grid; `prv`, the
privacy random variables of Opacus (Gopi et al., 2021, https://arxiv.org/abs/2106.02848), adds an error that
it states; `rdp`, the Renyi DP of dp-accounting, is what most papers print.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

from fedlora.errors import SettingError, UserError
from fedlora.privacy.cohorts import MOST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Accountant = Literal["pld", "prv", "rdp"]
History = Sequence[tuple[float, float, int]]  # noise multiplier, sample rate, steps

MAX_NOISE_MULTIPLIER = 1e5  # beyond it the noise drowns anything that could be learnt
MOST_NOISE, LEAST_RATE, LEAST_BOUND = (
    1e9,
    1e-9,
    1e-30,
)  # of an event: beyond, accountants overflow, and nobody trains
MAX_STEPS = 10**7  # more is a mistake, and would take too much memory to account for
_MIN_NOISE_MULTIPLIER = 0.01  # below it epsilon is in the thousands
_COARSER = 8  # the width of losses in the search for a noise multiplier; what it finds is checked finely
_SEARCHES = 32  # noise multipliers that are searched for by themselves; of more sample rates a curve tells
_POINTS = 5e4  # that one step's losses are cut into at most; a second of work
_TRIES = 400  # steps of a search: it ends, whatever an accountant says
_PRV_MOST = 100.0  # epsilon beyond which privacy random variables would take minutes


@dataclass(frozen=True, kw_only=True)
class Event:
    """Steps of the Poisson-subsampled Gaussian mechanism on one client's examples.

    Attributes:
        noise_multiplier: standard deviation of the noise over `clip_norm`.
        sample_rate: probability with which a step takes each example whose turn it is, in (0, 1].
        steps: how many steps, at most `MAX_STEPS`.
        clip_norm: L2 bound on one example's gradient over all trained tensors together.
        bands: of the noise, and groups of examples that take turns; 1: noise is independent, all are one group.
        sharers: how many others at the least, itself counted, add such noise to a sum that alone is seen; 1: the
            noise is all there is (`in_sums`).
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float
    bands: int = 1
    sharers: float = 1.0

    def __post_init__(self) -> None:
        positive = all(0 < x < math.inf for x in (self.noise_multiplier, self.sample_rate, self.clip_norm))
        told = self.noise_multiplier <= MOST_NOISE and LEAST_RATE <= self.sample_rate <= 1
        told = told and self.clip_norm >= LEAST_BOUND  # below, float32 rounds norms away
        told = told and type(self.bands) is int and 1 <= self.bands <= MAX_STEPS and 1 <= self.sharers <= MOST
        if not (positive and told and type(self.steps) is int and 0 <= self.steps <= MAX_STEPS):
            raise UserError(f"not an event of the Poisson-subsampled Gaussian mechanism: {self}")

    def to_json(self) -> dict[str, float | int]:
        """Plain data."""
        return {key: value for key, value in asdict(self).items() if UNSAID.get(key) != value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The event that `to_json` wrote; further keys are passed over."""
        return cls(
            noise_multiplier=float(data["noise_multiplier"]),
            sample_rate=float(data["sample_rate"]),
            steps=data["steps"],
            clip_norm=float(data["clip_norm"]),
            bands=data.get("bands", UNSAID["bands"]),
            sharers=float(data.get("sharers", UNSAID["sharers"])),
        )


UNSAID: Mapping[str, Any] = {f.name: f.default for f in fields(Event) if f.default is not MISSING}
"""What an event has of the keys that its JSON leaves out."""


@lru_cache(maxsize=4096)
def added(events: tuple[Event, ...], event: Event) -> tuple[Event, ...]:
    """Events and one more; steps on the terms of the last are counted with it, so that a history stays short.

    Clients with equal histories share one, which is what makes a history of many clients small.
    """
    if events and replace(events[-1], steps=event.steps) == event:
        if (steps := events[-1].steps + event.steps) <= MAX_STEPS:
            return (*events[:-1], replace(event, steps=steps))
    return (*events, event)


def epsilon(events: Iterable[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at `delta` of all events together, on one client's examples."""
    return _epsilon(_history(events), delta, accountant)


def in_sums(events: Iterable[Event], share: float = 1.0) -> tuple[Event, ...]:
    """What events cost from those who see sums alone; those of noise that is not shared out stay as they are.

    Args:
        events: of one client's examples, under its own part of the noise.
        share: of the noise of others that is counted upon, of what the events say.
    """
    return tuple(
        replace(e, noise_multiplier=e.noise_multiplier * math.sqrt(max(e.sharers * share, 1.0)), sharers=1.0)
        for e in events
    )


def alone(event: Event) -> Event:
    """What an event costs whatever all others do: under the client's own part of the noise."""
    return replace(event, sharers=1.0)


def alike(events: Iterable[Event], event: Event) -> int:
    """How many steps were taken on the terms of an event."""
    return sum(one.steps for one in events if replace(one, steps=event.steps) == event)


def adds(events: Iterable[Event], event: Event) -> Event:
    """What an event adds to those before it, as independent steps: those of the group that has had most turns."""
    before = alike(events, event)
    turns = -(-(before + event.steps) // event.bands) - -(-before // event.bands)
    return replace(event, steps=turns, bands=1)


def _history(events: Iterable[Event]) -> tuple[tuple[float, float, int], ...]:
    """Equal steps taken together: their order does not matter. Those of b bands are one in b, rounded up."""
    steps: dict[tuple[float, float, int, float], int] = {}
    for event in events:
        if event.steps:
            bound = event.clip_norm if event.bands > 1 else 0.0  # steps of another bound are counted by themselves
            key = (event.noise_multiplier, event.sample_rate, event.bands, bound)
            steps[key] = steps.get(key, 0) + event.steps
    turns: dict[tuple[float, float], int] = {}
    for (noise, rate, bands, _), count in steps.items():
        turns[noise, rate] = turns.get((noise, rate), 0) - (-count // bands)
    return tuple((*key, count) for key, count in sorted(turns.items()))


def epsilon_of_runs(runs: Iterable[Iterable[Sequence[Event]]], delta: float) -> float:
    """Epsilon at `delta` of several runs together, on an example that anybody may have held in each.

    Runs with different seeds have different partitions. So each run costs, at every order of Renyi DP, as much as
    its holder with the largest cost at that order; over runs this adds up (Mironov, 2017, https://arxiv.org/abs/1702.07476).

    Args:
        runs: for each run the events of every holder of a budget.
        delta: of the whole.
    """
    return of_renyi(sum((renyi(run) for run in runs), 0.0 * renyi([])), delta)


def renyi(holders: Iterable[Iterable[Event]]) -> "NDArray[np.float64]":
    """Renyi DP of a run at each of `orders`, by the holder with the largest cost at each, (orders,)."""
    import numpy as np
    from opacus.accountants.analysis.rdp import compute_rdp

    most = np.zeros(len(orders()))
    for history in map(_history, holders):
        steps = (compute_rdp(q=q, noise_multiplier=z, steps=n, orders=orders()) for z, q, n in history)
        most = np.maximum(most, sum(steps, np.zeros(len(orders()))))
    return most


def orders() -> Sequence[float]:
    """Of Renyi DP, those at which runs are added up."""
    from opacus.accountants import RDPAccountant

    found: Sequence[float] = RDPAccountant.DEFAULT_ALPHAS
    return found


def of_renyi(rdp: "NDArray[np.float64]", delta: float) -> float:
    """Epsilon of Renyi DP at `orders`, (orders,)."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if not rdp.any():
        return 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is", UserWarning)  # a wider choice only lowers epsilon
        return max(float(get_privacy_spent(orders=orders(), rdp=rdp, delta=delta)[0]), 0.0)


def _spend(
    history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant, coarser: int = 1
) -> float:
    if not history:
        return 0.0
    if min(history)[0] < 1e-3:
        return math.inf  # a step costs more than 10^5; the numbers below would overflow
    return _ACCOUNTANTS[accountant](history, delta, coarser)


_epsilon = lru_cache(maxsize=65536)(_spend)


def profile(events: Iterable[Event], epsilons: Sequence[float]) -> list[float]:
    """Delta at each of some epsilons, which may be negative, of all events together; never too small."""
    if not (history := _history(events)):
        return [max(-math.expm1(e), 0.0) for e in epsilons]
    return [float(delta) for delta in _losses(history, _COARSER).get_delta_for_epsilon(list(epsilons))]


def _pld(history: History, delta: float, coarser: int) -> float:
    return float(_losses(history, coarser).get_epsilon_for_delta(delta))


def _losses(history: History, coarser: int) -> Any:
    total, interval = None, _interval(history) * coarser
    for noise_multiplier, sample_rate, steps in history:
        part = _one_step(noise_multiplier, sample_rate, interval).self_compose(steps)
        total = part if total is None else total.compose(part)
    return total


def _rdp(history: History, delta: float, _: int = 1) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # an order of Renyi's that is left out only raises epsilon
    try:
        accountant = RdpAccountant()
        for noise_multiplier, sample_rate, steps in history:
            accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _prv(history: History, delta: float, _: int = 1) -> float:
    """The stated error is a hundredth of Renyi's epsilon, where that asks for no finer grid than 0.001."""
    import numpy as np
    from opacus.accountants import PRVAccountant

    bound = _rdp(history, delta)
    if bound > _PRV_MOST:
        return bound  # the grid is as wide as epsilon, and would not fit
    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # log 0 where every example is taken
        warnings.filterwarnings("ignore", "Optimal order is", UserWarning)
        try:
            return float(accountant.get_epsilon(delta, eps_error=min(max(bound / 100, 1e-3), 1e-2)))
        except ValueError:
            return bound  # its grid does not resolve such a delta; this holds too


_ACCOUNTANTS: Mapping[Accountant, Callable[[History, float, int], float]] = {
    "pld": _pld,
    "prv": _prv,
    "rdp": _rdp,
}


def _interval(history: History) -> float:
    """How finely privacy losses are discretised: one width for all steps, else they do not compose.

    Any width is sound. It is tight to some 0.3 % when it is an eighth of what a step loses, about
    `sample_rate / noise_multiplier`. A step under little noise may lose so much that this takes too many points.
    """

    def most(noise: float, rate: float) -> float:  # that one step loses, but for a chance of 1e-23
        exponent = 10 / noise + 0.5 / noise**2
        return math.log1p(rate * math.expm1(exponent)) if exponent < 700 else exponent

    finest = min(min(rate / noise / 8 for noise, rate, _ in history), 5e-4)
    return max(finest, max(most(noise, rate) for noise, rate, _ in history) / _POINTS)


@lru_cache(maxsize=1024)  # some 0.2 MB each
def _one_step(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sample_rate
    )


def unresolved(target: float, delta: float, accountant: Accountant) -> SettingError:
    """That an accountant gives no epsilon finely enough, and which one does."""
    other = "name a larger delta or epsilon" if accountant == "rdp" else "write accountant: rdp, which does"
    return SettingError(
        "privacy.accountant", f"{accountant} gives no epsilon {target:g} at delta {delta:g} finely enough: {other}"
    )


@lru_cache(maxsize=65536)
def calibrate(
    target: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    before: tuple[Event, ...] = (),
) -> float:
    """The least noise multiplier, to a thousandth, with which `steps` steps spend at most epsilon `target`.

    Together with what was spent `before`, if anything was.

    Raises:
        SettingError: no noise multiplier up to `MAX_NOISE_MULTIPLIER` reaches it.
    """
    from scipy.optimize import brentq

    def history(noise: float) -> tuple[tuple[float, float, int], ...]:
        return (*_history(before), (noise, sample_rate, steps))

    def excess(log_noise: float, coarser: int = 1) -> float:
        spent = _spend(history(math.exp(log_noise)), delta, accountant, coarser)
        return math.log(max(spent, 1e-12) / target)

    low, high = math.log(0.3), math.log(2.0)
    while excess(high, _COARSER) > 0:
        low, high = high, high + math.log(4)
        if high > math.log(MAX_NOISE_MULTIPLIER):
            if not math.isfinite(_spend(history(MAX_NOISE_MULTIPLIER), delta, accountant)):
                raise unresolved(target, delta, accountant)
            raise SettingError(
                "privacy.epsilon",
                f"no noise reaches epsilon {target:g} at delta {delta:g} over {steps} steps that each take "
                f"{sample_rate:.2%} of the examples; raise it, or take fewer or smaller steps",
            )
    while excess(low, _COARSER) < 0:
        low, high = low - math.log(2), low
        if low < math.log(_MIN_NOISE_MULTIPLIER):
            return _MIN_NOISE_MULTIPLIER
    high = brentq(excess, low, high, args=(_COARSER,), xtol=2e-4)
    width = 4e-3
    while (
        excess(high - width) < 0 and width < 8
    ):  # losses were cut too coarsely here, which asks for too much noise
        width *= 4
    if width > 4e-3:
        high = brentq(excess, high - width, high, xtol=2e-4)
    noise = math.exp(high)
    for _ in range(_TRIES):
        noise = math.ceil(noise * 2000) / 2000 if noise < 1000 else noise  # a round number is told more easily
        if _epsilon(history(noise), delta, accountant) <= target:
            return noise
        noise *= 1.0005
    raise unresolved(target, delta, accountant)


def calibrations(
    target: float,
    delta: float,
    sample_rates: Sequence[float],
    steps: int,
    accountant: Accountant = "pld",
    before: tuple[Event, ...] = (),
) -> list[float]:
    """`calibrate` for each of many sample rates, all of the same number of steps.

    A search takes about a second. With many sampling rates, a smooth curve through a few of them gives the
    others, each with a thousandth on top, and each checked to keep to the target.

    Raises:
        SettingError: as `calibrate`.
    """
    import numpy as np
    from scipy.interpolate import PchipInterpolator

    if len(set(sample_rates)) <= _SEARCHES:
        return [calibrate(target, delta, rate, steps, accountant, before) for rate in sample_rates]
    nodes = np.geomspace(min(sample_rates), max(sample_rates), _SEARCHES)
    found = [calibrate(target, delta, float(rate), steps, accountant, before) for rate in nodes]
    curve = PchipInterpolator(np.log(nodes), np.log(found))
    noise = []
    for rate in sample_rates:
        least = 1.001 * float(np.exp(curve(np.clip(math.log(rate), *np.log(nodes[[0, -1]])))))
        for _ in range(_TRIES):
            if _epsilon((*_history(before), (least, rate, steps)), delta, accountant) <= target:
                break
            least *= 1.001
        else:
            raise unresolved(target, delta, accountant)
        noise.append(least)
    return noise


def beside(events: Iterable[Event], delta: float, accountant: Accountant, known: float) -> float:
    """Epsilon of a client from another one that was in the same rounds: no sampling hides who was drawn.

    Args:
        events: of those rounds, as they cost every client.
        delta: of the whole.
        accountant: to count by.
        known: part of the noise's variance that the other one has added itself, at most.
    """
    return epsilon(
        [replace(e, sample_rate=1.0, noise_multiplier=e.noise_multiplier * math.sqrt(1 - known)) for e in events],
        delta,
        accountant,
    )
