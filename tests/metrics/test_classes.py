"""Figures of rows with one label each: scikit-learn's, and numbers worked by hand."""

import inspect

import numpy as np
import pytest
from sklearn import metrics as sk

from fedlora.metrics import classes, confusion, contract

KNOWN = contract.known("class")


def case(rng, least=2):
    """Probabilities and labels of random rows, each label among them, and ties where a draw is coarse."""
    width, rows = int(rng.integers(least, 7)), int(rng.integers(8, 40))
    logits = rng.normal(size=(rows, width)).round(int(rng.integers(0, 3)))
    outputs = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    return outputs, rng.permutation(np.arange(rows) % width)


def one_hot(y, width):
    return (y[:, None] == np.arange(width)).astype(int)


def ovr(of, p, y):
    """Of two labels that of the second, else the mean over them."""
    return of(y, p[:, 1]) if p.shape[1] == 2 else np.mean([of(y == k, p[:, k]) for k in range(p.shape[1])])


def brier(p, y):
    if "scale_by_half" in inspect.signature(sk.brier_score_loss).parameters:
        return sk.brier_score_loss(y, p if p.shape[1] > 2 else p[:, 1], labels=np.arange(p.shape[1]))
    return ((p - one_hot(y, p.shape[1])) ** 2).sum(-1).mean() / (2 if p.shape[1] == 2 else 1)


def top(p, y, k):
    return 1.0 if p.shape[1] <= k else sk.top_k_accuracy_score(y, p, k=k, labels=np.arange(p.shape[1]))


THEIRS = {
    "accuracy": lambda p, y: sk.accuracy_score(y, p.argmax(-1)),
    "auprc": lambda p, y: ovr(sk.average_precision_score, p, y),
    "auroc": lambda p, y: sk.roc_auc_score(y, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"),
    "balanced_accuracy": lambda p, y: sk.balanced_accuracy_score(y, p.argmax(-1)),
    "brier": brier,
    "cohen_kappa": lambda p, y: sk.cohen_kappa_score(y, p.argmax(-1)),
    "log_loss": lambda p, y: sk.log_loss(y, p, labels=np.arange(p.shape[1])),
    "macro_f1": lambda p, y: sk.f1_score(y, p.argmax(-1), average="macro"),
    "mcc": lambda p, y: sk.matthews_corrcoef(y, p.argmax(-1)),
    "micro_f1": lambda p, y: sk.f1_score(y, p.argmax(-1), average="micro"),
    "weighted_f1": lambda p, y: sk.f1_score(y, p.argmax(-1), average="weighted"),
    "top3_accuracy": lambda p, y: top(p, y, 3),
    "top5_accuracy": lambda p, y: top(p, y, 5),
}


def test_each_has_a_number_to_be_held_to():
    assert set(KNOWN) == {*THEIRS, "ece"}


@pytest.mark.parametrize("cases", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", THEIRS)
def test_a_figure_is_scikit_learns_on_random_cases(name, cases):
    rng, (low, high) = np.random.default_rng(7), KNOWN[name].bounds
    for _ in range(cases):
        outputs, targets = case(rng)
        found = KNOWN[name].of(outputs, targets)
        assert found == pytest.approx(THEIRS[name](outputs, targets), abs=1e-6) and low <= found <= high


def test_calibration_error_by_hand():
    """Confidences 0.9, 0.9 and 0.6: one of the first two is right, the last one is.

    The bin (13/15, 14/15] holds two rows, |0.5 - 0.9| = 0.4; the bin (8/15, 9/15] one, |1 - 0.6| = 0.4.
    """
    outputs = np.float32([[0.9, 0.1], [0.1, 0.9], [0.4, 0.6]])
    assert KNOWN["ece"].of(outputs, np.array([0, 0, 1])) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4, abs=1e-6)
    sure = np.float32([[1, 0], [0, 1]])
    assert KNOWN["ece"].of(sure, np.array([0, 1])) == 0.0 and KNOWN["ece"].of(sure, np.array([1, 0])) == 1.0


def test_the_same_rows_in_one_bin_cancel_and_in_two_do_not():
    """0.70 right and 0.71 wrong share (10/15, 11/15]: |(1 - 0.70) + (0 - 0.71)| / 2; 0.65 would not."""
    rows = np.float32([[0.70, 0.30], [0.71, 0.29]])
    assert KNOWN["ece"].of(rows, np.array([0, 1])) == pytest.approx(0.41 / 2, abs=1e-6)
    rows = np.float32([[0.65, 0.35], [0.71, 0.29]])
    assert KNOWN["ece"].of(rows, np.array([0, 1])) == pytest.approx((0.35 + 0.71) / 2, abs=1e-6)


def test_brier_by_hand():
    """Of two labels (0.3^2 + 0.8^2) / 2; of three the sum over labels."""
    two = np.float32([[0.7, 0.3], [0.2, 0.8]])
    assert KNOWN["brier"].of(two, np.array([0, 0])) == pytest.approx((0.09 + 0.64) / 2, abs=1e-6)
    three = np.float32([[0.5, 0.3, 0.2]])
    assert KNOWN["brier"].of(three, np.array([1])) == pytest.approx(0.25 + 0.49 + 0.04, abs=1e-6)


def test_what_rows_of_one_label_do_not_say_is_none():
    outputs, targets = np.float32([[0.9, 0.1], [0.8, 0.2]]), np.zeros(2, int)
    told = {name: metric.of(outputs, targets) for name, metric in KNOWN.items()}
    assert {name for name, value in told.items() if value is None} == {"auroc", "auprc", "cohen_kappa"}
    assert told["accuracy"] == 1.0


def test_ranks_are_over_the_labels_that_have_rows():
    """No row has the third label: the mean is over the other two."""
    outputs = np.float32([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.55, 0.4, 0.05]])
    targets = np.array([0, 1, 1])
    first, second = (sk.roc_auc_score(targets == k, outputs[:, k]) for k in (0, 1))
    assert KNOWN["auroc"].of(outputs, targets) == pytest.approx((first + second) / 2)


def test_no_rows_and_what_is_no_number_are_none():
    for metric in KNOWN.values():
        assert metric.of(np.zeros((0, 2), np.float32), np.zeros(0, int)) is None
        assert metric.of(np.float32([[np.nan, 1.0], [0.5, 0.5]]), np.array([0, 1])) is None


def test_confusion_and_the_figures_of_each_label_by_hand():
    """Of three rows of a, two are found and one is taken for b; the one of b is found; c has no row."""
    outputs = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    found = contract.Evaluation({}, outputs, np.array([0, 0, 0, 1]))
    counts = confusion.confusion(found, 3)
    assert counts == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    a, b, c = confusion.by_label(("a", "b", "c"), counts)
    assert a == {"label": "a", "precision": 1.0, "recall": 2 / 3, "f1": 0.8, "rows": 3}
    assert b == {"label": "b", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "rows": 1}
    assert c == {"label": "c", "precision": None, "recall": None, "f1": None, "rows": 0}
    assert confusion.tells("class", ["x"] * 200) and not confusion.tells("class", ["x"] * 201)
    assert not confusion.tells("score", ["x", "y"])


def test_each_file_of_metrics_says_what_its_own_are_of():
    assert all(metric.takes == "class" for metric in classes.METRICS)
    assert all(metric.function.__doc__ or "f1" in name or "top" in name for name, metric in KNOWN.items())
