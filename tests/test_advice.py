"""Signal and noise by hand, and alternatives that keep to the same examples and the same epsilon."""

import math

import pytest

from fedlora.advice import Signal
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.planning import plan
from fedlora.prepare import prepare
from fedlora.privacy import accounting
from fedlora.reports.planned import plan_lines

CLIENTS = ("privacy={unit: client, epsilon: 8, delta: 1.0e-2, clip_norm: 0.5}", "clients.use=sgd")


def test_the_noise_of_a_step_by_hand():
    """sigma C / (B sqrt(K)) = 2 * 0.5 / (8 * 2) = 1/16; of 256 numbers 16 times that; sqrt(25) times the ratio."""
    told = {"numbers": 256, "clients": 4, "steps": 25, "noise_multiplier": 2.0, "bound": 0.5}
    step = Signal(batch_size=8, **told)
    assert (step.noise, step.noise_length, step.ratio, step.run_ratio) == (1 / 16, 1.0, 0.5, 2.5)
    whole = Signal(batch_size=None, **told)  # on the sum over clients: 2 * 0.5 / 4
    assert (whole.noise, whole.noise_length, whole.run_ratio) == (1 / 4, 4.0, 0.625)


def test_the_noise_that_a_plan_tells_is_that_of_its_scenario(tiny):
    """Two layers, query and value, B of 32 x 4, and a head of 2 x 32 and 2; two rounds of two steps."""
    planned = plan(tiny("clients.per_round=2"))
    told = planned.signal
    median = sorted(group["num_examples"] for group in planned.groups)[-1]
    (noise,) = {g["noise_multiplier"] for g in planned.groups if g["num_examples"] == median}
    assert (told["numbers"], told["steps"], told["clients"]) == (512 + 66, 4, 2)
    assert told["noise"] == pytest.approx(noise / (8 * math.sqrt(2)))
    assert told["noise_length"] == pytest.approx(told["noise"] * math.sqrt(578))
    assert told["ratio"] == pytest.approx(1 / told["noise_length"])
    assert told["run_ratio"] == pytest.approx(2 * told["ratio"]) and planned.advice == []
    (line,) = [text for text in plan_lines(planned.to_json()) if text.startswith("  signal")]
    assert f"noise {told['noise_length']:.3g} long" in line


def test_clients_as_the_unit_have_the_noise_of_their_sum(tiny):
    told = plan(tiny(*CLIENTS, "clients.per_round=2")).signal
    sigma = accounting.calibrate(8, 1e-2, 0.5, 2)
    assert told["noise"] == pytest.approx(sigma * 0.5 / 2) and told["steps"] == 2 and told["batch_size"] is None
    assert plan(tiny(private=False)).signal is None


@pytest.fixture(scope="module")
def advised(tiny):
    scenario = tiny("rounds=16")
    return scenario, plan(scenario, advise=True)


def test_alternatives_have_as_many_examples_or_all_in_each_step_and_the_same_epsilon(advised):
    scenario, planned = advised
    told, typical = planned.advice, 48
    (now,) = [line for line in told if not line["set"]]
    assert now["run_ratio"] == planned.signal["run_ratio"] and now["bytes_up_total"] == planned.bytes_up_total
    assert len(told) > 4 and told == sorted(told, key=lambda line: -round(math.log(line["run_ratio"]) / 0.005))
    typical = max(prepare(scenario).data.sizes())
    for line in told:
        if "sample_rate=1.0" in line["set"]:
            assert (line["rounds"], line["local_steps"], line["batch_size"]) == (16, 1, typical)
        else:
            assert line["rounds"] * line["local_steps"] * line["batch_size"] == 16 * 2 * 8
        event = accounting.Event(
            noise_multiplier=line["noise_multiplier"],
            sample_rate=line["batch_size"] / typical,
            steps=line["rounds"] * line["local_steps"],
            clip_norm=1.0,
        )
        assert 7.5 < accounting.epsilon([event], 1e-3) <= 8 * 1.02
        by_hand = (
            math.sqrt(event.steps * 4) * line["batch_size"] / line["noise_multiplier"] / math.sqrt(line["numbers"])
        )
        assert line["run_ratio"] == pytest.approx(by_hand)


def test_what_is_advised_is_what_comes_of_typing_it(advised, tiny):
    """The settings load, and a plan of them has the ratio and the bytes that were told."""
    _, planned = advised
    best = planned.advice[0]
    assert best["set"] and best["run_ratio"] > planned.signal["run_ratio"]
    settings = [word.strip() for word in best["set"].split("--set ")[1:]]
    follows = plan(tiny("rounds=16", *settings))
    assert follows.signal["run_ratio"] == pytest.approx(best["run_ratio"], rel=0.01)
    assert follows.bytes_up_total == pytest.approx(best["bytes_up_total"], rel=0.01)  # a round's number is sent
    assert follows.bytes_down_total == pytest.approx(best["bytes_down_total"], rel=0.01)
    assert best["layers"] == [1] and best["r"] == 2 and best["numbers"] == 2 * 32 * 2 + 66


def test_a_batch_that_is_a_share_of_the_examples_is_advised_as_one(tiny):
    best = plan(tiny("rounds=16", "clients.sample_rate=0.125"), advise=True).advice[0]
    assert "--set clients.sample_rate=1.0" in best["set"] and "batch_size" not in best["set"]
    assert (best["rounds"], best["local_steps"]) == (16, 1)


def test_all_examples_in_each_step_are_advised_where_labels_are_many(tiny):
    """Without sampling the ratio of the run is the same for any number of rounds: more of them cost time."""
    scenario = tiny("rounds=30")
    whole = [line for line in plan(scenario, advise=True).advice if "sample_rate=1.0" in line["set"]]
    assert whole[0] is not None and all(line["rounds"] == 20 for line in whole)
    more = [
        plan(tiny("clients.sample_rate=1.0", "clients.local_steps=1", f"rounds={n}")).signal["run_ratio"]
        for n in (20, 80)
    ]
    assert more[0] == pytest.approx(more[1], rel=0.01)
    assert plan(tiny("clients.sample_rate=1.0", "rounds=30"), advise=True).advice[0]["local_steps"] == 2


def test_given_noise_is_advised_with_noise_of_the_same_epsilon(tiny):
    best = plan(tiny("rounds=16", "privacy={noise_multiplier: 1.0, delta: 1.0e-3}"), advise=True).advice[0]
    assert f"--set privacy.noise_multiplier={best['noise_multiplier']}" in best["set"]


def test_clients_as_the_unit_are_advised_fewer_rounds_of_more_steps(tiny):
    scenario = tiny(*CLIENTS, "clients.per_round=2", "rounds=16", "model.start=null")
    best = plan(scenario, advise=True).advice[0]
    assert best["rounds"] * best["local_steps"] == 32 and best["batch_size"] == 8
    assert best["noise_multiplier"] == accounting.calibrate(8, 1e-2, 0.5, best["rounds"])


def test_without_privacy_there_is_nothing_to_advise(tiny):
    with pytest.raises(UserError, match="privacy: without this section there is no noise to weigh"):
        plan(tiny(private=False), advise=True)


def test_the_command_says_what_to_type(tiny_yaml, tmp_path, capsys):
    (file := tmp_path / "tiny.yaml").write_text(tiny_yaml.replace("rounds: 2", "rounds: 16"))
    assert main(["plan", str(file), "--advise"]) == 0
    told = capsys.readouterr().out
    assert "times the ratio by  --set model.adapter.layers=[1] " in told and " as it is" in told
    assert max(map(len, told.splitlines())) < 300


def test_what_is_kept_of_the_frozen_layers_is_told_in_bytes(tiny):
    """Of each token of each row 32 numbers, in float32."""
    scenario = tiny("model.adapter.layers=[1]", "rounds=16")
    data = prepare(scenario).data
    tokens = len(data.train.tokens) + len(data.test.tokens)
    planned = plan(scenario)
    assert planned.frozen_bytes == tokens * 32 * 4
    assert any(line.startswith("  disk ") for line in plan_lines(planned.to_json()))
    assert plan(tiny("rounds=16")).frozen_bytes is None
