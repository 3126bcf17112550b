"""Thin factors against the dense matrices that they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import factors

sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999), out=sizes, into=sizes, ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_operation_equals_the_dense_one(seed, out, into, ranks):
    rng = np.random.default_rng(seed)
    parts = [(float(rng.normal()), rng.normal(size=(out, r)), rng.normal(size=(r, into))) for r in ranks]
    dense = sum(w * left @ right for w, left, right in parts)
    left, right = factors.stack(parts)
    np.testing.assert_allclose(left @ right, dense, atol=1e-12)
    assert factors.norm(left, right) == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    u, s, vt = factors.svd(left, right)
    np.testing.assert_allclose(u * s @ vt, dense, atol=1e-10)
    expected = np.linalg.svd(dense, compute_uv=False)
    count = min(len(s), len(expected))
    np.testing.assert_allclose(s[:count], expected[:count], atol=1e-10)
    for short in (factors.shorten(left, right), factors.compact(left, right)):
        np.testing.assert_allclose(short[0] @ short[1], dense, atol=1e-6 * max(1.0, float(s[0])))
        assert short[0].shape[1] <= max(min(out, into), sum(ranks) if sum(ranks) <= min(out, into) else 0)


def test_the_sign_that_an_svd_leaves_open_is_settled():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(6, 3)), rng.normal(size=(3, 5))
    u, _, vt = factors.svd(left, right)
    again, _, same = factors.svd(-left, -right)
    np.testing.assert_allclose(vt, same, atol=1e-12)
    np.testing.assert_allclose(u, again, atol=1e-12)
    assert all(row[np.abs(row).argmax()] > 0 for row in vt)


def test_energy_rank_by_hand():
    s = np.array([4.0, 3.0])  # energies 16 and 9 of 25
    assert [factors.energy_rank(s, share) for share in (0.5, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]
    assert factors.energy_rank(np.zeros(3), 0.9) == 0 and factors.energy_rank(np.zeros(0), 0.9) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_split_by_hand(shared):
    u, s, vt = np.eye(3)[:, :2], np.array([4.0, 0.0]), np.eye(2, 4)
    before = np.full((3, 4), 7.0, np.float32)
    b, a = factors.split(u, s, vt, before, shared)
    np.testing.assert_array_equal(b[:, 0], [2 if shared else 4, 0, 0])
    np.testing.assert_array_equal(a[0], [2 if shared else 1, 0, 0, 0])
    assert not b[:, 1:].any() and (a[1:] == 7).all()  # directions without weight keep their A


def test_single_is_finite():
    np.testing.assert_array_equal(
        factors.single(np.array([1e60, -1e60, 1.5])), np.float32([3.4028235e38, -3.4028235e38, 1.5])
    )


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_one_pass_has_the_top_direction_of_rows_around_their_mean(count):
    rows = np.random.default_rng(count).normal(size=(count, 30))
    _, s, vt = np.linalg.svd(rows - rows.mean(0))
    v, differences = factors.top_direction(iter(rows))
    assert differences == pytest.approx((s**2).sum(), abs=1e-12)
    np.testing.assert_allclose(abs(v @ vt[0]), 1.0 if count > 1 else 0.0, atol=1e-9)


@pytest.mark.parametrize("held", [2, 4, 8])
@pytest.mark.parametrize("order", [1, -1])
def test_a_long_stream_falls_short_of_it_by_no_more_than_the_bound(held, order):
    rng = np.random.default_rng(held)
    rows = rng.normal(size=(200, 40)) + np.outer(3 * rng.normal(size=200), rng.normal(size=40) / 40**0.5)
    rows = rows[np.argsort(order * np.abs(rows).sum(1))]
    away = rows - rows.mean(0)
    most = np.linalg.norm(away, 2) ** 2
    v, differences = factors.top_direction(iter(rows), held)
    assert ((away @ v) ** 2).sum() >= most - (differences - most) / held
