"""Weights of labels in the loss, by public counts: `loss.class_weights`.

`balanced` gives label k of K the weight `n / (K n_k)`, of n test rows of which n_k have it. The server's own rows
are public to a run; what clients hold is private, and their counts would have to be paid for.
"""

from collections.abc import Sequence
from typing import Any

from fedlora.data.store import Dataset, label_counts
from fedlora.errors import SettingError, cut, suggestion
from fedlora.scenario import Scenario

_KEY = "loss.class_weights"


def resolved(scenario: Scenario, data: Dataset) -> Scenario:
    """The scenario with `balanced` written out.

    Raises:
        SettingError: there are no test rows of a label here, or a name is of no label.
    """
    if (asked := scenario.loss) is None or asked.class_weights is None:
        return scenario
    if isinstance(asked.class_weights, dict):
        if strange := sorted(set(asked.class_weights) - set(data.labels)):
            raise SettingError(
                _KEY, f"no label is called {cut(strange[0])!r}: {suggestion(strange[0], data.labels)}"
            )
        return scenario
    if not len(data.test):
        raise SettingError(_KEY, "balanced counts test rows, which sites do not see: write weights, as {rare: 5}")
    counts = label_counts(data.test.targets).tolist()
    counts += [0] * (len(data.labels) - len(counts))
    if 0 in counts:
        name = data.labels[counts.index(0)]
        raise SettingError(_KEY, f"no test row has the label {cut(name)!r}: write weights, as {{rare: 5}}")
    found = {name: sum(counts) / len(counts) / count for name, count in zip(data.labels, counts, strict=True)}
    return scenario.model_copy(update={"loss": asked.model_copy(update={"class_weights": found})})


def weigh(task: Any, scenario: Scenario, labels: Sequence[str]) -> None:
    """Give a task that classifies the weights of its examples."""
    if (asked := scenario.loss) is None:
        return
    told = asked.class_weights if isinstance(asked.class_weights, dict) else None
    each = None if told is None else [float(told.get(name, 1.0)) for name in labels]
    task.weigh(each, asked.label_smoothing)
