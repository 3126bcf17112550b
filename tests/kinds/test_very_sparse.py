"""A's numbers, counted."""

import numpy as np

from fedlora.adapter import Slot
from fedlora.kinds.very_sparse import VerySparse

SLOT = Slot("a", (8, 400), "A", "q", False)


def test_each_row_has_the_root_of_the_inputs_in_signs_of_one_size():
    a = VerySparse(8, 8.0, ()).initial(SLOT, np.random.default_rng(1), None)
    assert (np.count_nonzero(a, axis=1) == 20).all()
    np.testing.assert_allclose(np.abs(a[a != 0]), 1 / np.sqrt(60), rtol=1e-6)
    assert 50 < (a > 0).sum() < 110
    np.testing.assert_allclose(np.square(a).sum(), 8 / 3, rtol=1e-5)  # as LoRA's A has on average


def test_a_layer_of_one_input_has_one():
    a = VerySparse(2, 2.0, ()).initial(Slot("a", (2, 1), "A", "q"), np.random.default_rng(1), None)
    np.testing.assert_allclose(np.abs(a), 1 / np.sqrt(3), rtol=1e-6)
