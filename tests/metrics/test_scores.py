"""Metrics of scores, by hand and by scipy."""

import numpy as np
import pytest

from fedlora.metrics.contract import known

OUTPUTS = np.array([[1.0], [2.0], [4.0]], np.float32)
RIGHT = np.array([[1.0], [3.0], [2.0]], np.float32)


def of(name, outputs=OUTPUTS, right=RIGHT):
    return known("score")[name].of(outputs, right)


def test_figures_by_hand():
    """Off by 0, 1 and 2; ranks (1, 2, 3) against (1, 3, 2)."""
    assert of("mae") == pytest.approx(1.0) and of("rmse") == pytest.approx((5 / 3) ** 0.5)
    assert of("spearman") == pytest.approx(0.5) and of("r2") == pytest.approx(1 - 5 / 2)
    assert not known("score")["mae"].higher_is_better


def test_correlations_are_those_of_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 6, (2, 20)).astype(np.float32)
        assert of("spearman", x[:, None], y[:, None]) == pytest.approx(stats.spearmanr(x, y)[0])
        assert of("pearson", x[:, None], y[:, None]) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-6)


def test_scores_that_are_all_the_same_tell_nothing():
    assert of("pearson", np.ones_like(OUTPUTS)) is None and of("r2", right=np.ones_like(RIGHT)) is None
