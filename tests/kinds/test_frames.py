"""Frames are orthonormal, and the same whatever an SVD leaves open."""

import numpy as np
import pytest
import torch

from fedlora import simulate
from fedlora.errors import UserError
from fedlora.kinds import frames


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n))).Q


def test_drawn_frames_are_orthonormal_and_on_a_grid():
    u = frames.drawn(20, 6, np.random.default_rng(0))
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-5)
    assert u.dtype == np.float32 and not (u * 2**20 % 1).any()


@pytest.mark.parametrize("shape", [(9, 7), (6, 8)])
@pytest.mark.parametrize("values", [[5, 4, 3, 2, 1], [5, 3, 3, 3, 1], [4, 4, 2, 2, 2], [3, 2, 0, 0, 0], [0] * 5])
def test_singular_vectors_are_the_same_whatever_basis_an_svd_finds(monkeypatch, shape, values):
    """Signs are turned, as are vectors of equal values; those of zeros on each side by itself."""
    out, into = shape
    least, s = min(shape), np.zeros(min(shape))
    s[:5] = values
    u, v = orthogonal(out, 1), orthogonal(into, 2)
    weight, found = (u[:, :least] * s) @ v[:, :least].T, []
    for seed in (3, 4):
        left, right = u.copy(), v.copy()
        for value in {*values}:
            group, turn = np.flatnonzero(s == value), orthogonal(int((s == value).sum()), seed)
            if value:
                left[:, group], right[:, group] = left[:, group] @ turn, right[:, group] @ turn
        rank = int((s > 0).sum())
        left[:, rank:] = left[:, rank:] @ orthogonal(out - rank, seed + 5)
        right[:, rank:] = right[:, rank:] @ orthogonal(into - rank, seed + 6)
        svd = [torch.from_numpy(x.copy()) for x in (left[:, :least], s, right[:, :least].T)]
        monkeypatch.setattr(torch.linalg, "svd", lambda *told, svd=svd, **more: svd)
        found.append(frames.singular(weight, 4))
    (u1, v1), (u2, v2) = found
    np.testing.assert_allclose(u1, u2, atol=1e-9)
    np.testing.assert_allclose(v1, v2, atol=1e-9)
    np.testing.assert_allclose(u1.T @ weight @ v1.T, np.diag(s[:4]), atol=1e-9)
    np.testing.assert_allclose(u1.T @ u1, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(v1 @ v1.T, np.eye(4), atol=1e-9)


def test_clients_with_numbers_of_their_own_between_frames_share_no_pass(tiny, tmp_path):
    told = ("model.adapter.kind=singular", "engine.fused=2")
    with pytest.raises(UserError, match=r"engine\.fused: clients cannot share .*, a Scales: leave this out"):
        simulate(tiny(*told), out=tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("kind, most", [("core", 32), ("singular", 32), ("channel", 31)])
def test_a_rank_above_is_a_line_before_the_run(tiny, tmp_path, kind, most):
    with pytest.raises(UserError, match=rf"model\.adapter\.r: .* 32 x 32, and \w+ has r of at most {most} there"):
        simulate(tiny(f"model.adapter.kind={kind}", "model.adapter.r=33"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
