"""Metrics of rows that have one label each, from the probability of every label.

scikit-learn's where it has them. A label that no row has, or that all have, says nothing about ranks: `auroc` and
`auprc` are means over the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.metrics.contract import Metric, Undefined

_BINS = 15  # of confidence, as Guo et al. take them

Outputs = NDArray[np.float32]
Targets = NDArray[np.int64]


def accuracy(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The share of rows whose likeliest label is right."""
    return float(np.mean(outputs.argmax(-1) == targets))


def balanced_accuracy(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The mean over labels of the share of their rows that are found."""
    from sklearn.metrics import balanced_accuracy_score

    return float(balanced_accuracy_score(targets, outputs.argmax(-1)))


def mcc(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Matthews' correlation coefficient."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(targets, outputs.argmax(-1)))


def cohen_kappa(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Agreement beyond chance (Cohen, 1960)."""
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(targets, outputs.argmax(-1)))


def log_loss(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The mean of minus the logarithm of the right label's probability."""
    from sklearn.metrics import log_loss as of

    return float(of(targets, outputs, labels=np.arange(outputs.shape[1])))


def auroc(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The area under the ROC curve; of more than two labels the mean over them of each against the rest."""
    from sklearn.metrics import roc_auc_score

    return _ranked(roc_auc_score, outputs, targets)


def auprc(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Average precision, of two labels that of the second; of more the mean over them of each against the rest."""
    from sklearn.metrics import average_precision_score

    return _ranked(average_precision_score, outputs, targets)


def brier(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """The mean squared error of probabilities (Brier, 1950).

    Of two labels `mean (p - y)^2` over the second's, in [0, 1]; of more the sum over labels, in [0, 2].
    """
    wrong = outputs.astype(np.float64)
    wrong[np.arange(len(targets)), targets] -= 1
    each = (wrong**2).sum(-1)
    return float(np.mean(each) / (2 if outputs.shape[1] == 2 else 1))


def ece(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
    """Expected calibration error (Guo et al., 2017, https://arxiv.org/abs/1706.04599), in fifteen equal bins.

    `sum_b n_b / n |accuracy of b - mean confidence of b|`, where a row of confidence c, the probability of its
    likeliest label, is in the bin that holds (k / 15, (k + 1) / 15].
    """
    confidence = outputs.max(-1).astype(np.float64)
    right = (outputs.argmax(-1) == targets).astype(np.float64)
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence, _BINS)).sum() / len(targets))


def _ranked(of: Callable[..., float], outputs: Outputs, targets: Targets) -> float:
    """A figure of the ranks of rows by a label's probability: of the second of two, or the mean over labels."""
    which = [1] if outputs.shape[1] == 2 else range(outputs.shape[1])
    told = [k for k in which if 0 < np.count_nonzero(targets == k) < len(targets)]
    if not told:
        raise Undefined("all rows have one label")
    return float(np.mean([of(targets == k, outputs[:, k]) for k in told]))


def _f1(average: str) -> Callable[..., float]:
    def f1(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(targets, outputs.argmax(-1), average=average, zero_division=0))

    return f1


def _top(k: int) -> Callable[..., float]:
    def top(outputs: Outputs, targets: Targets, labels: Sequence[str]) -> float:
        from sklearn.metrics import top_k_accuracy_score

        if outputs.shape[1] <= k:
            return 1.0
        return float(top_k_accuracy_score(targets, outputs, k=k, labels=np.arange(outputs.shape[1])))

    return top


def _share(name: str, function: Callable[..., Any]) -> Metric:
    return Metric(name=name, function=function, takes="class", bounds=(0.0, 1.0))


METRICS: tuple[Metric, ...] = (
    _share("accuracy", accuracy),
    _share("auprc", auprc),
    _share("auroc", auroc),
    _share("balanced_accuracy", balanced_accuracy),
    Metric(name="brier", function=brier, takes="class", higher_is_better=False, bounds=(0.0, 2.0)),
    Metric(name="cohen_kappa", function=cohen_kappa, takes="class", bounds=(-1.0, 1.0)),
    Metric(name="ece", function=ece, takes="class", higher_is_better=False, bounds=(0.0, 1.0)),
    Metric(name="log_loss", function=log_loss, takes="class", higher_is_better=False, bounds=(0.0, float("inf"))),
    _share("macro_f1", _f1("macro")),
    Metric(name="mcc", function=mcc, takes="class", bounds=(-1.0, 1.0)),
    _share("micro_f1", _f1("micro")),
    _share("top3_accuracy", _top(3)),
    _share("top5_accuracy", _top(5)),
    _share("weighted_f1", _f1("weighted")),
)
