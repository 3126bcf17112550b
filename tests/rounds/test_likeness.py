"""Groups of clients by the directions of their changes, by hand."""

import numpy as np
import pytest

from fedlora.adapter import Slot, Update
from fedlora.kinds.lora import Lora
from fedlora.rounds import likeness
from fedlora.simulation import simulate

LAYOUT = {s.name: s for s in (Slot("A", (2, 3), "A", "q"), Slot("B", (4, 2), "B", "q"))}
BEFORE = {"A": np.eye(2, 3, dtype=np.float32), "B": np.ones((4, 2), np.float32)}


def moved(client, *columns):
    """A client whose B moved by these columns."""
    made = BEFORE["B"] + np.array(columns, np.float32).T
    return Update(adapter={"B": made}, weight=1.0, clients=(client,))


def axes(*which):
    return [np.eye(4)[i] for i in which]


@pytest.mark.parametrize("angle, share", [(0, 1.0), (60, 0.25), (90, 0.0)])
def test_the_overlap_of_two_directions_is_the_square_of_their_cosine(angle, share):
    turn = np.radians(angle)
    one, other = np.array([[1.0], [0], [0]]), np.array([[np.cos(turn)], [np.sin(turn)], [0]])
    assert likeness.overlap({"q": one}, {"q": other}) == pytest.approx(share)


def test_the_overlap_is_a_mean_over_layers_and_a_space_in_a_larger_one_is_whole():
    plane, line, away = np.eye(3)[:, :2], np.eye(3)[:, :1], np.eye(3)[:, 2:]
    assert likeness.overlap({"a": plane, "b": line}, {"a": line, "b": away}) == pytest.approx(0.5)
    assert likeness.overlap({"a": plane[:, :0]}, {"a": line}) == 0.0  # it did not change


def test_clients_that_change_the_same_directions_are_one_group():
    """3 and 7 move along the first two outputs, in whatever mixture; 1 and 5 along the others."""
    x, y, z, w = axes(0, 1, 2, 3)
    told = [moved(3, x, y), moved(1, z, w), moved(7, x + y, x - y), moved(5, 2 * w, z)]
    assert likeness.groups(Lora(2, 2.0, ()), LAYOUT, BEFORE, told) == [[1, 5], [3, 7]]


def test_a_small_direction_is_no_part_of_a_space():
    """A twentieth of the length is less than a tenth of the energy."""
    x, y, z, w = axes(0, 1, 2, 3)
    told = [moved(0, x, 0.05 * z), moved(1, x, 0.05 * w), moved(2, y, 0.05 * z)]
    assert likeness.groups(Lora(2, 2.0, ()), LAYOUT, BEFORE, told) == [[0, 1], [2]]


def test_sums_and_other_ranks_and_pairs_are_not_compared():
    x, y = axes(0, 1)
    kind, told = Lora(2, 2.0, ()), [moved(k, x, y) for k in range(3)]
    assert likeness.groups(kind, LAYOUT, BEFORE, told) == [[0, 1, 2]]
    assert likeness.groups(kind, LAYOUT, BEFORE, told[:2]) == []
    both = Update(adapter=told[0].adapter, weight=2.0, clients=(0, 4))
    assert likeness.groups(kind, LAYOUT, BEFORE, [both, *told[1:]]) == []
    less = Update(adapter={"B": np.ones((4, 1), np.float32)}, weight=1.0, clients=(0,))
    assert likeness.groups(kind, LAYOUT, BEFORE, [less, *told[1:]]) == []


def test_a_round_names_them_where_the_server_sees_each_update(tiny, tmp_path):
    told = ("diagnostics=true", "rounds=1")
    seen = simulate(tiny("strategy.use=spectral_filter", *told, private=False), out=tmp_path / "seen")
    assert sorted(client for group in seen.rounds[0]["groups"] for client in group) == [0, 1, 2, 3]
    summed = simulate(tiny(*told, private=False), out=tmp_path / "summed")
    assert "groups" not in summed.rounds[0]
