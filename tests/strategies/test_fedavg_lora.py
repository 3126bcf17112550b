import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.strategies.fedavg_lora import FedAvgLoRA

LAYOUT = {s.name: s for s in (Slot("A", (1, 2), "A", "q"), Slot("B", (2, 1), "B", "q"))}


def test_logs_how_far_it_is_from_the_average_change():
    # Changes [[1, 0], [0, 0]] and [[0, 0], [0, 1]]: their mean has norm sqrt(1/2); the mean factors make
    # [[1, 1], [1, 1]] / 4, which is [[-1, 1], [1, -1]] / 4 away from it, of norm 1/2.
    made = FedAvgLoRA()
    made.layout = LAYOUT
    updates = [
        Update(
            adapter={"A": np.array([[1 - k, k]], np.float32), "B": np.array([[1 - k], [k]], np.float32)},
            weight=1.0,
            clients=(k,),
        )
        for k in (0, 1)
    ]
    after = made.aggregate({}, updates)
    np.testing.assert_array_equal(after["B"] @ after["A"], np.full((2, 2), 0.25))
    assert made.diagnose({}, updates, after)["aggregation_error"] == pytest.approx(0.5 / 0.5**0.5)


def test_measuring_the_error_needs_each_client():
    assert not FedAvgLoRA().partial_sums
    quiet = FedAvgLoRA(measure_error=False)
    assert quiet.partial_sums and quiet.diagnose({}, [], {}) == {}
