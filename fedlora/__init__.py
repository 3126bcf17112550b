"""Federated, differentially private low-rank fine-tuning of language models.

The names below are the public interface; they are loaded when first used, so that `import fedlora` is
quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.adapter import Adapter, Layout, Slot, Update, weighted_mean
    from fedlora.client import Client, Rng, Settings
    from fedlora.errors import FedloraError, UserError
    from fedlora.kinds.averages import aggregation_error
    from fedlora.privacy.accounting import Event
    from fedlora.run import Run
    from fedlora.scenario import Scenario, load
    from fedlora.simulation import simulate
    from fedlora.strategy import Strategy

__all__ = [
    "Adapter",
    "Client",
    "Event",
    "FedloraError",
    "Layout",
    "Rng",
    "Run",
    "Scenario",
    "Settings",
    "Slot",
    "Strategy",
    "Update",
    "UserError",
    "aggregation_error",
    "load",
    "simulate",
    "weighted_mean",
]

_HOME = {
    "Adapter": "adapter",
    "Layout": "adapter",
    "Slot": "adapter",
    "Update": "adapter",
    "aggregation_error": "adapter",
    "weighted_mean": "adapter",
    "Client": "client",
    "Rng": "client",
    "Settings": "client",
    "FedloraError": "errors",
    "UserError": "errors",
    "Event": "privacy.accounting",
    "Scenario": "scenario",
    "load": "scenario",
    "Run": "run",
    "simulate": "simulation",
    "Strategy": "strategy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(import_module(f"fedlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
