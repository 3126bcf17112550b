"""Flower's strategies on adapters, and ours under Flower's loop."""

import doctest

import numpy as np
import pytest

import fedlora.strategy
from fedlora import strategy, wire
from fedlora.adapter import Slot, Update
from fedlora.errors import ContractError, SettingError

LAYOUT = {
    s.name: s for s in (Slot("A", (1, 2), "A", "q"), Slot("B", (2, 1), "B", "q"), Slot("h", (2,), "head", "h"))
}
STOCK = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.5},
    "FedAdagrad": {},
    "FedAdam": {},
    "FedYogi": {},
    "FedProx": {"proximal_mu": 0.5},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {},
    "MultiKrum": {"num_nodes_to_select": 2},
    "Bulyan": {},
    "QFedAvg": {"client_learning_rate": 0.5},
}


def stock(name, **options):
    made = strategy.load(f"flwr.serverapp.strategy:{name}", options)
    made.layout = LAYOUT
    return made


@pytest.fixture(autouse=True)
def identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


def adapter(value=0.0):
    return {n: np.full(s.shape, value, np.float32) for n, s in LAYOUT.items()}


def updates(values, weights=None):
    weights = weights or [1.0] * len(values)
    return [
        Update(adapter=adapter(v), weight=w, clients=(k,), metrics={"train_loss": 0.5})
        for k, (v, w) in enumerate(zip(values, weights, strict=True))
    ]


@pytest.mark.parametrize("name", STOCK)
def test_stock_strategies_run_on_an_adapter(name):
    made = stock(name, **STOCK[name])
    now = adapter(0.5)
    for round in (1, 2):
        told = made.instruct(round, now)
        assert told.round == round and set(told.send) == set(LAYOUT)
        after = made.aggregate(now, updates([0.9, 1.0, 1.0, 1.1, 1.0]))
        now = {**now, **after}
    assert all(np.isfinite(t).all() and t.shape == LAYOUT[n].shape for n, t in now.items())
    assert all((t > 0.5).all() for t in now.values())  # towards the clients


def test_stock_averages_by_hand():
    assert stock("FedAvg").aggregate(adapter(), updates([1.0, 4.0], [1.0, 3.0]))["h"][0] == pytest.approx(3.25)
    assert stock("FedMedian").aggregate(adapter(), updates([1.0, 2.0, 9.0]))["h"][0] == pytest.approx(2.0)


def test_what_a_stock_strategy_cannot_do_is_said():
    made = stock("QFedAvg", client_learning_rate=0.5)
    made.instruct(1, adapter())
    private = [Update(adapter=adapter(1.0), weight=1.0, clients=(0,))]  # shares no loss
    with pytest.raises(ContractError, match=r"QFedAvg: .*training loss"):
        made.aggregate(adapter(), private)


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM", "FedYogi"])
def test_momenta_outlive_a_restart(name):
    made, again = stock(name, **STOCK[name]), stock(name, **STOCK[name])
    now = adapter(0.5)
    for value in (1.0, 2.0):
        made.instruct(1, now)
        now = made.aggregate(now, updates([value]))
    again.load_state(made.state())
    results = []
    for one in (made, again, stock(name, **STOCK[name])):
        one.instruct(3, now)
        results.append(one.aggregate(now, updates([3.0]))["h"])
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_fedprox_tells_clients_its_mu():
    assert stock("FedProx", proximal_mu=0.25).instruct(1, adapter()).config["proximal-mu"] == 0.25


def test_parts_compose_with_what_travels():
    made = stock("FedAdam", parts=["B", "head"])
    told = made.instruct(1, adapter())
    assert told.send == ("B", "h") and set(told.adapter) == {"B", "h"}


def test_an_option_that_a_stock_strategy_lacks_is_refused():
    with pytest.raises(SettingError, match="strategy"):
        stock("FedAdam", etaa=1.0)


def test_a_class_that_is_no_strategy_is_refused():
    with pytest.raises(SettingError, match="neither"):
        strategy.load("collections:OrderedDict", {})


def test_a_misspelt_option_is_named():
    with pytest.raises(SettingError, match=r"strategy\.measure_eror.*'measure_error'"):
        strategy.load("fedavg_lora", {"measure_eror": False})


def test_under_flowers_own_loop(build):
    """`start` on an engine: two rounds of FFA-LoRA, all by messages."""
    from fedlora.engine.inline import InlineEngine
    from fedlora.strategies.ffa_lora import FFALoRA

    worker = build(private=False)
    engine = InlineEngine(num_clients=4)
    engine.worker, engine.description = worker, worker.describe()
    made = FFALoRA()
    made.layout = engine.description.layout
    names = made.federates(made.layout)
    first = {n: engine.description.initial[n] for n in names}
    result = made.start(engine, wire.to_arrays(first), num_rounds=2)
    after = wire.from_arrays(result.arrays)
    assert set(after) == set(names) and all((after[n] != first[n]).any() for n in names)


def test_the_examples_in_docstrings_run():
    assert doctest.testmod(fedlora.strategy).failed == 0
    assert doctest.testmod(fedlora.strategy).attempted > 0
