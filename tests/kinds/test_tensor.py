"""The tensor network of TeRA."""

import numpy as np

from fedlora.adapter import Slot
from fedlora.kinds.contract import initial
from fedlora.kinds.tensor import TeRA, pairs, split

R = 3
KIND = TeRA(R, 6.0, ())
LAYOUT = {
    f"{module}.{role}": Slot(f"{module}.{role}", shape, role, module)
    for module, out in (("q", 20), ("v", 20), ("up", 12))
    for role, shape in (("A", (9, 20)), ("B", (out, 9)), ("values", (3,)))
}


def drawn(seed=3):
    return initial(KIND, LAYOUT, seed, weights=lambda module: None)


def test_sides_are_split_as_evenly_as_they_can_be():
    assert [split(n) for n in (384, 768, 1536, 36, 13)] == [(16, 24), (24, 32), (32, 48), (6, 6), (1, 13)]
    assert KIND.most(384, 1536) == 16 and KIND.most(13, 384) == 1


def test_the_first_pairs_are_those_of_a_lower_rank():
    assert pairs(2).T.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for rank in range(1, 5):
        assert sorted(pairs(5).T[: rank**2].tolist()) == sorted(pairs(rank).T.tolist())


def test_layers_of_one_shape_share_their_network():
    made = drawn()
    assert np.array_equal(made["q.A"], made["v.A"]) and np.array_equal(made["q.B"], made["v.B"])
    assert np.array_equal(made["q.A"], made["up.A"])  # of the same inputs
    assert made["up.B"].shape == (12, 9) and not np.array_equal(made["q.A"], drawn(seed=4)["q.A"])


def test_the_change_is_a_tucker_network_with_a_diagonal_in_its_first_mode():
    """Its factors are found again from B and A, and the network is summed term by term."""
    made, d = drawn(), np.array([0.5, -2.0, 3.0])
    i, j = pairs(R)
    b = made["q.B"].astype(float).reshape(4, 5, R**2)  # 20 = 4 x 5
    p = np.stack([b[:, :, (i == k) & (j == 0)][:, :, 0] for k in range(R)])  # p_k q_0^T
    left, _, right = np.linalg.svd(p[0])
    q0 = right[0]  # up to a sign
    P = np.einsum("kab,b->ak", p, q0)
    Q = np.stack([P[:, 0] @ b[:, :, (i == 0) & (j == k)][:, :, 0] for k in range(R)], 1)
    turned = made["q.A"].astype(float)  # T by pairs of outputs, with the inputs already in it
    core = np.zeros((R, R, 20))
    core[i, j] = turned
    network = np.einsum("ap,p,bq,pqx->abx", P, d, Q, core).reshape(20, 20)
    left, right = KIND.change(LAYOUT, {**made, "q.values": d.astype(np.float32)})["q"]
    np.testing.assert_allclose(left @ right, network, atol=1e-5)
    np.testing.assert_allclose(made["q.B"].T @ made["q.B"], np.eye(9), atol=1e-5)
    np.testing.assert_allclose(turned @ turned.T, np.eye(9), atol=1e-5)
    assert np.linalg.matrix_rank(left @ right, tol=1e-4) == R**2


def test_its_rows_of_inputs_are_those_of_two_modes():
    """Rows of A lie among products of three vectors of 4 and three of 5, whatever T is."""
    a = drawn()["q.A"].astype(float).reshape(9, 4, 5)
    for mode in (1, 2):
        unfolded = np.moveaxis(a, mode, 0).reshape(a.shape[mode], -1)
        assert np.linalg.matrix_rank(unfolded, tol=1e-4) == R
