import numpy as np

from fedlora.adapter import Slot
from fedlora.kinds.dual import Dual

LAYOUT = {
    s.name: s
    for s in (
        Slot("A", (1, 3), "A", "q", False),
        Slot("B", (2, 1), "B", "q"),
        Slot("own_A", (1, 3), "own_A", "q", False),
        Slot("own_B", (2, 1), "own_B", "q"),
    )
}
HELD = {
    "A": np.array([[1, 0, 2]], np.float32),
    "B": np.array([[3], [4]], np.float32),
    "own_A": np.array([[0, 1, 1]], np.float32),
    "own_B": np.array([[5], [6]], np.float32),
}


def test_the_change_is_the_sum_of_both_by_hand():
    ((left, right),) = Dual(1, 1.0, ()).change(LAYOUT, HELD).values()
    np.testing.assert_array_equal(left @ right, [[3, 5, 11], [4, 6, 14]])


def test_noise_passes_through_the_a_beside_what_moves():
    """Two outputs; squares of A 5, of A' 2; s = 2."""
    kind = Dual(1, 2.0, ())
    for moving, squares in ((("B",), 5), (("own_B",), 2), (("B", "own_B"), 7), (("head",), 0)):
        assert kind.noise_gain(LAYOUT, HELD, moving)["q"] == 2 * (2 * squares) ** 0.5
