import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Slot, Update
from fedlora.strategies.fedsvd import FedSVD, refactor

LAYOUT = {
    s.name: s for s in (Slot("A", (2, 6), "A", "q"), Slot("B", (5, 2), "B", "q"), Slot("h", (3,), "head", "h"))
}


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_the_product_is_the_average_change_and_a_has_orthonormal_rows(seed, count):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(2, 6)).astype(np.float32)
    weights = rng.integers(1, 9, count)
    bs = rng.normal(size=(count, 5, 2)).astype(np.float32)
    made = FedSVD()
    made.layout = LAYOUT
    head = np.ones(3, np.float32)
    updates = [
        Update(adapter={"B": b, "h": head}, weight=float(w), clients=(k,))
        for k, (b, w) in enumerate(zip(bs, weights, strict=True))
    ]
    after = made.aggregate({"A": a, "B": bs[0], "h": head}, updates)
    ideal = sum(w * b.astype(float) @ a for b, w in zip(bs, weights, strict=True)) / weights.sum()
    assert np.linalg.norm(after["B"].astype(float) @ after["A"] - ideal) < 1e-5 * np.linalg.norm(ideal)
    np.testing.assert_allclose(after["A"] @ after["A"].T, np.eye(2), atol=1e-5)
    gram = after["B"].T @ after["B"]
    assert abs(gram[0, 1]) < 1e-4 * np.trace(gram)  # B holds U S: orthogonal columns


def test_only_b_and_the_head_go_up_and_a_comes_down():
    made = FedSVD()
    made.layout = LAYOUT
    told = made.instruct(1, {n: np.zeros(s.shape, np.float32) for n, s in LAYOUT.items()})
    assert told.send == ("B", "h") and set(told.adapter) == set(LAYOUT)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_product_without_full_rank_is_kept(rank):
    a = np.eye(2, 6, dtype=np.float32)
    b = np.zeros((5, 2), np.float32)
    b[0, :rank] = 3.0
    new_b, new_a = refactor(b, a)
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-6)
    assert np.isfinite(new_a).all() and np.linalg.matrix_rank(new_a) == 2
