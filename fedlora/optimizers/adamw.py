"""AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) that knows of noise in its gradients.

With g the gradient that holds noise of variance s (DP-AdamBC: Tang et al., 2024, https://arxiv.org/abs/2312.14334)

    m <- b1 m + (1 - b1) g                  m' = m / (1 - b1^t)
    v <- b2 v + (1 - b2) g^2                v' = v / (1 - b2^t)
    n <- b2 n + (1 - b2) s                  n' = n / (1 - b2^t), which is s where s is the same in every step
    w <- (1 - lr decay) w - lr m' / (sqrt(max(v' - n', floor n')) + eps)

The noise adds n' to the expectation of v', so that without the correction the step is that of SGD over the size of
the noise. The paper's floor is an absolute number; here it is a share of n', so that it fits noise of any size.
Without noise it is plain AdamW.

A second moment may begin at a mean over others', V without noise, with the weight c of gradients in it (`begin`;
`fedlora.optimizers.averaged`): then v begins at `V + c s` and n at `c s`, so that the floor is that of this
client's own noise, and `1 - b2^t` is `1 - (1 - c) b2^t`.
"""

from collections.abc import Callable
from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """AdamW, the noise's variance taken out of the second moment where there is noise."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        correct_noise: bool = True,
        floor: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.correct_noise, self.floor = correct_noise, floor
        self.variance: dict[torch.Tensor, torch.Tensor | float] = {}
        self._begun: dict[torch.Tensor, tuple[float, float]] = {}

    def expect(self, parameter: torch.Tensor, variance: torch.Tensor | float) -> None:
        """The next step's gradient of a parameter holds noise of this variance, for each number or for all."""
        self.variance[parameter] = variance

    def begin(self, parameter: torch.Tensor, second: float, weight: float) -> None:
        """Let a parameter's second moment begin at a mean over others'.

        Args:
            parameter: that has not stepped yet.
            second: their mean, before its bias is corrected, without noise.
            weight: of gradients in it.
        """
        self._begun[parameter] = (second, weight)

    def mean(self, parameter: torch.Tensor) -> tuple[float, float]:
        """What `begin` takes, of a parameter as it is: the mean over its numbers without noise, or the floor."""
        if not (state := self.state.get(parameter)):
            return self._begun.get(parameter, (0.0, 0.0))
        second = float(state["exp_avg_sq"].mean())
        if "noise" in state:
            noise = float(state["noise"].mean())
            second = max(second - noise, self.floor * noise)
        return second, self._weight(parameter, self.defaults["betas"][1])

    def _weight(self, parameter: torch.Tensor, b2: float) -> float:
        """Of gradients in the second moment of a parameter that has stepped."""
        begun: float = 1 - self._begun.get(parameter, (0.0, 0.0))[1]
        return 1 - begun * b2 ** int(self.state[parameter]["step"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients that there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[parameter], group["betas"]
        variance: torch.Tensor | None = None
        if self.correct_noise and parameter in self.variance:
            variance = torch.as_tensor(self.variance[parameter], dtype=parameter.dtype, device=parameter.device)
        if not state:
            begun, of = self._begun.get(parameter, (0.0, 0.0))
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.full_like(parameter, begun)
            if variance is not None:
                state["noise"] = variance * of
                state["exp_avg_sq"] += state["noise"]
        state["step"] += 1
        weight = self._weight(parameter, b2)
        state["exp_avg"].lerp_(gradient, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        second = state["exp_avg_sq"] / weight
        if variance is not None:
            before = state.get("noise", torch.zeros_like(variance))
            state["noise"] = before * b2 + variance * (1 - b2)
            known = state["noise"] / weight
            second = torch.maximum(second - known, self.floor * known)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(
            state["exp_avg"], second.sqrt().add_(group["eps"]), value=-group["lr"] / (1 - b1 ** int(state["step"]))
        )
