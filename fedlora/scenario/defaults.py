"""Defaults that depend on other keys, filled in before a scenario is checked: its resolved form has them."""

from collections.abc import Mapping
from typing import Any

from fedlora.scenario.data import COLUMNS_OF

_SGD, _ADAM = 0.5, 0.002  # without privacy
_CLIPPED, _NOISED_ADAM = 2.0, 0.01  # a clipped gradient is at most clip_norm long; Adam's steps are noisier


def completed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's keys with what follows from others; what is not a mapping is left for the checks."""
    made = dict(raw)
    clients, privacy = raw.get("clients"), raw.get("privacy")
    if isinstance(clients, Mapping):
        told = dict(clients)
        example = _example(privacy)
        told.setdefault("use", "dp_sgd" if example is not None else "sgd")
        if "strategy" not in raw:
            told.setdefault("local_steps", 1)  # whose server steps after each
        told.setdefault("lr", _rate(told, example))
        made["clients"] = told
    if raw.get("task") == "preference":
        made.setdefault("preference", {})
    data, columns = raw.get("data"), COLUMNS_OF.get(str(raw.get("task")))
    if isinstance(data, Mapping) and columns:
        made["data"] = {
            key: {**columns, **held} if key in ("hub", "files") and isinstance(held, Mapping) else held
            for key, held in data.items()
        }
    return made


def _example(privacy: object) -> Mapping[str, Any] | None:
    """The guarantee for each example, as it is written; None where there is none."""
    if not isinstance(privacy, Mapping):
        return None
    if privacy.get("unit", "example") == "example":
        return privacy
    example = privacy.get("example")
    return example if isinstance(example, Mapping) else None


def _rate(clients: Mapping[str, Any], example: Mapping[str, Any] | None) -> float:
    """A learning rate by what the client steps with, and by whether its gradients are clipped."""
    optimizer = clients.get("optimizer")
    kind = optimizer.get("kind") if isinstance(optimizer, Mapping) else optimizer
    adaptive = isinstance(kind, str) and "adam" in kind.lower()
    if example is None:
        return _ADAM if adaptive else _SGD
    if adaptive:
        return _NOISED_ADAM
    try:
        bound = float(example.get("clip_norm", 1.0))  # YAML reads 1e-3 as a word
    except (TypeError, ValueError, OverflowError):
        return _CLIPPED  # the checks tell
    return _CLIPPED / bound if 1e-9 <= bound <= 1e9 else _CLIPPED
