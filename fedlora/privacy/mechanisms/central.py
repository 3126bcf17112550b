"""Differential privacy for whole clients, at a server that is trusted to add the noise.

Each round takes each client by a coin of its own with probability `q = per_round / total`. With d_k the
change that client k sends, over all tensors together, and n = q * total the expected cohort

    mean = (sum_k d_k * min(1, C / ||d_k||) + N(0, (z C)^2 I)) / n

Dividing by n and not by the number that came keeps the sensitivity at C / n (McMahan et al., 2018,
https://arxiv.org/abs/1710.06963). Where C adapts (Andrew et al., 2021, https://arxiv.org/abs/1905.03871) each
client also sends whether its norm was within C, the noised share of those moves C towards a quantile of the
norms, and both noises together cost what a single z would.

Where clients share the noise out (`secure_aggregation.noise: shared`), each of the m that are asked for a masked
change adds N(0, (z C)^2 I / m) to it. Of those h send; the server adds the rest, a part 1 - h / m of the variance,
so that what a round releases carries z all the same. The server itself sees the sum before that, under the noise
of the clients alone: `Central.seen` is what that costs.

Under bands (`fedlora.privacy.mechanisms.bands`, where clients have the place of examples and rounds that of steps)
round t draws from the clients k with k mod b = t mod b alone, each with probability b q, and its noise takes back
a part of that of the rounds before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedlora.adapter import Adapter, Tensor, Update
from fedlora.errors import ContractError, SettingError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import Coefficients, Noise, Past, inverse
from fedlora.privacy.mechanisms.contract import Mechanism
from fedlora.seeding import Root, stream

CLIP_NORM = "clip-norm"  # in the words to the clients of a round: clip the change that you send to it
WITHIN = "within-clip-norm"  # in an update: 1 where nothing had to be clipped; their mean where summed
SUM_NOISE = "sum-noise"  # in the words: add your share of this noise, over the bound, to the change
COUNT_NOISE = "count-noise"  # in the words, where C adapts: and of this to whether it was within the bound


def clip(update: Update, received: Mapping[str, Tensor], bound: float, share_metrics: bool) -> Update:
    """The update with its change scaled to norm `bound` at most, and without its weight and its figures.

    Args:
        update: of one client.
        received: the tensors that it started from.
        bound: C.
        share_metrics: whether its figures may leave all the same.
    """
    norm = _norm(update, received)
    factor = min(1.0, bound / norm) if norm else 1.0
    clipped = update.adapter
    for _ in range(8 if norm > bound else 0):
        clipped = {n: received[n] + np.float32(factor) * (t - received[n]) for n, t in update.adapter.items()}
        if (left := _norm(replace(update, adapter=clipped), received)) <= bound * (1 + 1e-6):
            break
        factor *= 0.999 * bound / left  # what float32 rounds may be longer
    else:
        if norm > bound:  # so coarse beside what was received that no change of this length can be told
            clipped = {n: received[n].copy() for n in update.adapter}
    return replace(
        update,
        adapter=clipped,
        weight=1.0,
        metrics={**(update.metrics if share_metrics else {}), WITHIN: float(norm <= bound)},
    )


def check(update: Update, received: Mapping[str, Tensor], bound: float) -> None:
    """Make sure that a client that the server does not trust has clipped: the guarantee stands on it.

    Raises:
        ContractError: its change is larger than `bound`, or it says what cannot be.
    """
    if not _norm(update, received) <= bound * (1 + 1e-4):
        raise ContractError(f"a change longer than the bound, {bound:.4g}, was sent")
    if update.weight != 1.0 or update.metrics.get(WITHIN) not in (0.0, 1.0):
        raise ContractError("where clients are protected whole they weigh alike and say whether they were clipped")


def _norm(update: Update, received: Mapping[str, Tensor]) -> float:
    """The norm of a change, over all tensors together."""
    return math.sqrt(
        sum(float(((t - received[n]).astype(np.float64) ** 2).sum()) for n, t in update.adapter.items())
    )


@dataclass(frozen=True, kw_only=True)
class Central(Mechanism):
    """The server's side: over clients, a release each round.

    Attributes:
        root: what cohorts and noise are drawn from: a simulation's seed, or a key of the operating system.
        shared: whether clients share the noise out.
        coefficients: of the bands of the noise over rounds; one alone: each round's is independent.
    """

    root: Root
    shared: bool = False
    coefficients: Coefficients = (1.0,)

    def __post_init__(self) -> None:
        if self.bands > 1 and (self.adapts or self.shared):
            raise ContractError("bands hold for a bound that is fixed, and for noise of the server's own")
        if self.adapts and not self.adapts.enough:
            raise SettingError(
                "privacy.clip",
                f"{self.expected:g} clients a round are too few for a bound that adapts: at noise multiplier "
                f"{self.noise_multiplier:g} it takes more than {10 * self.noise_multiplier:.0f}; leave it out",
            )

    @property
    def bands(self) -> int:
        """b, and how many groups of clients take turns."""
        return len(self.coefficients)

    @property
    def expected(self) -> float:
        """The expected cohort, which sums are divided by."""
        return self.sample_rate * self.total / self.bands

    def words(self, clip_norm: float) -> dict[str, float]:
        """What the clients of a round receive."""
        told = {CLIP_NORM: clip_norm}
        if self.shared:
            told[SUM_NOISE] = self.sum_noise
        if self.adapts:
            told[COUNT_NOISE] = self.adapts.count_noise if self.shared else 0.0
        return told

    def check_words(self, told: Mapping[str, Any], clip_norm: float) -> None:
        """Make sure that a client gets nothing worse than the scenario promises it.

        Args:
            told: to the client.
            clip_norm: the scenario's, where C does not adapt.

        Raises:
            ContractError: the bound is none, or not the scenario's; or the noise is less, or on what is not sent.
        """
        bound = told.get(CLIP_NORM)
        if not isinstance(bound, float) or not 0 < bound < math.inf:
            raise ContractError("the server names no bound on the change")
        if self.adapts is None and bound != clip_norm:
            raise ContractError(f"the server's bound on the change is not the scenario's {clip_norm:g}")
        for name, least in self.words(bound).items():
            given = told.get(name)
            if not isinstance(given, float) or not least * (1 - 1e-9) <= given < math.inf:
                raise ContractError(
                    f"the server asks for less noise than the scenario's {least:.4g} times the bound"
                )
        if strange := {CLIP_NORM, SUM_NOISE, COUNT_NOISE} & set(told) - set(self.words(bound)):
            raise ContractError(f"the server says {min(strange)}, and the scenario has none")

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, ascending; may be none."""
        taken = self.taken(stream(self.root, round, "cohort"))
        return [int(c) for c in np.flatnonzero(taken) if (c - round) % self.bands == 0]

    @property
    def terms(self) -> tuple[object, ...]:
        """All that noise is drawn by, but the round and what is received."""
        return self.noise_multiplier, self.sample_rate, self.total, self.coefficients

    def event(self, clip_norm: float, draw: int = 0, again: bool = False) -> Event:
        """What a round costs every client, taken or not.

        A further draw is over the cohort of the first: its coins hide nobody a second time. (Given the first
        release, the second is a Gaussian on who is in the cohort, at most as telling as one on everybody.)

        Args:
            clip_norm: C.
            draw: which draw of the round's noise, over one cohort.
            again: whether the round was paid for before, and has another key, so another cohort and other noise.
                Its group of clients then has a turn more than others, which is not one of b.
        """
        rate, bands = (self.sample_rate, 1 if again else self.bands) if draw == 0 else (1.0, 1)
        noise = self.noise_multiplier
        return Event(noise_multiplier=noise, sample_rate=rate, steps=1, clip_norm=clip_norm, bands=bands)

    def seen(self, clip_norm: float, carried: float, rounding: float) -> Event:
        """What a round costs one who is in the sum, from the server that sees it: as if sent without being drawn.

        Args:
            clip_norm: C.
            carried: part of the noise's variance that is in the sum and that the server cannot take off.
            rounding: how much longer than C a change may get when it is rounded.
        """
        noise = self.noise_multiplier * math.sqrt(carried) / (1 + rounding / clip_norm)
        return Event(noise_multiplier=noise, sample_rate=1.0, steps=1, clip_norm=clip_norm)

    def release(
        self,
        round: int,
        received: Mapping[str, Tensor],
        updates: Sequence[Update],
        clip_norm: float,
        *,
        carried: float = 0.0,
        draw: int = 0,
    ) -> tuple[Update, float]:
        """The noised mean as one update, and the bound of the next round.

        Args:
            round: from 1.
            received: what the clients started from, of the tensors that they send.
            updates: clipped, perhaps summed on the way; none where nobody was drawn.
            clip_norm: C.
            carried: the part of the noise's variance that is in the sum already, by the engine and no client.
            draw: which draw of the round's noise (`fedlora.privacy.replay`).
        """
        rest = math.sqrt(max(1.0 - carried, 0.0))
        std = self.sum_noise * clip_norm * rest
        again = ("draw", draw) if draw else ()
        noise = stream(self.root, round, "server noise", repr(std), *again)
        banded = self._banded(round, received, repr(std)) if self.bands > 1 and draw == 0 else {}
        mean: Adapter = {}
        for name in sorted(received):
            start = received[name]
            change = np.zeros(start.shape)
            for update in updates:
                change += update.weight * (update.adapter[name].astype(np.float64) - start)
            change += std * banded[name] if banded else noise.normal(0.0, std, start.shape)
            mean[name] = (start + change / self.expected).astype(np.float32)
        clients = tuple(c for u in updates for c in u.clients)
        released = Update(adapter=mean, weight=1.0, clients=clients)
        if self.adapts is None:
            return released, clip_norm
        count = sum(u.weight * (u.metrics[WITHIN] - 0.5) for u in updates)
        return released, self.adapts.moved(
            clip_norm, count + float(noise.normal(0.0, self.adapts.count_noise * rest)[0])
        )

    def deviation(self, round: int, clip_norm: float) -> float:
        """The standard deviation of the noise in each number of a round's mean."""
        return (
            self.sum_noise * clip_norm * float(np.linalg.norm(inverse(self.coefficients, round))) / self.expected
        )

    @cached_property
    def _past(self) -> Past:
        return Past(self.root)

    def _banded(self, round: int, received: Mapping[str, Tensor], std: str) -> dict[str, Noise]:
        """The x of a round, counted from 1, by tensor. Rounds on other terms have noise of their own."""
        names = sorted(received)
        path = ("server noise", repr((std, *self.terms)), *names)
        size = sum(received[name].size for name in names)
        drawn = self._past.noise(path, self.root, 0, self.coefficients, round - 1, size)
        ends = np.cumsum([received[name].size for name in names])
        parts = zip(names, np.split(drawn, ends[:-1]), strict=True)
        return {name: part.reshape(received[name].shape) for name, part in parts}
