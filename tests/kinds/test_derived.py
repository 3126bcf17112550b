"""What kinds take from the frozen weight, by hand."""

import numpy as np
import pytest
import torch

from fedlora.adapter import Slot
from fedlora.kinds.channel import Channel
from fedlora.kinds.ldu import LDU
from fedlora.kinds.singular import Singular

RNG = np.random.default_rng(3)


def made(kind, weight):
    """B and A of a layer with that weight."""
    weights = {"q": torch.tensor(weight, dtype=torch.float64)}
    out, into = weights["q"].shape
    return [
        kind.initial(
            Slot(role, kind.shape(Slot(role, (out, into), role, "q"), kind.r), role, "q"),
            np.random.default_rng(1),
            weights.__getitem__,
        )
        for role in ("B", "A")
    ]


def test_singular_values_that_move_are_those_of_the_weight():
    weight = RNG.normal(size=(6, 9))
    u, vt = made(Singular(6, 6.0, ()), weight)
    values = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose((u * values) @ vt, weight, atol=1e-5)
    moved = weight + (u * np.array([3, 2, 1, 0, 0, 0])) @ vt
    np.testing.assert_allclose(
        np.linalg.svd(moved, compute_uv=False)[:3], values[:3] + np.array([3, 2, 1]), rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_ldu_s_directions_make_up_the_weight(shape):
    """`W = sum_i c_i l_i u_i` with all of them, each of length 1; none of fewer does."""
    weight, least = RNG.normal(size=shape), min(shape)
    left, right = made(LDU(least, 1.0, ()), weight)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, rtol=1e-6)
    each = np.stack([np.outer(left[:, i], right[i]).ravel() for i in range(least)], 1)
    found, rest, _, _ = np.linalg.lstsq(each, weight.ravel(), rcond=None)
    assert rest < 1e-9 and (found[: least - 1] != 0).all()
    assert not np.tril(right[:, :least], -1).any() and (np.diag(right) > 0).all()


@pytest.mark.parametrize("kind", [Singular(5, 5.0, ()), LDU(5, 5.0, ())])
def test_last_bits_of_another_processor_make_no_other_frame(kind):
    """Vectors of a weight that is off by 1e-13, as those of one weight are between processors."""
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(9, 7))
    here, there = made(kind, weight), made(kind, weight * (1 + 1e-13 * rng.normal(size=weight.shape)))
    for mine, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_ldu_by_hand_with_a_pivot_of_zero():
    """The second row is moved up, as its first number is larger; the last pivot is zero."""
    left, right = made(LDU(2, 2.0, ()), [[1.0, 2.0], [2.0, 4.0]])
    np.testing.assert_allclose(left, [[1 / np.sqrt(5), 1], [2 / np.sqrt(5), 0]], atol=1e-6)
    np.testing.assert_allclose(right, [[1 / np.sqrt(5), 2 / np.sqrt(5)], [0, 1]], atol=1e-6)


def test_inputs_with_the_most_energy_in_the_tail_have_columns():
    """Beyond its largest value, 9 at input 0, the weight has 1, 3 and 2 at the inputs 1, 2 and 3."""
    weight = np.diag([9.0, 1.0, 3.0, 2.0])
    assert Channel(1, 1.0, ()).inputs(weight).tolist() == [2]
    assert Channel(2, 2.0, ()).inputs(weight).tolist() == [1, 3]  # now 3 is among the first two
    _, a = made(Channel(2, 2.0, ()), weight)
    np.testing.assert_array_equal(a[:2], [[0, 1, 0, 0], [0, 0, 0, 1]])
    assert a.shape == (4, 4) and (np.abs(a[2:]) <= 0.5).all() and a[2:].all()
