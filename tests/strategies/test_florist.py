import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.strategies.florist import FLoRIST

LAYOUT = {s.name: s for s in (Slot("A", (2, 3), "A", "q"), Slot("B", (4, 2), "B", "q"))}


def played(tau):
    # One client whose change has singular values 4 and 3: energies 16 and 9 of 25.
    made = FLoRIST(tau=tau)
    first = {"A": np.full((2, 3), 0.5, np.float32), "B": np.zeros((4, 2), np.float32)}
    made.bind(LAYOUT, Lora(2, 2.0, ()), first, False)
    sent = {"A": np.eye(2, 3, dtype=np.float32), "B": np.diag([4.0, 3.0]).repeat([1, 1], 0).astype(np.float32)}
    sent["B"] = np.concatenate([sent["B"], np.zeros((2, 2), np.float32)])
    after = made.aggregate(first, [Update(adapter=sent, weight=1.0, clients=(0,))])
    return made, after, made.instruct(2, after)


def test_only_the_directions_that_hold_the_energy_go_down():
    made, after, told = played(0.64)
    assert made.ranks == {"q": 1} and told.adapter["A"].shape == (1, 3) and told.adapter["B"].shape == (4, 1)
    np.testing.assert_allclose(after["B"] @ after["A"], np.diag([4.0, 0.0, 0.0, 0.0])[:, :3], atol=1e-6)
    np.testing.assert_array_equal(after["A"][1], [0.5, 0.5, 0.5])  # as the seed made it, as clients have it


def test_a_little_more_needs_both():
    made, after, told = played(0.65)
    assert made.ranks == {"q": 2} and told.adapter["A"].shape == (2, 3)
    np.testing.assert_allclose(after["B"] @ after["A"], np.diag([4.0, 3.0, 0.0, 0.0])[:, :3], atol=1e-6)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="tau"):
        FLoRIST(tau=1.5)
