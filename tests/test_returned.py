"""What somebody's own code gives back is checked where it comes back, and told by name."""

import json
import math

import numpy as np
import pytest

from fedlora import Strategy, returned
from fedlora.adapter import Slot, Update
from fedlora.client import Client, Settings, check_returned, pulled, spends
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.lora import Lora
from fedlora.metrics.contract import Evaluation, Metric, try_out
from fedlora.strategy import Merged
from fedlora.suitability import check_bound

LAYOUT = {name: Slot(name, (2, 2), name, "x") for name in ("A", "B")}
ADAPTER = {name: np.zeros((2, 2), np.float32) for name in LAYOUT}
UPDATE = Update(adapter=ADAPTER, weight=1.0, clients=(0,))


def strategy(**methods):
    """A strategy of one's own whose methods return given values."""

    def giving(value):
        return lambda self, *_: value

    made = {name: giving(value) for name, value in methods.items()}
    own = type("Own", (Strategy,), {"aggregate": lambda self, *_: dict(ADAPTER), "__module__": "mine", **made})()
    own.bind(LAYOUT, Lora(2, 1.0, ()), ADAPTER, False)
    return own


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "mine:Own.aggregate returned None; return a mapping of arrays"),
        ([1, 2], "mine:Own.aggregate returned a list; return a mapping of arrays"),
        ({"A": None}, "mine:Own.aggregate returned None for 'A'"),
        ({"A": [[1.0]]}, "mine:Own.aggregate returned list for 'A'"),
        ({"A": np.array(["x"])}, "mine:Own.aggregate returned <U1 for 'A'"),
        ({3: np.zeros(2)}, "mine:Own.aggregate returned a int for a name"),
        (Merged(None, {}), "mine:Own.aggregate returned None"),
    ],
)
def test_an_aggregate_that_is_none_is_named(value, message):
    with pytest.raises(ContractError, match=r".*") as caught:
        strategy(aggregate=value).aggregated(ADAPTER, [UPDATE])
    assert str(caught.value).startswith(message)


def test_whole_numbers_become_floats_and_floats_stay():
    made = strategy(aggregate={"A": np.ones((2, 2), np.int64), "B": np.ones((2, 2))}).aggregated(ADAPTER, [UPDATE])
    assert (made.adapter["A"].dtype, made.adapter["B"].dtype, made.base) == (np.float32, np.float64, {})


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("trains", None, "trains returned None; return names of tensors"),
        ("sends", "A", "sends returned a str; return names of tensors"),
        ("keeps", [1], "keeps returned a int among names"),
        ("federates", 3, "(federates|trains) returned a int; return names"),
        ("config", None, "config returned None; return a mapping of words"),
        ("receives", None, "receives returned None; return a mapping of arrays"),
    ],
)
def test_what_a_strategy_tells_a_round_is_checked(method, value, message):
    with pytest.raises(ContractError, match=f"mine:Own.{message}"):
        strategy(**{method: value}).instruct(1, ADAPTER)


def test_what_it_binds_to_is_checked_too():
    with pytest.raises(ContractError, match=r"mine:Own.trains returned None"):
        check_bound(strategy(trains=None))


def test_scalars_of_numpy_among_words_are_numbers():
    told = strategy(config={"mu": np.float32(0.5), "turns": "A", "n": np.int64(3)}).instruct(1, ADAPTER).config
    assert dict(told) == {"mu": 0.5, "turns": "A", "n": 3} and {type(v) for v in told.values()} == {
        float,
        str,
        int,
    }


class Own(Client):
    def fit(self, *_):
        return None

    def spends(self, *_):
        return 3.0


Own.__module__ = "mine"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "mine:Own.fit returned None; return a fedlora.Update"),
        (ADAPTER, "mine:Own.fit returned a dict; return a fedlora.Update"),
        (Update(adapter=None, weight=1.0, clients=(0,)), "mine:Own.fit returned None; return a mapping of arrays"),
        (Update(adapter=ADAPTER, weight="1", clients=(0,)), "mine:Own.fit in weight returned a str"),
        (Update(adapter=ADAPTER, weight=1.0, clients=0), "mine:Own.fit in clients returned a int"),
        (Update(adapter=ADAPTER, weight=1.0, clients=(0,), metrics={"loss": "x"}), "mine:Own.fit in metrics"),
    ],
)  # fmt: skip
def test_what_a_client_returns_is_checked(value, message):
    with pytest.raises(ContractError) as caught:
        check_returned(Own(), value)
    assert str(caught.value).startswith(message)


def test_what_a_client_says_that_it_spends_is_an_event():
    settings = Settings(round=1, train=(), send=(), local_steps=1, batch_size=1, lr=1.0)
    with pytest.raises(ContractError, match=r"mine:Own.spends returned a float; return a fedlora.Event, or None"):
        spends(Own(), 3, settings)


@pytest.mark.parametrize("value", [None, "0.5", [1.0]])
def test_a_metric_that_is_no_number_is_named(value):
    metric = Metric(name="mine", function=lambda *_: value, takes=None)
    with pytest.raises(SettingError, match=r"mine returned .* for made-up rows; return a number"):
        try_out(metric, "class", ("a", "b"))
    try_out(Metric(name="mine", function=lambda *_: np.float32(0.5), takes=None), "class", ("a", "b"))


@pytest.mark.parametrize("value", [None, {"loss": "x"}, 3])
def test_figures_of_a_task_are_numbers_by_name(value):
    with pytest.raises(ContractError, match="the task's figures returned"):
        Evaluation({}).figures(value, (), ())


def test_json_has_neither_infinity_nor_scalars_of_numpy():
    told = {
        "a": math.inf,
        "b": [math.nan, 1.5, (2, -math.inf)],
        "c": np.float32("inf"),
        "d": np.int64(3),
        "e": None,
    }
    assert json.dumps(returned.finite(told), allow_nan=False) == (
        '{"a": null, "b": [null, 1.5, [2, null]], "c": null, "d": 3, "e": null}'
    )


@pytest.mark.parametrize(
    ("grads", "asks"), [((None, None), True), ((0.0, None), False), ((0.0, 0.5), True), ((1e-9,), False)]
)
def test_a_gradient_of_zero_is_no_fault_of_wiring(grads, asks):
    import torch

    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else torch.full((2,), grad)
    assert pulled(parameters) is asks
