"""Federated, differentially private low-rank fine-tuning of language models.

The names below are the public interface; they are loaded when first used, so that `import fedlora` is
quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.adapter import Adapter, Layout, Slot, Update, weighted_mean
    from fedlora.client import Client, Pass, Rng, Settings, Stepwise
    from fedlora.compressing import compress
    from fedlora.data.reading import Rows
    from fedlora.data.store import Encoded, Examples, Partition
    from fedlora.errors import FedloraError, UserError
    from fedlora.evaluating import evaluate
    from fedlora.exporting import export, generate, load_adapter, predict
    from fedlora.kinds.averages import aggregation_error
    from fedlora.kinds.contract import Kind, Part
    from fedlora.planning import plan
    from fedlora.privacy.accounting import Event
    from fedlora.reports.comparison import compare
    from fedlora.reports.single import report
    from fedlora.run import Run
    from fedlora.scenario import Scenario, load
    from fedlora.simulation import simulate
    from fedlora.strategy import Strategy
    from fedlora.tasks.contract import Task

__all__ = [
    "Adapter",
    "Client",
    "Encoded",
    "Event",
    "Examples",
    "FedloraError",
    "Kind",
    "Layout",
    "Part",
    "Partition",
    "Pass",
    "Rng",
    "Rows",
    "Run",
    "Scenario",
    "Settings",
    "Slot",
    "Stepwise",
    "Strategy",
    "Task",
    "Update",
    "UserError",
    "aggregation_error",
    "compare",
    "compress",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_adapter",
    "plan",
    "predict",
    "report",
    "simulate",
    "weighted_mean",
]

_HOME = {
    "Adapter": "adapter",
    "Client": "client",
    "Encoded": "data.store",
    "Event": "privacy.accounting",
    "Examples": "data.store",
    "FedloraError": "errors",
    "Kind": "kinds.contract",
    "Layout": "adapter",
    "Part": "kinds.contract",
    "Partition": "data.store",
    "Pass": "client",
    "Rng": "client",
    "Rows": "data.reading",
    "Run": "run",
    "Scenario": "scenario",
    "Settings": "client",
    "Slot": "adapter",
    "Stepwise": "client",
    "Strategy": "strategy",
    "Task": "tasks.contract",
    "Update": "adapter",
    "UserError": "errors",
    "aggregation_error": "kinds.averages",
    "compare": "reports.comparison",
    "compress": "compressing",
    "evaluate": "evaluating",
    "export": "exporting",
    "generate": "exporting",
    "load": "scenario",
    "load_adapter": "exporting",
    "plan": "planning",
    "predict": "exporting",
    "report": "reports.single",
    "simulate": "simulation",
    "weighted_mean": "adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(import_module(f"fedlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
