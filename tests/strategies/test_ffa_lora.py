import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Slot, Update
from fedlora.strategies.ffa_lora import FFALoRA

LAYOUT = {
    s.name: s for s in (Slot("A", (2, 6), "A", "q"), Slot("B", (5, 2), "B", "q"), Slot("h", (3,), "head", "h"))
}


def test_a_never_travels_and_never_trains():
    made = FFALoRA()
    made.layout = LAYOUT
    told = made.instruct(1, {n: np.zeros(s.shape, np.float32) for n, s in LAYOUT.items()})
    assert told.send == told.train == ("B", "h") and set(told.adapter) == {"B", "h"}


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_averaging_b_is_averaging_the_changes(seed, count):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(2, 6)).astype(np.float32)
    weights = rng.integers(1, 9, count)
    bs = rng.normal(size=(count, 5, 2)).astype(np.float32)
    updates = [
        Update(adapter={"B": b}, weight=float(w), clients=(k,))
        for k, (b, w) in enumerate(zip(bs, weights, strict=True))
    ]
    after = FFALoRA().aggregate({"B": bs[0]}, updates)
    ideal = sum(w * b.astype(float) @ a for b, w in zip(bs, weights, strict=True)) / weights.sum()
    error = np.linalg.norm(after["B"].astype(float) @ a - ideal) / np.linalg.norm(ideal)
    assert error < 1e-5
