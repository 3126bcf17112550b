"""DP-SGD whose noise clients share out: each adds a part, and their sum under masks carries the whole.

One local step a round. With s_k the sum of client k's clipped gradients (`fedlora.privacy.mechanisms.dp_sgd`), its
coordinates cut to what fits under `secure_aggregation.range`, client k sends, rounded at random to whole steps of
the grid (`fedlora.privacy.grid`), the change that plain SGD makes of

    (s_k + N(0, (sigma C)^2 I / K)) / batch_size

All clients have the same sigma and `batch_size`. So the sum over the h who send is that of one DP-SGD step over
all their examples, under N(0, (h / K) (sigma C)^2 I). K is the number of senders that keep their noise to
themselves, at the least (`fedlora.privacy.graph.sharers`). So from everybody who has the models, and from the
server and the share of senders that collude with it, an example has the promise of a step under sigma at its
client's own sampling rate. If all others give their noise away it has that of sigma / sqrt(K). The event says
both: its noise is the client's own, and its `sharers` are K (`fedlora.privacy.accounting.in_sums`).

Why that holds, and what it takes:

- Cutting a coordinate to an interval brings no two sums further apart. So one example still moves it by C at most,
  and whether a number fits on the grid is known before an example is looked at: noise beyond ten deviations apart.
- What is rounded at random has the distribution of Gaussian noise and that of the rounding, on whole steps. Sums
  of such are again one, to within e^-600 where a deviation of each is eight steps or more (as in
  `fedlora.privacy.grid`). Rounding adds noise and takes none away.
- The change is linear in the noised sum: one step, plain SGD, no state, nothing that stays with a client. Beyond
  one local step the second depends on what the first added, and the sum is no single release.
- Neighbours differ in one example of one client, which that client alone samples: no sampling rate but its own
  enters. How many senders there were does not depend on a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedlora.errors import ContractError
from fedlora.privacy import grid
from fedlora.privacy.accounting import MAX_NOISE_MULTIPLIER, Event
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian

if TYPE_CHECKING:
    import torch

EXAMPLE_NOISE = "example-noise"  # in the words to sites: sigma of the sum, the largest that any of them needs
MEMBERS = "members"  # in the words: how many are asked for a masked change
TAIL = 10.0  # standard deviations that noise stays within, but for a chance of 2e-23


def told(config: Mapping[str, Any], own: float, most: int) -> tuple[float, int]:
    """Sigma and the clients of a round, by the words of the server; what it leaves out is as bad as it may be.

    Args:
        config: the words.
        own: sigma that this client needs, which it does not go below.
        most: clients that the round may have.

    Raises:
        ContractError: the words are none that an honest server says.
    """
    noise, members = config.get(EXAMPLE_NOISE, own), config.get(MEMBERS, most)
    if not isinstance(noise, float) or not own * (1 - 1e-9) <= noise <= MAX_NOISE_MULTIPLIER:
        raise ContractError(
            f"the server asks for less noise than the {own:.4g} that is needed here, or for no noise"
        )
    if type(members) is not int or not LEAST <= members <= most:
        raise ContractError(f"the server says how many are in the round, and not {LEAST} to {most}")
    return max(noise, own), members


def deviation(noise_multiplier: float, clip_norm: float, lr: float, batch_size: float, sharers: float) -> float:
    """Standard deviation of one client's part of the noise, in what it sends.

    Args:
        noise_multiplier: sigma, of the sum.
        clip_norm: C.
        lr: of the step.
        batch_size: that sums are divided by.
        sharers: K.
    """
    return lr * noise_multiplier * clip_norm / (batch_size * math.sqrt(sharers))


@dataclass(frozen=True, kw_only=True)
class Shared(ExampleGaussian):
    """One client's part; `noise_multiplier` is that of its own noise, sigma / sqrt(K).

    Attributes:
        sharers: K.
        range: that a number of the change may have.
    """

    sharers: float
    range: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 1 or self.adapts:
            raise ContractError("noise is shared out in rounds of one step, under a bound that is fixed")

    def event(self, clip_norm: float | None = None) -> Event:
        """Of its own part alone, with K."""
        return replace(super().event(clip_norm), sharers=self.sharers)

    def optimizer(self, inner: "torch.optim.Optimizer", noise: Any) -> Any:
        """As for noise of one's own; sums are cut to what fits with their noise.

        Raises:
            ContractError: the noise is too coarse or too fine for the grid, or for the numbers that it moves.
        """
        made = super().optimizer(inner, noise)
        made.limits = [
            self._limit(float(group["lr"]), float(p.detach().abs().max()))
            for group in inner.param_groups
            for p in group["params"]
        ]
        return made

    def _limit(self, lr: float, largest: float) -> float:
        """What a coordinate of the sum is cut to, in a tensor that steps by `lr` from numbers up to `largest`."""
        if lr == 0:
            return math.inf
        std = deviation(self.noise_multiplier, self.clip_norm, lr, self.batch_size, 1.0)
        check_grid(std, self.range)
        if std < grid.FINE * largest * 2.0**-23:
            raise ContractError("the noise is too little for the numbers that it is added to: raise lr, or noise")
        return (self.range - TAIL * std) * self.batch_size / lr


def check_grid(std: float, range: float) -> None:
    """Make sure that a client's part of the noise fits on the grid, and that the grid is fine enough for it.

    Raises:
        ContractError: it does not, or is not.
    """
    if TAIL * std > range / 2:
        raise ContractError(f"noise of {std:.2g} is too much for a range of {range:g}: raise it, or clients.total")
    if (steps := std / range * 2 ** (grid.BITS - 1)) < grid.FINE:
        raise ContractError(f"noise of {steps:.2g} steps is too little for the grid: lower range")
