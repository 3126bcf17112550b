"""The server's optimiser: its arithmetic by hand, and runs that go on bit for bit."""

import numpy as np
import pytest

from fedlora import strategy, suitability
from fedlora.adapter import Slot
from fedlora.cli import main
from fedlora.errors import ScenarioError, SettingError
from fedlora.reports.console import Silent
from fedlora.rounds import server
from fedlora.rounds.checkpoint import read_tensors
from fedlora.scenario.learning import Schedule, ServerAdam, ServerMomentum
from fedlora.simulation import simulate

LAYOUT = {"b": Slot("b", (2,), "B", "m"), "head": Slot("head", (2,), "head", "head")}
ADAM = "strategy.server={kind: adam, lr: 0.02, schedule: {kind: cosine, warmup: 0.3}}"
YOGI = "strategy.server={kind: yogi, lr: {B: 0.02, head: 0.01}}"
HEAVY = "strategy.server={kind: momentum, lr: 0.5, momentum: 0.5}"


def array(*numbers):
    return np.array(numbers, np.float32)


def made(told, rounds=10):
    return server.make(told, LAYOUT, ["b", "head"], rounds)


def adapter(run):
    return read_tensors(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_momentum_adds_up_changes():
    """d = 1, then 1: m = 1, then 1.5; x = 0.5, then 1.25."""
    stage = made(ServerMomentum(kind="momentum", lr=0.5, momentum=0.5))
    first = stage.step(1, {"b": array(0, 0)}, {"b": array(1, -1)})
    second = stage.step(2, first, {"b": first["b"] + array(1, -1)})
    assert first["b"].tolist() == [0.5, -0.5] and second["b"].tolist() == [1.25, -1.25]


def test_momentum_of_nothing_is_the_mean_itself():
    stage, mean = made(ServerMomentum(kind="momentum", momentum=0)), {"b": array(0.3, -0.7)}
    assert np.allclose(stage.step(1, {"b": array(1, 2)}, mean)["b"], mean["b"], atol=1e-7)


def test_adam_by_hand():
    """betas 1/2 and 3/4, d = 2, then 0.

    m = 1, v = 1, m' = 2, v' = 4: one rate; then m = 1/2, v = 3/4, m' = 2/3, v' = 12/7: 0.50918 of a rate.
    """
    stage = made(ServerAdam(kind="adam", lr=0.1, betas=(0.5, 0.75)))
    first = stage.step(1, {"b": array(0, 0)}, {"b": array(2, -2)})
    assert np.allclose(first["b"], [0.1, -0.1], atol=1e-7)
    second = stage.step(2, first, dict(first))
    assert np.allclose(second["b"] - first["b"], [0.1 * (2 / 3) / (12 / 7) ** 0.5] * np.array([1, -1]), atol=1e-7)


def test_yogi_by_hand():
    """b2 = 3/4, d = 2, then 1: v = 4, then 4 - 1/4 * 1 = 3.75; m' = (0.5 * 1 + 0.5) / 0.75 = 4/3."""
    stage = made(ServerAdam(kind="yogi", lr=1.0, betas=(0.5, 0.75)))
    first = stage.step(1, {"b": array(0, 0)}, {"b": array(2, 2)})
    second = stage.step(2, first, {"b": first["b"] + array(1, 1)})
    assert np.allclose(first["b"], 1, atol=1e-6)
    assert np.allclose(second["b"] - first["b"], (4 / 3) / 3.75**0.5, atol=1e-6)


def test_a_tensor_that_was_not_sent_stands_still_and_keeps_its_own_count():
    stage = made(ServerAdam(kind="adam", lr=0.1))
    stage.step(1, {"b": array(0, 0), "head": array(0, 0)}, {"b": array(1, 1)})
    second = stage.step(2, {"b": array(1, 1), "head": array(0, 0)}, {"head": array(1, -1)})
    assert set(second) == {"head"} and np.allclose(second["head"], [0.1, -0.1], atol=1e-6)  # as in a first round


def test_rates_by_role_and_a_schedule():
    """Linear over four rounds, the first of which warms up: 1, then 1, 2/3, 1/3 of the rate."""
    told = ServerMomentum(
        kind="momentum", lr={"B": 1.0, "head": 2.0}, momentum=0, schedule=Schedule(kind="linear", warmup=0.25)
    )
    stage, zero = made(told, rounds=4), {"b": array(0, 0), "head": array(0, 0)}
    moved = [stage.step(r, zero, {"b": array(3, 3), "head": array(3, 3)}) for r in (1, 2, 3, 4)]
    assert np.allclose([float(m["b"][0]) for m in moved], [3, 3, 2, 1], atol=1e-6)
    assert np.allclose([float(m["head"][0]) for m in moved], [6, 6, 4, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("told", "factors"),
    [
        (Schedule(kind="constant", warmup=0.5), [0.5, 1, 1, 1]),
        (Schedule(kind="linear"), [1, 0.75, 0.5, 0.25]),
        (Schedule(kind="linear", end=0.5), [1, 0.875, 0.75, 0.625]),
        (Schedule(kind="cosine"), [1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules_by_hand(told, factors):
    assert np.allclose([told.factor(step, 4) for step in (1, 2, 3, 4)], factors, atol=1e-7)


def test_what_it_holds_comes_back():
    one, other = made(ServerAdam(kind="adam")), made(ServerAdam(kind="adam"))
    one.step(1, {"b": array(0, 0)}, {"b": array(1, 2)})
    rest = other.load_state({**one.state(), "theirs": 1})
    assert rest == {"theirs": 1}
    step = [stage.step(2, {"b": array(0, 0)}, {"b": array(3, 1)}) for stage in (one, other)]
    assert same(*step)


@pytest.mark.parametrize(
    "told",
    [
        (ADAM,),
        (YOGI,),
        (ADAM, "strategy.use=rolora"),
        (HEAVY, "world={concurrency: 3, spread: 0.3}"),
        (ADAM, "strategy.shrink={strength: 0.2}"),
        (ADAM, "privacy={unit: client, epsilon: 20, delta: 1.0e-2}", "clients.use=sgd", "clients.per_round=2"),
    ],
    ids=["adam", "yogi", "rolora", "fedbuff", "shrunk", "unit-client"],
)
def test_a_run_goes_on_bit_for_bit(told, tiny, tmp_path):
    class Stop(Silent):
        def round(self, line):
            if line["round"] == 2:
                raise KeyboardInterrupt

    scenario = tiny("rounds=4", *told)
    whole = simulate(scenario, out=tmp_path / "whole")
    folder = simulate(scenario, out=tmp_path / "cut", display=Stop()).folder
    done = simulate(scenario, out=folder, resume=True)
    assert [line["round"] for line in done.rounds] == [1, 2, 3, 4] and same(adapter(whole), adapter(done))
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


def test_it_costs_no_epsilon_and_changes_what_is_made(tiny, tmp_path):
    plain, stepped = (simulate(tiny(*told), out=tmp_path / str(len(told))) for told in ((), (ADAM,)))
    assert plain.summary["epsilon"] == stepped.summary["epsilon"]
    assert not same(adapter(plain), adapter(stepped))


def test_a_step_of_one_on_the_mean_is_the_run_without(tiny, tmp_path):
    told = "strategy.server={kind: momentum, momentum: 0, lr: 1.0}"
    plain, stepped = (adapter(simulate(tiny(*t), out=tmp_path / str(len(t)))) for t in ((), (told,)))
    assert all(np.allclose(plain[name], stepped[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("use", ["flora", "fedsvd", "lora_fair", "flwr.serverapp.strategy:FedAdam"])
def test_what_is_no_mean_is_refused(use, tiny):
    scenario = tiny(f"strategy.use={use}", ADAM)
    with pytest.raises(SettingError, match="adam steps along a mean of changes"):
        suitability.check(strategy.load(use, {}), scenario)


@pytest.mark.parametrize(
    ("told", "where", "why"),
    [
        ("{kind: adam, lr: {B: 0.1}}", "strategy.server.lr", "has no learning rate for 'head'"),
        (
            "{kind: adam, lr: {B: 0.1, head: 0.1, R: 1}}",
            "strategy.server.lr.R",
            "is 'R': A, B, head",
        ),
    ],
)
def test_rates_are_for_the_roles_that_there_are(told, where, why, tiny, tmp_path):
    with pytest.raises(Exception, match=rf"{where}: .*{why}"):
        simulate(tiny(f"strategy.server={told}"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("{kind: adan}", "strategy.server: unknown kind 'adan'"),
        ("{kind: adam, beta: 0.9}", "unknown key 'beta' in strategy.server: did you mean 'betas'"),
        ("{kind: momentum, betas: [0.9, 0.99]}", "unknown key 'betas' in strategy.server"),
        ("{kind: adam, lr: 0}", "strategy.server.lr: should be at least 1e-12"),
        ("{kind: adam, lr: {B: 0}}", "strategy.server.lr.B: should be at least 1e-12"),
        ("{kind: adam, lr: fast}", "strategy.server.lr: should be a number, not 'fast'"),
        ("{kind: adam, betas: [0.9]}", "strategy.server.betas"),
        ("{kind: adam, betas: [0.9, 1]}", "strategy.server.betas.1: should be less than 1"),
        ("{kind: adam, schedule: {kind: step}}", "strategy.server.schedule.kind: should be"),
        ("{kind: adam, schedule: {warmup: 1}}", "strategy.server.schedule.warmup: should be less than 1"),
    ],
)
def test_slips_are_told_by_line(told, why, tiny):
    with pytest.raises(ScenarioError) as caught:
        tiny(f"strategy.server={told}")
    assert len(caught.value.lines) == 1 and why in caught.value.lines[0]


def test_the_command_names_the_line_and_writes_nothing(tiny_yaml, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(tiny_yaml.replace("{use: ffa_lora}", "{use: flora, server: {kind: adam}}"))
    line = file.read_text().splitlines().index("strategy: {use: flora, server: {kind: adam}}") + 1
    assert main(["simulate", str(file), "--out", str(tmp_path / "run")]) == 2
    assert f"{file}:{line}: strategy.server: adam steps along" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
