"""DP-SGD (Abadi et al., 2016, https://arxiv.org/abs/1607.00133) on one client's examples.

Each step takes every example with probability `q = batch_size / n`, and with `g_i` the gradient of example i over
all trained tensors together gives

    (sum_i c(g_i) + N(0, (sigma C)^2 I)) / batch_size        with ||c(g)|| <= C

The batch may be empty: the noise is added all the same. Sums are Opacus's; noise is of a `Stream`.

A batch may be of at most so many examples: one that is larger is drawn again. **That costs what DP-SGD costs.**
Whom a step takes follows from coins and public numbers alone, so it is as likely with a blank in an example's
place. Given whom else it takes, T, it takes the example with probability q if T has room for one more, since
`P(T and i)` is to `P(T)` as q to 1 - q, drawn again or not; else never. So whoever were told T would still see the
subsampled Gaussian, at q or at 0. A random part of a batch that is too large has no such q: truncated Poisson
sampling (https://arxiv.org/abs/2508.15089) takes an event of its own.

What c is:

- `flat`: `g min(1, C / ||g||)`.
- `per_layer`: the same of each of the L trained tensors by itself, to C / sqrt(L): together they stay within C. It
  helps where one tensor's gradients outweigh the others'.
- `quantile`: `flat`, and C moves after each step towards a quantile of the norms
  (`fedlora.privacy.mechanisms.contract.Quantile`). Each round starts at `clip_norm` again.
- `automatic`: `C g / (||g|| + 0.01)`, so that every example counts alike, however small its gradient, and C does
  no more than scale the steps (AUTO-S: Bu et al., 2022, https://arxiv.org/abs/2206.07136).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fedlora.errors import ContractError, SettingError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.contract import Mechanism, Quantile
from fedlora.privacy.noise import Stream

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_FITS = 0.3  # of draws, at least, are as small as `clients.batch_limit` asks for: no step waits for long
STABLE = 0.01  # added to an example's norm by automatic clipping: one of no gradient has no direction


@dataclass(frozen=True, kw_only=True)
class ExampleGaussian(Mechanism):
    """The steps of one client in one round.

    Attributes:
        batch_size: expected examples of a step, which sums are divided by.
        steps: how many.
        clip_norm: C, an L2 bound on one example's gradient; where it adapts, its first value.
        clip: how an example is held to it: `flat`, `per_layer`, `quantile` or `automatic`.
        most: examples that a step takes; None: any number.
    """

    batch_size: float
    steps: int
    clip_norm: float
    clip: str = "flat"
    most: int | None = None

    def __post_init__(self) -> None:
        if (self.quantile is not None) is not (self.clip == "quantile"):
            raise ContractError(f"clip: {self.clip} and the quantile {self.quantile} do not go together")
        if self.adapts and not self.adapts.enough:
            raise SettingError(
                "privacy.clip",
                f"batches of {self.batch_size:.4g} are too small for a bound that adapts: at noise multiplier "
                f"{self.noise_multiplier:.3g} they take more than {10 * self.noise_multiplier:.0f}; leave it out",
            )
        if self.most is not None:
            self._fits(self.most)

    def _fits(self, most: int) -> None:
        """Refuse a limit that most draws are beyond, before anything is paid."""
        from scipy.stats import binom

        if binom.cdf(most, self.most_units, self.sample_rate) < _FITS:
            least = math.ceil(100 * binom.ppf(0.5, self.most_units, self.sample_rate) / self.batch_size) / 100
            raise SettingError(
                "clients.batch_limit",
                f"fewer than {_FITS:.0%} of the batches drawn here are so small: write {least:g} or more",
            )

    @property
    def most_units(self) -> int:
        """Examples, or persons, that a step tosses a coin for, at most."""
        return self.total

    def taken(self, coins: Stream, step: int = 0) -> "NDArray[np.bool_]":
        """Whom a step takes, (total,): coins are tossed until they take no more than `most`."""
        drawn = self.tossed(coins, step)
        while self.most is not None and drawn.sum() > self.most:
            drawn = self.tossed(coins, step)
        return drawn

    @property
    def expected(self) -> float:
        """The expected batch."""
        return self.batch_size

    def event(self, clip_norm: float | None = None) -> Event:
        """All steps; where the bound adapts, sum and count together."""
        return Event(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            clip_norm=self.clip_norm if clip_norm is None else clip_norm,
        )

    @property
    def purpose(self) -> str:
        """What the noise is drawn for.

        Noise of another size is another draw. Were it the same one scaled, a round that ran twice would show
        the sum without any noise.
        """
        return f"noise {self.noise_multiplier!r} {self.clip_norm!r}"

    def noise(self, draws: Callable[[str], Stream]) -> Any:
        """What the optimiser takes the noise of each step from, by `standard_normal`."""
        return draws(self.purpose)

    def optimizer(self, inner: "torch.optim.Optimizer", noise: Any) -> Any:
        """Opacus's optimiser around another: it clips each example, adds up, noises, and lets the other step.

        Args:
            inner: that moves the tensors by what comes out.
            noise: as `noise` gives it.
        """
        told = {"noise_multiplier": self.sum_noise, "expected_batch_size": self.batch_size}
        if self.adapts is not None:
            return _adaptive(inner, noise, self.adapts, max_grad_norm=self.clip_norm, **told)
        if self.clip == "automatic":
            return _automatic()(inner, noise, max_grad_norm=self.clip_norm, **told)
        if self.clip == "flat":
            return _noised("DPOptimizer")(inner, noise, max_grad_norm=self.clip_norm, **told)
        if self.clip != "per_layer":
            raise ContractError(f"there is no clipping {self.clip!r}")
        count = sum(len(group["params"]) for group in inner.param_groups)
        bounds = [self.clip_norm / math.sqrt(count)] * count
        return _noised("DPPerLayerOptimizer")(inner, noise, max_grad_norm=bounds, **told)


@cache
def _noised(name: str) -> Any:
    """One of Opacus's optimisers with noise from a stream, and not from a generator of torch."""
    import torch
    from opacus import optimizers
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class Noised(getattr(optimizers, name)):  # type: ignore[misc]
        limits: Sequence[float] = ()  # that the sums of each tensor are cut to, coordinate by coordinate

        def __init__(self, inner: torch.optim.Optimizer, noise: Any, **told: Any) -> None:
            super().__init__(inner, **told)
            self.noise = noise

        def add_noise(self) -> None:
            """Add N(0, (sigma C)^2) to each sum, in float64; what comes out is rounded to float32."""
            sizes = [p.numel() for p in self.params]
            drawn = torch.from_numpy(self.noise.standard_normal(sum(sizes)))
            drawn *= self.noise_multiplier * self.max_grad_norm
            parts = torch.split(drawn.to(self.params[0].device), sizes)
            for p, limit in zip(self.params, self.limits, strict=bool(self.limits)):
                p.summed_grad.clamp_(-limit, limit)
            for p, part in zip(self.params, parts, strict=True):
                _check_processed_flag(p.summed_grad)
                p.grad = (p.summed_grad.flatten() + part).to(p.dtype).view_as(p)
                _mark_as_processed(p.summed_grad)

    return Noised


def _adaptive(inner: "torch.optim.Optimizer", noise: Stream, moves: Quantile, **told: Any) -> Any:
    """An optimiser whose bound moves after each step.

    Not Opacus's own for this: it divides the count by how many examples a batch really has, which nobody may
    know, fails on an empty batch and forgets the count between micro-batches.
    """
    import torch

    class Adaptive(_noised("DPOptimizer")):  # type: ignore[misc]
        max_grad_norm: float
        count = 0.0  # of examples within the bound, in terms of +-1/2

        def clip_and_accumulate(self) -> None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in self.grad_samples], 1).norm(dim=1)
            self.count += float((norms <= self.max_grad_norm).sum()) - len(norms) / 2
            super().clip_and_accumulate()

        def add_noise(self) -> None:
            super().add_noise()
            count = self.count + float(self.noise.normal(0.0, moves.count_noise)[0])
            self.max_grad_norm = moves.moved(self.max_grad_norm, count)
            self.count = 0.0

    return Adaptive(inner, noise, **told)


@cache
def _automatic() -> Any:
    """An optimiser that brings every example to a norm just below C, instead of clipping those above it."""
    import torch
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class Automatic(_noised("DPOptimizer")):  # type: ignore[misc]
        def clip_and_accumulate(self) -> None:
            """Add `C g / (||g|| + STABLE)` of each example to the sum; one of no gradient adds nothing."""
            samples = self.grad_samples  # of each tensor (examples, *shape)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples], 1).norm(dim=1)  # (examples,)
            factors = self.max_grad_norm / (norms + STABLE)
            for p, sample in zip(self.params, samples, strict=True):
                _check_processed_flag(p.grad_sample)
                part = torch.einsum("i,i...", factors, sample.to(factors.dtype))
                p.summed_grad = part if p.summed_grad is None else p.summed_grad + part
                _mark_as_processed(p.grad_sample)

    return Automatic
