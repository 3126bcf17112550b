from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Slot, Sum, Update, pairs, weighted_mean
from fedlora.errors import ContractError
from fedlora.kinds.averages import aggregation_error
from fedlora.kinds.contract import initial
from fedlora.kinds.lora import Lora

LAYOUT = {
    s.name: s
    for s in (
        Slot("q.lora_A.weight", (2, 5), "A", "q"),
        Slot("q.lora_B.weight", (3, 2), "B", "q"),
        Slot("head.weight", (2, 3), "head", "head"),
        Slot("head.bias", (2,), "head", "head"),
    )
}


def update(value, weight, client=0):
    return Update(adapter={"w": np.array(value, np.float32)}, weight=weight, clients=(client,))


def random_updates(rng, count, names=("q.lora_A.weight", "q.lora_B.weight")):
    return [
        Update(
            adapter={n: rng.normal(size=LAYOUT[n].shape).astype(np.float32) for n in names},
            weight=float(rng.integers(1, 9)),
            clients=(k,),
        )
        for k in range(count)
    ]


def test_weighted_mean_by_hand():
    mean = weighted_mean([update([1, 2], 1.0), update([4, 8], 3.0)])  # (1 + 12) / 4, (2 + 24) / 4
    np.testing.assert_array_equal(mean["w"], [3.25, 6.5])
    assert mean["w"].dtype == np.float32


def test_a_mean_of_means_is_the_mean():
    first = update(weighted_mean([update([1], 1.0), update([4], 3.0)])["w"], 4.0)
    np.testing.assert_allclose(weighted_mean([first, update([10], 2.0)])["w"], [(1 + 12 + 20) / 6], rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_equal_updates_average_to_themselves_whatever_their_weights(seed, count):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=7).astype(np.float32)
    mean = weighted_mean([update(value, float(w)) for w in rng.integers(1, 1000, count)])
    np.testing.assert_allclose(mean["w"], value, rtol=1e-6)


def test_a_sum_stands_for_all_that_was_added():
    """Losses (1 * 1 + 3 * 2) / 4; what only one of them tells is left out."""
    one, other = update([1, 2], 1.0), update([4, 8], 3.0)
    total = Sum()
    assert total.updates() == []
    total.add(replace(one, clients=(4,), metrics={"train_loss": 1.0, "own": 5.0}))
    assert total.updates()[0].adapter is one.adapter
    total.add(replace(other, clients=(7,), metrics={"train_loss": 2.0}))
    (whole,) = total.updates()
    assert (whole.clients, whole.weight, whole.metrics) == ((4, 7), 4.0, {"train_loss": 1.75})
    np.testing.assert_array_equal(whole.adapter["w"], [(1 + 12) / 4, (2 + 24) / 4])


def test_the_mean_of_one_update_is_a_copy_of_it():
    """0.1 * 3 / 3 is not 0.1 in float32 for every weight; it must be here."""
    one = update(np.float32([0.1, 0.7]), 3.3)
    mean = weighted_mean([one])
    assert np.array_equal(mean["w"], one.adapter["w"]) and mean["w"] is not one.adapter["w"]


def test_weighted_mean_leaves_the_updates_alone():
    one = update([1.0], 1.0)
    weighted_mean([one, update([3.0], 1.0)])
    assert one.adapter["w"][0] == 1.0


@pytest.mark.parametrize(
    "updates",
    [
        [],
        [update([1], 0.0)],
        [update([1], 1.0), Update(adapter={"v": np.zeros(1, np.float32)}, weight=1.0, clients=(1,))],
    ],
)
def test_weighted_mean_refuses_what_has_no_mean(updates):
    with pytest.raises(ContractError):
        weighted_mean(updates)


def test_pairs_finds_b_with_its_a():
    assert list(pairs(LAYOUT)) == [("q.lora_B.weight", "q.lora_A.weight")]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_aggregation_error_equals_the_dense_computation(seed, count):
    rng = np.random.default_rng(seed)
    updates = random_updates(rng, count)
    after = weighted_mean(updates)
    shares = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    ideal = sum(
        p * u.adapter["q.lora_B.weight"].astype(float) @ u.adapter["q.lora_A.weight"]
        for p, u in zip(shares, updates, strict=True)
    )
    made = after["q.lora_B.weight"].astype(float) @ after["q.lora_A.weight"]
    expected = np.linalg.norm(made - ideal) / np.linalg.norm(ideal)
    assert aggregation_error(LAYOUT, {}, updates, after) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_aggregation_error_is_nothing_when_a_is_shared():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2, 5)).astype(np.float32)
    updates = random_updates(rng, 5, names=("q.lora_B.weight",))
    before = {"q.lora_A.weight": shared, "q.lora_B.weight": np.zeros((3, 2), np.float32)}
    after = {**before, **weighted_mean(updates)}
    assert aggregation_error(LAYOUT, before, updates, after) < 1e-6


def test_aggregation_error_by_hand():
    # B_1 A_1 = 1, B_2 A_2 = 1, their mean 1; mean B = 0, so the aggregate is 0: an error of 1.
    layout = {s.name: s for s in (Slot("A", (1, 1), "A", "m"), Slot("B", (1, 1), "B", "m"))}
    one = np.ones((1, 1), np.float32)
    updates = [
        Update(adapter={"A": s * one, "B": s * one}, weight=1.0, clients=(i,)) for i, s in enumerate((1, -1))
    ]
    assert aggregation_error(layout, {}, updates, {"A": 0 * one, "B": 0 * one}) == pytest.approx(1.0)


def test_the_first_adapter_follows_from_the_seed_alone():
    kind = Lora(r=2, alpha=4, targets=("q",))
    one, again, other = (
        initial(kind, LAYOUT, 7),
        initial(kind, dict(reversed(LAYOUT.items())), 7),
        initial(kind, LAYOUT, 8),
    )
    for name in LAYOUT:
        np.testing.assert_array_equal(one[name], again[name])
    assert (one["q.lora_A.weight"] != other["q.lora_A.weight"]).all()
    assert (np.abs(one["q.lora_A.weight"]) <= 5**-0.5).all()
    assert not one["q.lora_B.weight"].any() and not one["head.bias"].any()
    assert one["head.weight"].any()
    assert kind.scaling() == 2.0
