"""Differential privacy for whole clients, at a server that is trusted to add the noise.

Each round takes each client by a coin of its own with probability `q = per_round / total`. With d_k the
change that client k sends, over all tensors together, and n = q * total the expected cohort

    mean = (sum_k d_k * min(1, C / ||d_k||) + N(0, (z C)^2 I)) / n

Dividing by n and not by the number that came keeps the sensitivity at C / n (McMahan et al., 2018,
https://arxiv.org/abs/1710.06963). Where C adapts (Andrew et al., 2021, https://arxiv.org/abs/1905.03871) each
client also sends whether its norm was within C, the noised share of those moves C towards a quantile of the
norms, and both noises together cost what a single z would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapter import Adapter, Tensor, Update
from fedlora.errors import ContractError, SettingError
from fedlora.privacy import Event
from fedlora.seeding import generator

CLIP_NORM = "clip-norm"  # in the words to the clients of a round: clip the change that you send to it
WITHIN = "within-clip-norm"  # in an update: 1 where nothing had to be clipped; their mean where summed

_STEP = 0.2  # of log C for each round, times how far the share is from the quantile (Andrew et al., 2021)


def clip(update: Update, received: Mapping[str, Tensor], bound: float, share_metrics: bool) -> Update:
    """The update with its change scaled to norm `bound` at most, and without its weight and its figures.

    Args:
        update: of one client.
        received: the tensors that it started from.
        bound: C.
        share_metrics: whether its figures may leave all the same.
    """
    norm = _norm(update, received)
    factor = np.float32(min(1.0, bound / norm)) if norm else np.float32(1)
    return replace(
        update,
        adapter={n: received[n] + factor * (t - received[n]) for n, t in update.adapter.items()},
        weight=1.0,
        metrics={**(update.metrics if share_metrics else {}), WITHIN: float(norm <= bound)},
    )


def check(update: Update, received: Mapping[str, Tensor], bound: float) -> None:
    """Make sure that a client that the server does not trust has clipped: the guarantee stands on it.

    Raises:
        ContractError: its change is larger than `bound`, or it says what cannot be.
    """
    if (norm := _norm(update, received)) > bound * (1 + 1e-4):
        raise ContractError(f"a change of norm {norm:.4g} was sent, and the bound is {bound:.4g}")
    if update.weight != 1.0 or update.metrics.get(WITHIN) not in (0.0, 1.0):
        raise ContractError("where clients are protected whole they weigh alike and say whether they were clipped")


def _norm(update: Update, received: Mapping[str, Tensor]) -> float:
    """The norm of a change, over all tensors together."""
    return math.sqrt(
        sum(float(((t - received[n]).astype(np.float64) ** 2).sum()) for n, t in update.adapter.items())
    )


@dataclass(frozen=True, kw_only=True)
class Central:
    """The server's side.

    Attributes:
        noise_multiplier: z, for all that a round releases.
        sample_rate: q.
        total: how many clients there are.
        seed: what cohorts and noise are drawn from; a simulation's, not for deployment.
        quantile: of the norms, which C adapts to; None: C is fixed.
    """

    noise_multiplier: float
    sample_rate: float
    total: int
    seed: int
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.quantile is not None and 2 * self._count_noise <= self.noise_multiplier:
            raise SettingError(
                "privacy.quantile",
                f"{self.expected:g} clients a round are too few for a bound that adapts: at noise multiplier "
                f"{self.noise_multiplier:g} it takes more than {10 * self.noise_multiplier:.0f}; leave it out",
            )

    @property
    def expected(self) -> float:
        """The expected cohort, which sums are divided by."""
        return self.sample_rate * self.total

    @property
    def _count_noise(self) -> float:
        """Standard deviation of the noise on the count of clients within the bound, as the paper has it."""
        return self.expected / 20

    @property
    def sum_noise(self) -> float:
        """Standard deviation of the noise on the sum over C.

        `(z^-2 - (2 sigma_b)^-2)^-1/2`: with the noise sigma_b on the count, whose terms are +-1/2, one release
        under z. Without a count it is z.
        """
        if self.quantile is None:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self._count_noise) ** -2) ** -0.5)

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, ascending; may be none."""
        coins = generator(self.seed, round, "cohort").random(self.total)
        return [int(c) for c in np.flatnonzero(coins < self.sample_rate)]

    def event(self, clip_norm: float) -> Event:
        """What a round costs every client, taken or not."""
        return Event(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=1, clip_norm=clip_norm
        )

    def release(
        self, round: int, received: Mapping[str, Tensor], updates: Sequence[Update], clip_norm: float
    ) -> tuple[Update, float]:
        """The noised mean as one update, and the bound of the next round.

        Args:
            round: from 1.
            received: what the clients started from, of the tensors that they send.
            updates: clipped, perhaps summed on the way; none where nobody was drawn.
            clip_norm: C.
        """
        std = self.sum_noise * clip_norm
        noise = generator(self.seed, round, "server noise", repr(std))  # other noise is drawn afresh
        mean: Adapter = {}
        for name in sorted(received):
            start = received[name]
            change = np.zeros(start.shape)
            for update in updates:
                change += update.weight * (update.adapter[name].astype(np.float64) - start)
            change += noise.normal(0.0, std, start.shape)
            mean[name] = (start + change / self.expected).astype(np.float32)
        clients = tuple(c for u in updates for c in u.clients)
        released = Update(adapter=mean, weight=1.0, clients=clients)
        if self.quantile is None:
            return released, clip_norm
        count = sum(u.weight * (u.metrics[WITHIN] - 0.5) for u in updates) + noise.normal(0.0, self._count_noise)
        share = count / self.expected + 0.5
        return released, clip_norm * math.exp(-_STEP * (share - self.quantile))
