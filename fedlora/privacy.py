"""Privacy events, the accountants that turn them into epsilon, and calibration.

Events are facts, epsilon is derived from them. The mechanism is the Poisson-subsampled Gaussian: each
step takes every example with probability `sample_rate`, clips each example's gradient to `clip_norm` in
L2 norm, sums, and adds Gaussian noise of standard deviation `noise_multiplier * clip_norm`. Neighbouring
datasets differ by one example added or removed. Numbers come from Google's dp-accounting: privacy loss
distributions (`pld`, the tightest) or Renyi DP (`rdp`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Self

from fedlora.errors import SettingError, UserError

Accountant = Literal["pld", "rdp"]

MAX_NOISE_MULTIPLIER = 1e5  # beyond it the noise drowns anything that could be learnt
_COARSE = 2e-3  # discretisation of the search for a noise multiplier; what it finds is checked finely


@dataclass(frozen=True, kw_only=True)
class Event:
    """Steps of the Poisson-subsampled Gaussian mechanism on one client's examples.

    Attributes:
        noise_multiplier: standard deviation of the noise over `clip_norm`.
        sample_rate: probability with which a step takes each example, in (0, 1].
        steps: how many steps.
        clip_norm: L2 bound on one example's gradient over all trained tensors together.

    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float

    def __post_init__(self) -> None:
        fine = self.noise_multiplier > 0 and 0 < self.sample_rate <= 1 and self.clip_norm > 0
        if not (fine and self.steps >= 0 and isinstance(self.steps, int) and math.isfinite(self.noise_multiplier)):
            raise UserError(f"not an event of the Poisson-subsampled Gaussian mechanism: {self}")

    def to_json(self) -> dict[str, float | int]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The event that `to_json` wrote; further keys are passed over."""
        return cls(
            noise_multiplier=float(data["noise_multiplier"]),
            sample_rate=float(data["sample_rate"]),
            steps=data["steps"],
            clip_norm=float(data["clip_norm"]),
        )


def epsilon(events: Iterable[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at `delta` of all events together, on one client's examples."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sample_rate)
            steps[key] = steps.get(key, 0) + event.steps
    return _epsilon(tuple((*key, count) for key, count in sorted(steps.items())), delta, accountant)


@lru_cache(maxsize=65536)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    if accountant == "rdp":
        return _rdp(history, delta)
    total = None
    for noise_multiplier, sample_rate, steps in history:
        part = _one_step(noise_multiplier, sample_rate, _interval(noise_multiplier)).self_compose(steps)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta))  # type: ignore[union-attr]


def _rdp(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    for noise_multiplier, sample_rate, steps in history:
        accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
    return float(accountant.get_epsilon(delta))


def _interval(noise_multiplier: float) -> float:
    """How finely privacy losses are discretised.

    Any value is sound. A step under much noise loses little, and needs a finer one to be tight: these
    agree with ever finer ones to 0.1 %.
    """
    return 1e-4 if noise_multiplier >= 1.5 else 5e-4


@lru_cache(maxsize=4096)
def _one_step(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sample_rate
    )


@lru_cache(maxsize=65536)
def calibrate(
    target: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The least noise multiplier, to a thousandth, with which `steps` steps spend at most epsilon `target`.

    Raises:
        SettingError: no noise multiplier up to `MAX_NOISE_MULTIPLIER` reaches it.

    """
    from scipy.optimize import brentq

    def coarse(log_noise: float) -> float:
        noise = math.exp(log_noise)
        if accountant == "rdp":
            value = _rdp([(noise, sample_rate, steps)], delta)
        else:
            interval = min(_COARSE, 4 * _interval(noise))
            value = _one_step.__wrapped__(noise, sample_rate, interval).self_compose(steps)
            value = float(value.get_epsilon_for_delta(delta))
        return math.log(max(value, 1e-12)) - math.log(target)

    low, high = math.log(0.3), math.log(2.0)
    while coarse(high) > 0:
        low, high = high, high + math.log(4)
        if high > math.log(MAX_NOISE_MULTIPLIER):
            raise SettingError(
                "privacy.epsilon",
                f"no noise reaches epsilon {target:g} at delta {delta:g} over {steps} steps that each take "
                f"{sample_rate:.2%} of the examples; raise it, or take fewer or smaller steps",
            )
    while coarse(low) < 0:
        low, high = low - math.log(2), low
        if low < math.log(0.01):
            break
    noise = math.exp(brentq(coarse, low, high, xtol=2e-4)) if low >= math.log(0.01) else math.exp(low)
    while True:
        noise = math.ceil(noise * 2000) / 2000 if noise < 1000 else noise  # a round number is told more easily
        spent = epsilon(
            [Event(noise_multiplier=noise, sample_rate=sample_rate, steps=steps, clip_norm=1.0)], delta, accountant
        )
        if spent <= target:
            return noise
        noise *= 1.0005


def statement(epsilon: float, delta: float, unit: str, accountant: Accountant) -> str:
    """What an epsilon means, in one sentence."""
    how = {"pld": "privacy loss distributions", "rdp": "Renyi DP"}[accountant]
    return (
        f"({epsilon:.3g}, {delta:g})-differential privacy for each {unit}, neighbouring datasets differ by one "
        f"{unit} added or removed; the largest over clients, by {how} (dp-accounting), assuming Poisson sampling"
    )
