"""Matrices by their products, against the dense ones that they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import lazy
from fedlora.lazy import Scattered, Thin, Total, Whole

sizes = st.integers(1, 9)


def scattered(rng, out, into):
    places = rng.permutation(out * into)[: rng.integers(1, out * into + 1)]
    rows, columns = np.divmod(places, into)
    values = rng.normal(size=len(places))
    dense = np.zeros((out, into))
    dense[rows, columns] = values
    return Scattered(rows, columns, values, (out, into)), dense


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999), out=sizes, into=sizes, r=st.integers(1, 5), block=st.integers(1, 9))
def test_every_operation_equals_the_dense_one(seed, out, into, r, block):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(out, r)), rng.normal(size=(r, into))
    sparse, entries = scattered(rng, out, into)
    whole = Total([(2.0, Total([(1.0, Thin(left, right)), (-3.0, sparse)])), (0.5, sparse)])
    dense = 2 * left @ right - 5.5 * entries
    columns = rng.normal(size=(into, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK", block)
        for made, expected in (
            (whole, dense),
            (sparse, entries),
            (Thin(left, right), left @ right),
            (Whole(dense), dense),
        ):
            assert made.shape == (out, into)
            np.testing.assert_allclose(made.times(columns), expected @ columns, atol=1e-12)
            np.testing.assert_allclose(np.concatenate([*made.blocks()], 1), expected, atol=1e-12)
            one, other = made.factors()
            np.testing.assert_allclose(one @ other, expected, atol=1e-12)
            assert lazy.norm(made) == pytest.approx(np.linalg.norm(expected), rel=1e-9)
            assert lazy.inner(made, whole) == pytest.approx((expected * dense).sum(), abs=1e-9)
        assert whole.factors()[0].shape[1] <= min(out, into)


def test_a_few_values_are_a_product_of_as_few():
    """Three values in two rows: two columns suffice, and the factors hold the very values."""
    sparse = Scattered(np.array([1, 1, 4]), np.array([0, 2, 3]), np.array([5.0, 6.0, 7.0]), (6, 9))
    left, right = sparse.factors()
    assert left.shape == (6, 2) and right[0, [0, 2]].tolist() == [5, 6] and right[1, 3] == 7
    assert not Total([(1.0, sparse)]).thin and Total([(1.0, Total([(1.0, Thin(left, right))]))]).thin
