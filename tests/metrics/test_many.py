"""Metrics of rows of several labels, by hand."""

import numpy as np
import pytest

from fedlora.metrics.contract import known

OUTPUTS = np.array([[0.9, 0.4, 0.1], [0.6, 0.2, 0.7], [0.3, 0.8, 0.2]], np.float32)
HELD = np.array([[1, 1, 0], [0, 0, 1], [0, 1, 0]], np.uint8)


def of(name, outputs=OUTPUTS, held=HELD):
    return known("many")[name].of(outputs, held)


def test_figures_at_a_half_by_hand():
    """Given: label 1; 1 and 3; 2. Three of four are right, and four are had."""
    assert of("micro_f1") == pytest.approx(2 * 3 / (4 + 4))
    assert of("macro_f1") == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert of("subset_accuracy") == pytest.approx(1 / 3)
    assert of("samples_f1") == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_ranks_by_hand():
    """Every label ranks its own rows first: areas are 1. Over all pairs a wrong 0.6 beats the right 0.4."""
    assert of("auroc") == of("auprc") == pytest.approx(1.0)
    assert of("micro_auroc") == pytest.approx(1 - 1 / 20)
    assert of("lrap") == pytest.approx(1.0)


def test_a_label_that_no_row_has_is_left_out_and_rows_that_are_alike_tell_nothing():
    held = HELD * np.array([1, 1, 0], np.uint8)
    assert of("auroc", held=held) == pytest.approx(1.0)
    assert of("auroc", held=np.zeros_like(HELD)) is None and of("precision_at_5") is None


def test_precision_at_5_by_hand():
    outputs = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]], np.float32)
    assert of("precision_at_5", outputs, np.array([[1, 0, 0, 1, 0, 1]], np.uint8)) == pytest.approx(2 / 5)
