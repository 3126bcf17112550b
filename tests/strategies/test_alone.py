"""Training alone: each client's model is what it makes of its own rows, and is judged by the common test set."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import strategy, suitability
from fedlora.data.store import Dataset
from fedlora.engine import Worker
from fedlora.errors import SettingError
from fedlora.prepare import prepare, prepare_server
from fedlora.simulation import simulate
from fedlora.strategies.alone import Alone
from fedlora.strategies.flexlora import FlexLoRA

ALONE = ("strategy.use=alone", "rounds=2")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return simulate(tiny(*ALONE, private=False), out=tmp_path_factory.mktemp("runs") / "alone")


def kept(run, client, round):
    return load_file(run.folder / "personal" / f"{client}.{round}.safetensors")


def test_the_figures_are_those_of_clients_models_on_the_test_set(run, tiny):
    worker = Worker(prepare(tiny(*ALONE, private=False)).setup)
    rows, each = np.arange(len(worker.dataset.test)), []
    for client in range(4):
        sums = worker.task.evaluate(kept(run, client, 2), worker.dataset.test, rows)
        each.append(worker.task.figures(sums)["accuracy"])
    assert run.summary["accuracy"] == pytest.approx(np.mean(each), abs=1e-12)
    assert (run.summary["accuracy_least"], run.summary["accuracy_most"]) == (min(each), max(each))
    assert "what all of them began with, untrained" in (run.folder / "adapter" / "README.md").read_text()
    assert run.summary["majority"] == Dataset.open(worker.setup.dataset, worker.setup.partitions).majority
    assert [line["accuracy"] is None for line in run.rounds] == [False, False]  # four clients are few


def test_a_client_goes_on_from_its_own_tensors_and_meets_no_others(run, tiny, tmp_path):
    """The same client, whose fellows hold other rows and are other in number, ends the same."""
    some = simulate(tiny(*ALONE, "clients.per_round=2", "rounds=4", private=False), out=tmp_path / "some")
    took_part = [line["round"] for line in some.clients if line["client"] == 0]
    assert 0 < len(took_part) < 4
    first, second = kept(run, 0, 1), kept(run, 0, 2)
    assert first.keys() == second.keys() and all(".lora_A." not in name for name in first)
    assert all(not np.array_equal(first[name], second[name]) for name in first)
    apart = [kept(run, client, 2) for client in range(4)]
    assert all(not np.array_equal(apart[0][name], apart[1][name]) for name in apart[0])


def test_with_more_clients_than_a_few_the_test_set_is_met_at_the_end(tiny, tmp_path):
    made = simulate(tiny(*ALONE, "clients.total=11", private=False), out=tmp_path / "run")
    assert [line["accuracy"] is None for line in made.rounds] == [True, False]


def test_what_rests_in_a_round_stays_as_it_was(tiny, tmp_path):
    """RoLoRA trains B in round 1 and A in round 2; alone the client must still hold its B after the second."""
    made = simulate(tiny(*ALONE, "strategy.like=rolora", private=False), out=tmp_path / "run")
    one, two = kept(made, 0, 1), kept(made, 0, 2)
    assert all(".lora_A." not in name for name in one) and set(one) < set(two)
    for name in (n for n in one if ".lora_B." in n):
        np.testing.assert_array_equal(one[name], two[name])


def test_a_run_that_stops_early_is_judged_where_it_stopped(tiny, tmp_path):
    budget = ("privacy.noise_multiplier=1.0", "privacy.epsilon=2", "eval_every=5", "rounds=40")
    made = simulate(tiny(*ALONE, *budget), out=tmp_path / "run")
    assert "epsilon" in made.summary["stopped"] and made.summary["rounds"] < 40
    assert made.summary["accuracy_least"] <= made.summary["accuracy"] <= made.summary["accuracy_most"]


@pytest.mark.parametrize(
    "like, what",
    [
        ("fedsa_lora", "fedsa_lora keeps some of it"),
        ("{use: [1]}", "like is the name of a strategy"),
        ("ffa_lro", "ffa_lora"),
        ("{use: florist, tua: 1}", "has no option 'tua'"),
    ],
)
def test_likes_that_are_none(like, what, tiny):
    scenario = tiny(*ALONE, f"strategy.like={like}")
    with pytest.raises(SettingError, match=what):
        strategy.load("alone", scenario.strategy.options)


def test_sites_have_no_common_test_set(tiny):
    with pytest.raises(SettingError, match="which sites have not"):
        prepare_server(tiny(*ALONE))


def test_it_takes_the_kinds_that_the_other_takes():
    assert Alone(like="fed_sb").builds == "lora_xs"
    assert suitability.refuses(Alone(like="flexlora"), "core") == suitability.refuses(FlexLoRA(), "core")
    assert suitability.refuses(Alone(like="ffa_lora"), "core") is None
