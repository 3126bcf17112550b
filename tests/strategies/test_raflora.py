import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.raflora import RaFLoRA

LAYOUT = {s.name: s for s in (Slot("A", (2, 3), "A", "q"), Slot("B", (4, 2), "B", "q"))}
FIRST = {"A": np.eye(2, 3, dtype=np.float32), "B": np.diag([5.0, 7.0]).astype(np.float32).repeat([1, 3], 0)}
FIRST["B"][2:] = 0


def client(number, weight, values):
    """One of rank `len(values)` whose change has `values` on the diagonal, at alpha 2."""
    rank = len(values)
    b = np.zeros((4, rank), np.float32)
    b[:rank] = np.diag(values)
    sent = {"A": np.eye(rank, 3, dtype=np.float32), "B": b / (2 / rank)}
    return Update(adapter=sent, weight=weight, clients=(number,), scaling=2 / rank)


def diagonal(cls, *updates):
    made = cls()
    made.bind(LAYOUT, Lora(2, 2.0, ()), FIRST, False)
    after = made.aggregate(FIRST, list(updates))
    whole = after["B"] @ after["A"]
    np.testing.assert_allclose(
        whole - np.diag(whole.diagonal()[:3])[[0, 1, 2, 2]] * [[1], [1], [1], [0]], 0, atol=1e-6
    )
    return after, whole.diagonal()


def test_a_direction_is_averaged_over_those_who_hold_it():
    """3 of 4 parts hold one direction with 4, one holds two with 8 and 6: (3 * 4 + 8) / 4 = 5, and 6 whole."""
    updates = client(0, 3.0, [4.0]), client(1, 1.0, [8.0, 6.0])
    after, found = diagonal(RaFLoRA, *updates)
    np.testing.assert_allclose(found, [5.0, 6.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(diagonal(FlexLoRA, *updates)[1], [5.0, 1.5, 0.0], atol=1e-5)  # 6 / 4: diluted
    np.testing.assert_allclose(np.linalg.norm(after["B"], axis=0), np.linalg.norm(after["A"], axis=1), rtol=1e-5)


def test_a_direction_that_nobody_holds_stays_as_it_was():
    np.testing.assert_allclose(
        diagonal(RaFLoRA, client(0, 3.0, [4.0]), client(1, 1.0, [8.0]))[1], [5.0, 7.0, 0.0], atol=1e-5
    )


def test_equal_ranks_are_flexlora():
    updates = client(0, 3.0, [4.0, 1.0]), client(1, 1.0, [8.0, 6.0])
    found = [diagonal(cls, *updates)[1] for cls in (RaFLoRA, FlexLoRA)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0] == pytest.approx([5.0, 2.25, 0.0], abs=1e-5)
