"""Scores are the textbook's likelihood ratios, and use what is known of the noise."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from fedlora.audit.scores import covariance, scores


def test_of_one_round_and_one_tensor_it_is_the_ratio_of_two_normals():
    seen = np.array([-1.0, 0.0, 0.5, 3.0])
    found = scores(seen[None, None], np.ones(1), [np.eye(1) * 4], 0.25, 0.19)
    expected = norm.logpdf(seen, 0.25, (4 + 0.19) ** 0.5) - norm.logpdf(seen, 0, 2)
    np.testing.assert_allclose(found, expected)


def test_rounds_count_together_as_their_covariance_has_it():
    spread, seen = np.array([[4.0, 3.0], [3.0, 4.0]]), np.array([[1.0], [-1.0]])
    found = scores(seen[:, None], np.ones(1), [spread], 0.25, 0.19)
    expected = multivariate_normal.logpdf(seen[:, 0], [0.25, 0.25], spread + 0.19 * np.eye(2))
    np.testing.assert_allclose(found, expected - multivariate_normal.logpdf(seen[:, 0], [0, 0], spread))


def test_a_tensor_without_noise_decides():
    """Half of a canary in each of two tensors: 0.5 beneath a noise of 100, and 0.5 in the clear."""
    parts = np.array([[[30.0, 30.0], [0.5, 0.0]]])  # (one round, two tensors, two canaries)
    drawn, not_drawn = scores(parts, np.array([0.5, 0.5]), [np.eye(1) * 1e4, np.eye(1) * 1e-4], 0.9, 0.04)
    assert drawn > 10 and not_drawn < -10


def test_noise_that_repeats_is_taken_off():
    """Two rounds with the same noise of 10: their difference has none, and shows that one of them drew it."""
    rng = np.random.default_rng(0)
    numbers = np.repeat(10 * rng.standard_normal((1, 5000)), 2, axis=0).astype(np.float32)
    shown = np.array([[8.0, 8.0], [9.0, 8.0]])[:, None]  # (two rounds, one tensor, two canaries)
    drawn, not_drawn = scores(shown, np.ones(1), [covariance(numbers)], 0.25, 0.19)
    assert drawn - not_drawn > 2
    apart, neither = scores(shown, np.ones(1), [np.eye(2) * 100], 0.25, 0.19)
    assert abs(apart - neither) < 0.1


def test_a_few_numbers_do_not_pass_for_certainty():
    """Three numbers in forty rounds leave most directions unseen, which is no sign of no variance."""
    numbers = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    assert np.linalg.eigvalsh(covariance(numbers)).min() > 0.3
    many = np.random.default_rng(0).standard_normal((40, 20_000)).astype(np.float32)
    assert covariance(many) == pytest.approx(np.eye(40), abs=0.05)
