"""Metrics of rows that have scores, in the scores' own units; of several scores the mean over them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.metrics.contract import Metric, Undefined

Outputs = NDArray[np.float32]
Targets = NDArray[np.float32]


def mae(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Mean absolute error."""
    return float(np.abs(outputs.astype(np.float64) - targets).mean())


def rmse(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The root of the mean squared error."""
    return float(np.sqrt(np.square(outputs.astype(np.float64) - targets).mean(axis=0)).mean())


def r2(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The share of the scores' variance that is explained."""
    from sklearn.metrics import r2_score

    _varies(targets)
    return float(r2_score(targets.astype(np.float64), outputs.astype(np.float64)))


def pearson(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Correlation."""
    _varies(targets)
    _varies(outputs)
    pairs = zip(outputs.astype(np.float64).T, targets.astype(np.float64).T, strict=True)
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]))


def spearman(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Correlation of ranks, equal ones sharing theirs."""
    from scipy.stats import rankdata

    return pearson(rankdata(outputs, axis=0), rankdata(targets, axis=0), labels)


def _varies(scores: NDArray[Any]) -> None:
    if not np.ptp(scores, axis=0).all():
        raise Undefined("all rows have the same score")


def _error(name: str, function: Callable[..., Any]) -> Metric:
    return Metric(name=name, function=function, takes="score", higher_is_better=False, bounds=(0.0, np.inf))


METRICS: tuple[Metric, ...] = (
    _error("mae", mae),
    Metric(name="pearson", function=pearson, takes="score", bounds=(-1.0, 1.0)),
    Metric(name="r2", function=r2, takes="score", bounds=(-np.inf, 1.0)),
    _error("rmse", rmse),
    Metric(name="spearman", function=spearman, takes="score", bounds=(-1.0, 1.0)),
)
