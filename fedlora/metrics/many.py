"""Metrics of rows that have any number of labels, from the probability of each label by itself.

scikit-learn's where it has them. A label that no row has, or that all have, says nothing about ranks: `auroc` and
`auprc` are means over the others. What needs a threshold takes 0.5, where the task does not set its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.metrics.contract import Metric, Undefined

_HALF, _TOP = 0.5, 5

Outputs = NDArray[np.float32]
Targets = NDArray[np.uint8]


def subset_accuracy(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The share of rows that are given their labels and no others."""
    return float(np.mean(np.all((outputs >= _HALF) == (targets > 0), axis=1)))


def precision_at_5(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The share of right labels among the five likeliest of each row."""
    if outputs.shape[1] <= _TOP:
        raise Undefined("five labels or fewer")
    likeliest = np.argsort(-outputs, axis=1, kind="stable")[:, :_TOP]
    return float(np.take_along_axis(targets, likeliest, axis=1).mean())


def lrap(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Label ranking average precision: the mean over a row's labels of the share of right ones down to it."""
    from sklearn.metrics import label_ranking_average_precision_score

    return float(label_ranking_average_precision_score(targets, outputs))


def _ranked(name: str, average: str) -> Callable[..., float]:
    def ranked(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
        from sklearn import metrics

        had = targets.sum(axis=0, dtype=np.int64)
        told = (had > 0) & (had < len(targets)) if average == "macro" else np.ones(len(had), bool)
        if not told.any() or targets.min() == targets.max():
            raise Undefined("all rows have the same labels")
        return float(getattr(metrics, name)(targets[:, told], outputs[:, told], average=average))

    return ranked


def _f1(average: str) -> Callable[..., float]:
    def f1(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(targets, outputs >= _HALF, average=average, zero_division=0))

    return f1


def _share(name: str, function: Callable[..., Any]) -> Metric:
    return Metric(name=name, function=function, takes="many", bounds=(0.0, 1.0))


METRICS: tuple[Metric, ...] = (
    _share("auprc", _ranked("average_precision_score", "macro")),
    _share("auroc", _ranked("roc_auc_score", "macro")),
    _share("lrap", lrap),
    _share("macro_f1", _f1("macro")),
    _share("micro_auprc", _ranked("average_precision_score", "micro")),
    _share("micro_auroc", _ranked("roc_auc_score", "micro")),
    _share("micro_f1", _f1("micro")),
    _share("precision_at_5", precision_at_5),
    _share("samples_f1", _f1("samples")),
    _share("subset_accuracy", subset_accuracy),
    _share("weighted_f1", _f1("weighted")),
)
