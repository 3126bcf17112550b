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
import logging
import math
import pkgutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins, returned
from fedlora.errors import SettingError, suggestion

Target = Literal["class", "many", "score", "marks"]
"""What metrics are of: one label of a row, any number of them, numbers, or a tag of each scored token."""

Function = Callable[[NDArray[np.float32], NDArray[Any], Sequence[str]], float]
"""Outputs, targets and the names of the labels (none for scores) to a number."""

KEY = "metrics"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation of some rows comes to.

    Attributes:
        sums: that `Task.figures` divides.
        outputs, targets: of each row, where metrics are of them; None elsewhere.
    """

    sums: Mapping[str, Any]
    outputs: NDArray[np.float32] | None = None
    targets: NDArray[Any] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of pieces of the rows one after another, in their order."""
        sums: dict[str, Any] = {}
        for part in parts:
            for key, value in part.sums.items():
                sums[key] = sums.get(key, 0.0) + value
        outputs = [part.outputs for part in parts if part.outputs is not None]
        targets = [part.targets for part in parts if part.targets is not None]
        if not parts or len(outputs) < len(parts) or len(targets) < len(parts):
            return cls(sums)
        return cls(sums, np.concatenate(outputs), np.concatenate(targets))

    def figures(
        self, told: Mapping[str, float], asked: Sequence["Metric"], labels: Sequence[str]
    ) -> dict[str, Any]:
        """Figures by name: those `told` of the sums, and then those that are asked for beside them."""
        figures = dict(returned.figures("the task's figures", told))
        if self.outputs is None or self.targets is None:
            return figures
        more = [metric for metric in asked if metric.name not in told]
        return {**figures, **{metric.name: metric.of(self.outputs, self.targets, labels) for metric in more}}


class Undefined(ValueError):
    """Raised by a metric that says nothing of the rows at hand, such as an AUROC of rows of one class."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure by its name.

    Attributes:
        name: under which it is reported.
        function: that computes it; it may raise `Undefined`.
        takes: the target of the tasks that can have it; None: any, as custom functions say themselves.
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
        if not len(targets) or not np.isfinite(outputs).all():
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a library warns of is in the number, or makes it none
                value = float(self.function(outputs, targets, labels))
        except Undefined:
            return None
        except Exception as error:
            if self.takes is not None:
                raise
            logger.warning("the metric %s fails: %s", self.name, type(error).__name__)  # its words may hold rows
            return None
        return value if math.isfinite(value) else None


@cache
def known(target: str) -> Mapping[str, Metric]:
    """The built-in metrics for a target, by name."""
    found: dict[str, Metric] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in ("contract", "confusion", "written"):
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
    if wrong := problem(use, target):
        raise SettingError(KEY, wrong)
    if ":" not in use:
        return known(target)[use]
    path, _, name = use.partition(":")
    if not callable(function := getattr(module := plugins.module(KEY, path), name, None)):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SettingError(KEY, f"module {path!r} has no function {name!r}: {suggestion(name, functions)}")
    higher = bool(getattr(function, "higher_is_better", True))
    return Metric(name=name, function=function, takes=None, higher_is_better=higher)


def find_all(uses: Sequence[str], target: str) -> list[Metric]:
    """The metrics that a scenario names, in its order.

    Raises:
        SettingError: as `find`, or two have one name.
    """
    found = [find(use, target) for use in uses]
    names = [metric.name for metric in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SettingError(KEY, f"{twice!r} is named twice: name each once")
    return found


def problem(use: str, target: str) -> str | None:
    """What is wrong with a name, and what to write instead; None if nothing is. Imports no custom module."""
    held = known(target)
    if ":" in use:
        path, _, name = use.partition(":")
        if not all(part.isidentifier() for part in (*path.split("."), name)):
            return f"{use!r} should read 'package.module:function'"
        if name in TAKEN or any(name in known(other) for other in TARGETS):
            return f"{use!r}: another figure is called {name}: call the function something else"
        return None if target in TARGETS else f"{use!r} {_NONE}"
    if use in held:
        return None
    if target not in TARGETS:
        return f"{use!r} {_NONE}"
    own = "'module:function' for one of your own"
    if others := [TARGETS[other] for other in TARGETS if use in known(other)]:
        return f"{use!r} is for {' and '.join(others)}, not {TARGETS[target]}: known: {', '.join(held)}; or {own}"
    return f"unknown metric {use!r}: {suggestion(use, held)}; or {own}"


def try_out(metric: Metric, target: str, labels: Sequence[str]) -> None:
    """Compute a custom metric of made-up rows, so that what is wrong with it shows before a run.

    Raises:
        SettingError: it fails, or gives no finite number.
    """
    width = max(len(labels), 2 if target in ("class", "marks") else 1)
    right = np.arange(4 * width)[:, None] % width == np.arange(width)  # (rows, width)
    often = np.roll(right, 1, axis=0)
    outputs = ((1 + often) / (1 + width)).astype(np.float32)  # of each row they sum to 1
    targets = {"many": right.astype(np.uint8), "score": right.astype(np.float32)}.get(target, right.argmax(-1))
    try:
        made = returned.plain(metric.function(outputs, targets, labels))
        if not isinstance(made, int | float):
            shown = "None" if made is None else f"a {type(made).__name__}"
            raise SettingError(KEY, f"{metric.name} returned {shown} for made-up rows; return a number")
        value = float(made)
    except (Undefined, SettingError) as error:
        if isinstance(error, SettingError):
            raise
        return
    except Exception as error:  # somebody's own code
        what = str(error).splitlines()[0] if str(error) else "no more is said"
        raise SettingError(KEY, f"{metric.name} fails on made-up rows: {type(error).__name__}: {what}") from error
    if not math.isfinite(value):
        raise SettingError(KEY, f"{metric.name} gives {value} for made-up rows, and should a finite number")


TARGETS: Mapping[str, str] = {
    "class": "rows of one label",
    "many": "rows of several labels",
    "score": "scores",
    "marks": "tags of tokens",
}
TAKEN = frozenset(
    "round clients failures loss train_loss bytes_up bytes_down epsilon late virtual_seconds seconds phases "
    "client num_examples steps error exact_match rouge_l perplexity confusion resting aggregation_error "
    "left_out singular_values_left effective_rank noise_to_signal nuclear_norm layers metrics".split()
)
_NONE = "is of labels or scores, and this task has none: leave it out"
