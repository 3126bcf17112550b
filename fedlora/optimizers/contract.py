"""The optimiser of a client: made in each round, with the scenario's learning rates and schedule.

Whatever it is, it sees gradients after clipping and noise: a function of what was paid for, it costs no epsilon.
Its state is a function of those too. With `state: kept` it stays where the client's personal tensors stay; with
`state: averaged` second moments begin at the mean of others' (`fedlora.optimizers.averaged`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedlora.adapter import Adapter, Layout
from fedlora.errors import ContractError, SettingError, suggestion

if TYPE_CHECKING:
    import torch

    from fedlora.optimizers.adamw import AdamW


class Told(Protocol):
    """What of a client's settings (`fedlora.Settings`) is about its steps."""

    @property
    def lr(self) -> float:
        """Learning rate in the first local step."""

    @property
    def lrs(self) -> Mapping[str, float]:
        """Learning rates by role; empty where all have `lr`."""

    @property
    def pace(self) -> tuple[float, ...]:
        """Learning rate of each local step, divided by that of the first; empty: constant."""

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """Its kind, options and state; empty: plain SGD."""

    @property
    def state(self) -> Adapter:
        """Of the optimiser, as the client kept it, or as the server averaged it."""


_NUMBER = "="  # before the name of a value of the state that is a plain number and no tensor


def build(parameters: Any, settings: Told) -> "torch.optim.Optimizer":
    """The optimiser that the settings name; plain SGD where they name none."""
    import torch

    told = {k: v for k, v in settings.optimizer.items() if k not in ("kind", "state")}
    if (kind := settings.optimizer.get("kind")) is None:
        return torch.optim.SGD(parameters, lr=settings.lr)
    made: torch.optim.Optimizer = find(kind)(parameters, lr=settings.lr, **told)
    return made


def find(kind: str) -> Any:
    """The class of a name: fedlora's own, or one of torch.optim in whatever case.

    Raises:
        SettingError: there is none.
    """
    import torch

    if kind == "adamw":
        from fedlora.optimizers.adamw import AdamW

        return AdamW
    bases = (torch.optim.Optimizer,)
    known = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, bases)}
    known.pop("optimizer", None)
    if (found := known.get(kind.lower())) is None:
        raise SettingError("clients.optimizer", f"torch.optim has no {kind!r}: {suggestion(kind.lower(), known)}")
    return found


def grouped(layout: Layout, names: Sequence[str], parameters: "Sequence[torch.Tensor]", settings: Told) -> Any:
    """Parameters as an optimiser of torch takes them: in a list, or in groups, one for each role."""
    if not settings.lrs:
        return list(parameters)
    roles: dict[str, list[torch.Tensor]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        roles.setdefault(layout[name].role, []).append(parameter)
    return [{"params": held, "lr": settings.lrs[role]} for role, held in roles.items()]


class Steps:
    """The local steps of one client in one round.

    Attributes:
        optimizer: that takes them.
    """

    def __init__(
        self,
        optimizer: "torch.optim.Optimizer",
        names: Sequence[str],
        parameters: "Sequence[torch.Tensor]",
        settings: Told,
    ) -> None:
        self.optimizer, self.settings = optimizer, settings
        self.parameters = dict(zip(names, parameters, strict=True))
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if self._averaging is not None:
            for name, (second, weight) in settings.state.items():
                self._averaging.begin(self.parameters[name], float(second), min(float(weight), 1.0))
        elif settings.state:
            _fill(optimizer, self.parameters, settings.state)

    def take(self, step: int, variances: "Mapping[str, torch.Tensor | float] | None" = None) -> None:
        """A step along the gradients that there are.

        Args:
            step: from 0.
            variances: of the noise in the gradient of each tensor, where there is any.
        """
        if self.settings.pace:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.settings.pace[step]
        if variances is not None and (expect := getattr(self.optimizer, "expect", None)) is not None:
            for name, variance in variances.items():
                expect(self.parameters[name], variance)
        self.optimizer.step()

    @property
    def _averaging(self) -> "AdamW | None":
        """The optimiser, where its second moments are averaged."""
        if self.settings.optimizer.get("state") != "averaged":
            return None
        from fedlora.optimizers.adamw import AdamW

        if not isinstance(self.optimizer, AdamW):
            raise ContractError(f"{type(self.optimizer).__name__} has no second moment that can be averaged")
        return self.optimizer

    def kept(self) -> Adapter:
        """The state, where it stays with the client, by tensor and name; where it is averaged, a row by tensor."""
        if self._averaging is not None:
            return {n: np.array(self._averaging.mean(p), np.float32) for n, p in self.parameters.items()}
        if self.settings.optimizer.get("state") != "kept":
            return {}
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if hasattr(value, "detach"):
                    found[f"{name}/{key}"] = value.detach().cpu().numpy().copy()
                elif isinstance(value, bool | int | float):
                    found[f"{name}/{_NUMBER}{key}"] = np.array(value)
                elif value is not None:
                    raise ContractError(f"{type(self.optimizer).__name__} holds {key!r}, which cannot be kept")
        return {**self.settings.state, **found}  # that of tensors that rested this round stays as it was


def _fill(
    optimizer: "torch.optim.Optimizer", parameters: "Mapping[str, torch.Tensor]", state: Mapping[str, Any]
) -> None:
    """Give an optimiser its state back."""
    import torch

    for place, value in state.items():
        name, _, key = place.rpartition("/")
        if (parameter := parameters.get(name)) is None:
            continue
        number = key.startswith(_NUMBER)
        held = value.item() if number else torch.from_numpy(np.array(value))
        if not number and value.shape:
            held = held.to(parameter.device)
        optimizer.state[parameter][key.removeprefix(_NUMBER)] = held
