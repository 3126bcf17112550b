"""What every strategy promises; found by listing the package, so that a new file is tested by existing."""

import numpy as np
import pytest

from fedlora import plugins, strategy
from fedlora.adapter import Lora, Slot, Update, initial, pairs, weighted_mean
from fedlora.engine.worker import merge

NAMES = plugins.names("strategies")
LAYOUT = {
    s.name: s
    for module in ("q", "v")
    for s in (Slot(f"{module}.lora_A", (2, 6), "A", module), Slot(f"{module}.lora_B", (5, 2), "B", module))
} | {"head": Slot("head", (3, 5), "head", "head")}


@pytest.fixture(params=NAMES)
def made(request):
    built = strategy.load(request.param, {})
    built.layout = LAYOUT
    return built


@pytest.fixture
def adapter():
    first = initial(Lora(2, 4, ("q", "v")), LAYOUT, 1)
    return {n: t + 0.1 for n, t in first.items()}


def replies(made, adapter, count=4, round=1, seed=0):
    rng = np.random.default_rng(seed)
    told = made.instruct(round, adapter)
    return [
        Update(
            adapter={n: adapter[n] + rng.normal(size=adapter[n].shape).astype(np.float32) for n in told.send},
            weight=float(w),
            clients=(k,),
        )
        for k, w in enumerate(rng.integers(1, 9, count))
    ]


def shared(made, adapter):
    return {n: adapter[n] for n in made.federates(LAYOUT)}


def meaning(adapter):
    """What an adapter stands for: the product of each pair, and the head. Factors are not unique."""
    products = {b: adapter[b] @ adapter[a] for b, a in pairs(LAYOUT)}
    return products | {n: t for n, t in adapter.items() if LAYOUT[n].role == "head"}


def test_instructs_about_tensors_that_exist_and_sends_no_others(made, adapter):
    for round in (1, 2, 3):
        told = made.instruct(round, adapter)
        federates = set(made.federates(LAYOUT))
        assert told.round == round and told.train
        assert set(told.adapter) == federates <= set(LAYOUT)
        assert set(told.send) == set(told.train) & federates


def test_gives_new_values_of_the_same_keys_shapes_and_dtypes(made, adapter):
    before = shared(made, adapter)
    after = made.aggregate(before, replies(made, adapter))
    assert set(after) <= set(before) and after
    assert all(t.shape == before[n].shape and t.dtype == np.float32 for n, t in after.items())


def test_does_not_depend_on_the_order_in_which_replies_came(made, adapter):
    updates, before = replies(made, adapter), shared(made, adapter)
    one, other = made.aggregate(before, updates), made.aggregate(before, updates[::-1])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_identical_updates_are_their_own_aggregate(made, adapter):
    (update,) = replies(made, adapter, count=1)
    same = [Update(adapter=update.adapter, weight=w, clients=(k,)) for k, w in enumerate((1.0, 5.0, 2.0))]
    before = shared(made, adapter)
    meant, after = meaning({**adapter, **update.adapter}), meaning({**adapter, **made.aggregate(before, same)})
    for name, tensor in meant.items():
        np.testing.assert_allclose(after[name], tensor, rtol=1e-4, atol=1e-5)


def test_leaves_its_input_alone(made, adapter):
    updates, before = replies(made, adapter), shared(made, adapter)
    copies = [{n: t.copy() for n, t in u.adapter.items()} for u in updates]
    held = {n: t.copy() for n, t in before.items()}
    made.aggregate(before, updates)
    assert all(np.array_equal(c[n], u.adapter[n]) for c, u in zip(copies, updates, strict=True) for n in c)
    assert all(np.array_equal(held[n], before[n]) for n in held)


def test_linear_means_the_weighted_mean_whoever_failed_and_however_it_was_summed(made, adapter):
    updates, before = replies(made, adapter, count=5), shared(made, adapter)
    for present in (updates, updates[1:], updates[:1]) if made.linear else ():
        expected, after = weighted_mean(present), made.aggregate(before, present)
        for name in expected:
            np.testing.assert_allclose(after[name], expected[name], rtol=1e-6)
    if made.linear or made.partial_sums:
        summed = made.aggregate(before, [merge(updates[:2]), merge(updates[2:])])
        for name, tensor in meaning({**adapter, **made.aggregate(before, updates)}).items():
            np.testing.assert_allclose(meaning({**adapter, **summed})[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_stays_finite(made, adapter, scale):
    updates = [
        Update(
            adapter={n: t * np.float32(scale) for n, t in u.adapter.items()}, weight=u.weight, clients=u.clients
        )
        for u in replies(made, adapter)
    ]
    after = made.aggregate(shared(made, adapter), updates)
    assert all(np.isfinite(t).all() for t in after.values())


def test_its_state_outlives_a_restart(made, adapter):
    before = shared(made, adapter)
    made.aggregate(before, replies(made, adapter))
    again = strategy.load(next(n for n in NAMES if plugins.find("strategies", n) is type(made)), {})
    again.layout = LAYOUT
    again.load_state(made.state())
    one, other = (s.aggregate(before, replies(made, adapter, round=2, seed=1)) for s in (made, again))
    assert all(np.array_equal(one[n], other[n]) for n in one)


def test_a_docstring_of_its_file_cites_a_source(made):
    import sys

    module = sys.modules[type(made).__module__]
    assert "https://arxiv.org/abs/" in (module.__doc__ or "") and plugins.summary(
        "strategies", type(made).__module__.rsplit(".", 1)[1]
    )
