import numpy as np

from fedlora.adapter import Slot
from fedlora.strategies.rolora import RoLoRA

LAYOUT = {
    s.name: s for s in (Slot("A", (2, 6), "A", "q"), Slot("B", (5, 2), "B", "q"), Slot("h", (3,), "head", "h"))
}


def test_b_moves_in_odd_rounds_and_a_in_even_ones():
    made = RoLoRA()
    made.layout = LAYOUT
    adapter = {n: np.zeros(s.shape, np.float32) for n, s in LAYOUT.items()}
    told = [made.instruct(round, adapter) for round in (1, 2, 3)]
    assert [t.send for t in told] == [("B", "h"), ("A", "h"), ("B", "h")]
    assert all(t.train == t.send and set(t.adapter) == set(LAYOUT) for t in told)
