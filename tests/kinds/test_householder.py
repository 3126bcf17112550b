"""Reflections: orthonormal whatever trains, found again in any frame, and refused where linearity is needed."""

import json

import numpy as np
import pytest
import torch

from fedlora import plan, plugins, simulate, suitability
from fedlora.errors import UserError
from fedlora.kinds.householder import _reflections, frame

HOUSEHOLDER = "model.adapter.kind=householder"


def test_a_frame_of_two_reflections_by_hand():
    """H((1, 1, 0)) swaps the first two axes with a minus; H((0, 0, 1)) turns the third, which E does not have."""
    made = frame(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_allclose(made, [[0, -1], [-1, 0], [0, 0]], atol=1e-12)


def test_frames_are_orthonormal_and_the_same_in_both_libraries():
    vectors = np.random.default_rng(0).standard_normal((7, 3)) * [[1e-3, 1.0, 50.0]]
    made = frame(vectors)
    np.testing.assert_allclose(made.T @ made, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(frame(torch.from_numpy(vectors)).numpy(), made, atol=1e-12)
    assert np.array_equal(frame(np.zeros((4, 2))), np.eye(4, 2))  # which reflect nothing


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_any_frame_is_made_of_reflections_but_for_signs(columns):
    whole, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((6, columns)))
    vectors, signs = _reflections(whole, 3)
    assert vectors.shape == (6, 3) and set(signs) <= {-1.0, 1.0}
    np.testing.assert_allclose(frame(vectors)[:, :columns] * signs[:columns], whole, atol=1e-12)


def test_strategies_that_are_exact_by_linearity_refuse_it(tiny):
    takes = [
        n
        for n in plugins.names("strategies")
        if not suitability.refuses(plugins.find("strategies", n), "householder")
    ]
    assert takes == ["alone", "fedavg_lora", "fedex_lora", "spectral_filter"]
    with pytest.raises(
        UserError, match=r"ffa_lora promises exact averages, and the change of householder is not linear"
    ):
        plan(tiny(HOUSEHOLDER, "strategy.use=ffa_lora"))


def test_a_run_says_how_far_its_average_is_off(tiny, tmp_path):
    run = simulate(tiny(HOUSEHOLDER, "strategy.use=fedavg_lora", "rounds=2"), out=tmp_path / "run")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    off = [json.loads(line)["aggregation_error"] for line in lines]
    assert run.state == "finished" and all(0 < error < 1 for error in off)
