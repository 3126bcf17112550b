"""Rows of a cosine transform, by hand."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from fedlora.adapter import Slot
from fedlora.kinds.dct import DCT, transform


@pytest.mark.parametrize("size", [1, 2, 7, 384])
def test_the_transform_is_scipy_s_and_orthonormal(size):
    made = transform(size)
    np.testing.assert_allclose(made, dct(np.eye(size), axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(made @ made.T, np.eye(size), atol=1e-12)


def test_the_rows_are_those_that_the_weight_is_made_of():
    """Most of row 5, less of row 2, and of all others as much: the first of them comes third."""
    weight = np.ones((4, 1)) * (3 * transform(8)[5] + 2 * transform(8)[2]) + 0.1 * transform(8)[:4]
    slot = Slot("a", (3, 8), "A", "q", False)
    a = DCT(3, 3.0, ()).initial(slot, np.random.default_rng(1), {"q": torch.tensor(weight)}.__getitem__)
    np.testing.assert_allclose(a, transform(8)[[5, 2, 0]] / np.sqrt(3), atol=1e-6)
