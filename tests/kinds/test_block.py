"""Blocks over one A are a LoRA of a lower rank."""

import numpy as np
import pytest

from fedlora import simulate
from fedlora.adapter import Slot
from fedlora.errors import UserError
from fedlora.kinds.block import Block


def test_the_change_is_that_of_half_the_rank_with_blocks_summed():
    layout = {"a": Slot("a", (1, 2), "A", "q", False), "b": Slot("b", (2, 2), "B", "q")}
    b, a = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 10.0]])
    left, right = Block(2, 2.0, ()).change(layout, {"a": a, "b": b})["q"]
    np.testing.assert_array_equal(left @ right, [[3.0, 30.0], [7.0, 70.0]])
    gain = Block(2, 2.0, ()).noise_gain(layout, {"a": a, "b": b}, ("B",))
    assert gain["q"] == pytest.approx(np.sqrt(2 * 2 * 101))  # two blocks, two outputs, ||A||^2 = 101


def test_an_odd_rank_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model\.adapter\.r: block shares .* 2 columns of B: take r 4"):
        simulate(tiny("model.adapter.kind=block", "model.adapter.r=3"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
