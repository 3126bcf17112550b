"""DP-SGD (Abadi et al., 2016, https://arxiv.org/abs/1607.00133) on one client's examples.

Each step takes every example with probability `q = batch_size / n`, and with `g_i` the gradient of example i over
all trained tensors together gives

    (sum_i g_i * min(1, C / ||g_i||) + N(0, (sigma C)^2 I)) / batch_size

The batch may be empty: the noise is added all the same. Clipping and sums are Opacus's; noise is of a `Stream`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fedlora.errors import SettingError
from fedlora.privacy.accounting import Event, Quantile
from fedlora.privacy.mechanisms.contract import Mechanism
from fedlora.privacy.noise import Stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ExampleGaussian(Mechanism):
    """The steps of one client in one round.

    Attributes:
        batch_size: expected examples of a step, which sums are divided by.
        steps: how many.
        clip_norm: C, an L2 bound on one example's gradient; where it adapts, its first value.
        per_layer: clip the gradient of each of the L trained tensors by itself, to C / sqrt(L): together they stay
            within C.
    """

    batch_size: int
    steps: int
    clip_norm: float
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.adapts and not self.adapts.enough:
            raise SettingError(
                "clients.quantile",
                f"batches of {self.batch_size} are too small for a bound that adapts: at noise multiplier "
                f"{self.noise_multiplier:.3g} they take more than {10 * self.noise_multiplier:.0f}; leave it out",
            )

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

    def optimizer(self, inner: "torch.optim.Optimizer", noise: Stream) -> Any:
        """Opacus's optimiser around another: it clips each example, adds up, noises, and lets the other step.

        Args:
            inner: that moves the tensors by what comes out.
            noise: of `purpose`.
        """
        told = {"noise_multiplier": self.sum_noise, "expected_batch_size": self.batch_size}
        if self.adapts is not None:
            return _adaptive(inner, noise, self.adapts, max_grad_norm=self.clip_norm, **told)
        if not self.per_layer:
            return _noised("DPOptimizer")(inner, noise, max_grad_norm=self.clip_norm, **told)
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
        def __init__(self, inner: torch.optim.Optimizer, noise: Stream, **told: Any) -> None:
            super().__init__(inner, **told)
            self.noise = noise

        def add_noise(self) -> None:
            """Add N(0, (sigma C)^2) to each sum, in float64; what comes out is rounded to float32."""
            sizes = [p.numel() for p in self.params]
            drawn = torch.from_numpy(self.noise.standard_normal(sum(sizes)))
            drawn *= self.noise_multiplier * self.max_grad_norm
            parts = torch.split(drawn.to(self.params[0].device), sizes)
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
