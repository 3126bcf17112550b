"""The spectral filter: by hand, and beside the mean, the median and Krum under attack."""

import numpy as np
import pytest

from fedlora import strategy, suitability
from fedlora.adapter import Slot, Update, weighted_mean
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.strategies.spectral_filter import SpectralFilter

LAYOUT = {"B": Slot("B", (20, 20), "B", "q")}
ZERO = {"B": np.zeros((20, 20), np.float32)}


def updates(rows, weights=None):
    rows = np.asarray(rows, np.float32)
    weights = weights or [1.0] * len(rows)
    return [
        Update(adapter={"B": t}, weight=w, clients=(k,))
        for k, (t, w) in enumerate(zip(rows, weights, strict=True))
    ]


def test_who_sticks_out_by_hand():
    """On a line the median is 2 and distances are 1, 0, 1, 0, 52: 52 > 4 * 1. The others weigh 1, 2, 1, 4."""
    made, before = SpectralFilter(), {"B": np.zeros(1, np.float32)}
    sent = updates([[1], [2], [3], [2], [-50]], [1.0, 2.0, 1.0, 4.0, 100.0])
    after = made.aggregate(before, sent)
    np.testing.assert_allclose(after["B"], (1 + 4 + 3 + 8) / 8)
    made.bind({"B": Slot("B", (1,), "head", "head")}, Lora(1, 1.0, ()), {}, False)
    assert made.diagnose(before, sent, after)["left_out"] == 1


def test_where_all_are_alike_or_few_nobody_is_left_out():
    made, before = SpectralFilter(), {"B": np.zeros(2, np.float32)}
    for rows in ([[1, 1]] * 5, [[1, 1], [-90, 3]], [[1, 1], [1, 2], [-90, 3]], [[7, 7]]):
        np.testing.assert_allclose(made.aggregate(before, updates(rows))["B"], np.mean(rows, 0), rtol=1e-6)


def test_no_more_than_a_minority_is_left_out_the_farthest_first():
    """Of five at most two, which are the last; of four at most one, though all else is alike."""
    made, before = SpectralFilter(), {"B": np.zeros(1, np.float32)}
    five = made.aggregate(before, updates([[0], [0], [0.1], [40], [90]]))
    np.testing.assert_allclose(five["B"], 0.1 / 3, rtol=1e-6)
    four = made.aggregate(before, updates([[0], [0], [0], [90]]))
    assert four["B"] == 0 and made._left_out == 1


def attacked(attack, rng):
    """Ten clients that agree in a direction and differ in all others; of them three are malicious."""
    common = rng.normal(size=(20, 20))
    honest = common + 2 * rng.normal(size=(10, 20, 20))
    backdoor = rng.normal(size=(20, 20))
    sent = honest.copy()
    sent[:3] = {"flip": -honest[:3], "scale": 10 * honest[:3], "backdoor": honest[:3] + 4 * backdoor}[attack]
    return honest, sent


RULES = {
    "filter": ("spectral_filter", {}),
    "median": ("flwr.serverapp.strategy:FedMedian", {}),
    "krum": ("flwr.serverapp.strategy:Krum", {"num_malicious_nodes": 3}),
}


@pytest.fixture
def identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


@pytest.mark.parametrize("attack", ["flip", "scale", "backdoor"])
def test_three_malicious_of_ten_are_left_out(attack, identity):
    """The aggregate is the mean of the seven honest ones; it is nearer to all ten's than the median or Krum is."""
    honest, sent = attacked(attack, np.random.default_rng(4))
    aim = honest.mean(0)
    off = {"mean": np.linalg.norm(sent.mean(0) - aim)}
    for rule, (use, options) in RULES.items():
        made = strategy.load(use, options)
        made.bind(LAYOUT, Lora(20, 20.0, ()), ZERO, False)
        after = made.aggregate(ZERO, updates(sent))["B"]
        off[rule] = np.linalg.norm(after - aim)
        if rule == "filter":
            np.testing.assert_allclose(after, weighted_mean(updates(sent[3:]))["B"], rtol=1e-5, atol=1e-6)
    assert off["filter"] < min(off["median"], off["krum"], off["mean"]), off


def test_clean_rounds_of_noise_are_left_as_they_are():
    """Ten clients whose updates are noise alone, as under privacy, stand in directions of their own."""
    rows = np.random.default_rng(2).normal(size=(10, 20, 20)).astype(np.float32)
    made = SpectralFilter()
    np.testing.assert_allclose(made.aggregate(ZERO, updates(rows))["B"], rows.mean(0), rtol=1e-4, atol=1e-6)
    assert made._left_out == 0


def test_parts_name_what_federates():
    layout = {n: Slot(n, (1, 1), n, "q") for n in ("A", "B", "head")}
    assert SpectralFilter().federates(layout) == ["B", "head"]
    assert SpectralFilter(parts=["A", "head"]).federates(layout) == ["A", "head"]


@pytest.mark.parametrize(
    "told, said",
    [
        (
            "secure_aggregation={range: 1.0}",
            "secure aggregation gives sums, and spectral_filter needs each update",
        ),
        (
            "privacy={unit: client, epsilon: 20, delta: 1.0e-2}",
            "unit: client noises a mean, and how much one client",
        ),
    ],
)
def test_where_nobody_may_look_at_single_updates_it_is_refused(told, said, tiny):
    scenario = tiny("strategy.use=spectral_filter", told, private=False)
    with pytest.raises(SettingError) as raised:
        suitability.check(strategy.load("spectral_filter", {}), scenario)
    assert said in str(raised.value) and "ffa_lora" in str(raised.value)


def test_a_bound_that_leaves_half_of_them_out_is_refused():
    with pytest.raises(SettingError, match=r"strategy.times: .*above 1"):
        strategy.load("spectral_filter", {"times": 0.5})
