"""The contract of a metric: one number, of what a model makes of some rows and of what is right of them.

What rows hold and what a model makes of them is by the task's target (`fedlora.Task.target`):

| target | `outputs`, float32 | `targets` |
|---|---|---|
| `class` | (rows, labels), the probability of each label | (rows,), the number of the right one |
| `many` | (rows, labels), the probability that a label is right, each by itself | (rows, labels), 0 or 1 |
| `score` | (rows, scores) | (rows, scores) |
| `marks` | (scored tokens, tags), the probability of each tag | (scored tokens,), the number of the right one |

A metric is found by its name among those for the task's target: each file of this folder has some, its `METRICS`.
So one name may stand for what is the same in words, such as `macro_f1`, and is computed in several ways. A metric
of one's own is `module:function`, `f(outputs, targets, labels) -> float`, with `higher_is_better = False` set on
the function where less is better.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora.errors import SettingError, suggestion

Target = Literal["class", "many", "score", "marks"]
"""What metrics are of: one label of a row, any number of them, numbers, or a tag of each scored token."""

Function = Callable[[NDArray[np.float32], NDArray[Any], Sequence[str]], float]
"""Outputs, targets and the names of the labels (none for scores) to a number."""

KEY = "metrics"


class Undefined(ValueError):
    """Raised by a metric that says nothing of the rows at hand, such as an AUROC of rows of one class."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure by its name.

    Attributes:
        name: under which it is told.
        function: that computes it; it may raise `Undefined`.
        takes: the target of the tasks that can have it; None: any, as one's own functions say themselves.
        higher_is_better: whether more of it is better.
        bounds: the least and the most that it can be.
    """

    name: str
    function: Function
    takes: Target | None
    higher_is_better: bool = True
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def of(self, outputs: NDArray[np.float32], targets: NDArray[Any], labels: Sequence[str] = ()) -> float | None:
        """The figure of some rows; None where it is undefined for them, or no finite number.

        Args:
            outputs: what the model makes of them, as the table above says.
            targets: what is right.
            labels: their names, in order.
        """
        try:
            value = float(self.function(outputs, targets, labels))
        except Undefined:
            return None
        return value if math.isfinite(value) else None


@cache
def known(target: str) -> Mapping[str, Metric]:
    """The built-in metrics for a target, by name."""
    found: dict[str, Metric] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "contract":
            held: Sequence[Metric] = importlib.import_module(f"fedlora.metrics.{module.name}").METRICS
            found |= {metric.name: metric for metric in held if metric.takes == target}
    return dict(sorted(found.items()))


def find(use: str, target: str) -> Metric:
    """The metric that a scenario names.

    Args:
        use: its name, or `module:function`.
        target: of the task.

    Raises:
        SettingError: there is none of that name for such a task, or nothing importable.
    """
    held = known(target)
    if ":" not in use:
        if use in held:
            return held[use]
        raise SettingError(KEY, _unknown(use, target))
    path, _, name = use.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), name)):
        raise SettingError(KEY, f"{use!r} should read 'package.module:function'")
    if not callable(function := getattr(module := plugins.module(KEY, path), name, None)):
        functions = [n for n, v in vars(module).items() if callable(v)]
        raise SettingError(KEY, f"module {path!r} has no function {name!r}: {suggestion(name, functions)}")
    higher = bool(getattr(function, "higher_is_better", True))
    return Metric(name=name, function=function, takes=None, higher_is_better=higher)


def _unknown(use: str, target: str) -> str:
    """What is wrong with a name, and what to write instead."""
    held = known(target)
    if not held:
        return f"{use!r} is of labels or scores, and the task has none: leave it out"
    others = [other for other in TARGETS if use in known(other)]
    if others:
        return f"{use!r} is for {' and '.join(TARGETS[t] for t in others)}: of this task are {', '.join(held)}"
    return f"unknown metric {use!r}: {suggestion(use, held)}; or 'module:function' for one of your own"


TARGETS: Mapping[Target, str] = {
    "class": "rows of one label",
    "many": "rows of several labels",
    "score": "scores",
    "marks": "tags of tokens",
}
