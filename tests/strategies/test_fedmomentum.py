import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.strategies.fedmomentum import FedMomentum

LAYOUT = {s.name: s for s in (Slot("A", (1, 3), "A", "q"), Slot("B", (3, 1), "B", "q"))}
FIRST = {"A": np.full((1, 3), 0.5, np.float32), "B": np.zeros((3, 1), np.float32)}


def played(tau):
    """Three clients of rank 1 along an axis each: their average has singular values 4, 3 and 1; scaling is 2."""
    made = FedMomentum(tau=tau)
    made.bind(LAYOUT, Lora(1, 2.0, ()), FIRST, False)
    updates = [
        Update(
            adapter={"A": np.eye(3, dtype=np.float32)[[k]], "B": 1.5 * size * np.eye(3, dtype=np.float32)[:, [k]]},
            weight=1.0,
            clients=(k,),
            scaling=2.0,
        )
        for k, size in enumerate((4.0, 3.0, 1.0))
    ]
    return made.aggregate(FIRST, updates)


@pytest.mark.parametrize("tau, merged", [(16 / 26, []), (25 / 26, [3.0]), (0.9999, [3.0, 1.0]), (1.0, [3.0, 1.0])])
def test_the_first_direction_goes_on_and_those_that_hold_the_energy_are_merged(tau, merged):
    """Energies 16, 9 and 1 of 26."""
    done = played(tau)
    np.testing.assert_allclose(2 * done.adapter["B"] @ done.adapter["A"], np.diag([4.0, 0.0, 0.0]), atol=1e-6)
    np.testing.assert_allclose(
        np.abs(done.adapter["A"]), [[2**0.5, 0, 0]], atol=1e-6
    )  # (4 / 2)^(1/2), as B has it
    np.testing.assert_allclose(np.abs(done.adapter["B"].T), [[2**0.5, 0, 0]], atol=1e-6)
    whole = sum((left @ right for left, right in done.base.values()), np.zeros((3, 3)))
    np.testing.assert_allclose(whole, np.diag([0.0, *merged, 0.0, 0.0][:3]), atol=1e-6)
    assert bool(done.base) == bool(merged)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="tau"):
        FedMomentum(tau=0.0)
