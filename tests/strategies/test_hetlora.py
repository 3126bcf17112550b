import numpy as np

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.strategies.hetlora import HetLoRA


def test_padding_scaling_and_weights_by_hand():
    # alpha 2: s = 2 / 2 = 1, and for the client of rank 1 s_1 = 2. Changes are 2 * 1 * 1 = 2 and 1 * (2 + 4) = 6,
    # so the weights are 1/4 and 3/4, whatever the clients' own.
    layout = {
        s.name: s for s in (Slot("A", (2, 1), "A", "q"), Slot("B", (1, 2), "B", "q"), Slot("h", (1,), "head", "h"))
    }
    made = HetLoRA()
    made.bind(layout, Lora(2, 2.0, ()), {}, False)
    small = {"A": [[1.0]], "B": [[1.0]], "h": [0.0]}
    large = {"A": [[2.0], [4.0]], "B": [[1.0, 1.0]], "h": [4.0]}
    updates = [
        Update(adapter={n: np.array(t, np.float32) for n, t in held.items()}, weight=w, clients=(k,), scaling=s)
        for k, (held, w, s) in enumerate(((small, 9.0, 2.0), (large, 1.0, 1.0)))
    ]
    after = made.aggregate({n: np.zeros(s.shape, np.float32) for n, s in layout.items()}, updates)
    np.testing.assert_allclose(after["B"], [[0.25 * 2 + 0.75, 0.75]])
    np.testing.assert_allclose(after["A"], [[0.25 + 1.5], [3.0]])
    np.testing.assert_allclose(after["h"], [3.0])
