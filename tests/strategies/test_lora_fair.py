import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.strategies.lora_fair import LoRAFair

LAYOUT = {s.name: s for s in (Slot("A", (1, 1), "A", "q"), Slot("B", (1, 1), "B", "q"))}


def test_the_correction_by_hand():
    # B_k = A_k = 1 and 3: the mean product is 5, the product of the means 4, so that E = 1;
    # dB = E A / (A^2 + lambda) = 2 / (4 + 1). The scaling of 2 cancels.
    made = LoRAFair(penalty=1.0)
    made.bind(LAYOUT, Lora(1, 2.0, ()), {}, False)
    one = np.ones((1, 1), np.float32)
    updates = [
        Update(adapter={"A": x * one, "B": x * one}, weight=1.0, clients=(k,), scaling=2.0)
        for k, x in enumerate((1, 3))
    ]
    after = made.aggregate({"A": one, "B": 0 * one}, updates)
    assert after["A"][0, 0] == 2.0 and after["B"][0, 0] == pytest.approx(2.4)


def test_a_smaller_penalty_comes_nearer_to_the_average_change():
    rng = np.random.default_rng(0)
    layout = {s.name: s for s in (Slot("A", (2, 6), "A", "q"), Slot("B", (5, 2), "B", "q"))}
    updates = [
        Update(
            adapter={n: rng.normal(size=s.shape).astype(np.float32) for n, s in layout.items()},
            weight=1.0,
            clients=(k,),
        )
        for k in range(3)
    ]
    errors = []
    for penalty in (1e-6, 1.0, 1e6):
        made = LoRAFair(penalty=penalty)
        made.bind(layout, Lora(2, 2.0, ()), {}, False)
        after = made.aggregate(dict(updates[0].adapter), updates)
        errors.append(made.diagnose({}, updates, after)["aggregation_error"])
    assert errors[0] < errors[1] < errors[2]


def test_a_penalty_that_is_none_is_refused():
    with pytest.raises(ValueError, match="penalty"):
        LoRAFair(penalty=0.0)
