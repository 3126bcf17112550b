"""Optimisers, schedules and rates by role of clients, in runs."""

import dataclasses

import numpy as np
import pytest

from fedlora.client import Setter
from fedlora.clients.dp_sgd import DPSGD
from fedlora.clients.sgd import SGD
from fedlora.errors import ScenarioError, SettingError
from fedlora.reports.console import Silent
from fedlora.rounds.checkpoint import Personal, read_tensors
from fedlora.simulation import simulate
from fedlora.strategy import load

ADAMW = "clients.optimizer={kind: adamw, betas: [0.8, 0.9]}"
AVERAGED = "clients.optimizer={kind: adamw, state: averaged}"
KEPT = "clients.optimizer={kind: adamw, state: kept}"
COSINE = "clients.schedule={kind: cosine, warmup: 0.25}"
ROLES = "clients.lr={A: 0.05, B: 0.2, head: 0.1}"
SLOW = "clients.lr=0.01"


def adapter(run):
    return read_tensors(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


class Own(SGD):
    """A client of one's own, its optimiser in the place of the built-in one."""

    def optimizer(self, parameters, settings):
        import torch

        return torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.8, 0.9), weight_decay=0.0)


class OwnPrivate(DPSGD):
    """The same, private."""

    optimizer = Own.optimizer


class Fit(SGD):
    """A client that steps by itself."""

    hooked = False


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs by what they were told, each once."""
    made = {}

    def run(*told, private=True):
        if (told, private) not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            made[told, private] = simulate(tiny(*told, private=private), out=folder)
        return made[told, private]

    return run


@pytest.mark.parametrize("private", [True, False])
def test_plain_sgd_by_name_is_the_run_without_it(private, runs):
    assert same(adapter(runs(private=private)), adapter(runs("clients.optimizer=sgd", private=private)))


@pytest.mark.parametrize("told", [ADAMW, COSINE, "clients.optimizer=RMSprop", "clients.lr={B: 0.5, head: 0.1}"])
def test_it_changes_what_is_made_and_not_what_it_costs(told, runs):
    plain, other = runs(), runs(told)
    assert not same(adapter(plain), adapter(other)) and plain.summary["epsilon"] == other.summary["epsilon"]


@pytest.mark.parametrize("private", [True, False])
def test_one_of_ones_own_is_as_the_built_in(private, runs):
    """Under privacy where the built-in one leaves the noise in."""
    use = "OwnPrivate" if private else "Own"
    kind = "clients.optimizer={kind: adamw, betas: [0.8, 0.9], correct_noise: false}"
    own = adapter(runs(f"clients.use=tests.optimizers.test_contract:{use}", SLOW, private=private))
    built_in = adapter(runs(kind, SLOW, private=private))
    assert all(np.allclose(own[name], built_in[name], atol=1e-5) for name in own)


@pytest.mark.parametrize(
    "told", [(ADAMW, SLOW), (ADAMW, COSINE, "strategy.use=fedavg_lora", ROLES), (KEPT, SLOW), (AVERAGED, SLOW)]
)
def test_fused_clients_step_as_one_alone(told, runs):
    alone, fused = adapter(runs(*told)), adapter(runs(*told, "engine.fused=3"))
    assert all(np.allclose(alone[name], fused[name], atol=1e-5) for name in alone)


def test_rates_by_role_that_are_equal_are_one(runs):
    one, roles = (adapter(runs(told)) for told in ("clients.optimizer=sgd", "clients.lr={B: 0.5, head: 0.5}"))
    assert all(np.allclose(one[name], roles[name], atol=1e-6) for name in one)


def test_settings_follow_the_schedule(tiny):
    """Two rounds of two steps, linear: 1, 3/4, then 1/2, 1/4 of the rate."""
    scenario = tiny("clients.schedule={kind: linear}", "clients.lr={B: 0.4, head: 0.8}", private=False)
    strategy = load("ffa_lora", {})
    told = [Setter(scenario, None)(dataclasses.replace(strategy.instruct(r, {}), round=r), 5) for r in (1, 2)]
    assert [one.lrs for one in told] == [{"B": 0.4, "head": 0.8}, {"B": 0.2, "head": 0.4}]
    assert [one.lr for one in told] == [0.8, 0.4] and [one.pace for one in told] == [(1.0, 0.75), (1.0, 0.5)]


@pytest.mark.parametrize(
    "told",
    [
        (KEPT, SLOW),
        (KEPT, COSINE, "strategy.use=rolora", SLOW),
        (KEPT, SLOW, "engine.fused=2"),
        (KEPT, SLOW, "world={concurrency: 3, spread: 0.3}"),
        (AVERAGED, COSINE, "strategy.use=rolora", SLOW),
        (AVERAGED, SLOW, "world={concurrency: 3, spread: 0.3}"),
        ("clients.optimizer={kind: NAdam, state: kept}", SLOW, COSINE),
        ("clients.optimizer={kind: sgd, momentum: 0.9, state: kept}", "strategy.use=la_lora", ROLES),
        (ADAMW, COSINE, "strategy.use=la_lora", SLOW, "strategy.server={kind: adam}"),
    ],
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


def test_a_kept_state_goes_on_and_stays_with_its_client(runs):
    """Two rounds of two steps: four steps in all; kept and fresh part ways in the second round."""
    kept, fresh = runs(KEPT, SLOW), runs("clients.optimizer=adamw", SLOW)
    state = Personal(kept.folder / "personal" / "optimizer").load(1, before=3)
    assert {float(v) for n, v in state.items() if n.endswith("/step")} == {4.0}
    assert {n.rpartition("/")[2] for n in state} == {"step", "exp_avg", "exp_avg_sq", "noise"}
    assert not (fresh.folder / "personal").exists() and not same(adapter(kept), adapter(fresh))
    assert kept.summary["bytes_up_total"] == fresh.summary["bytes_up_total"]


@pytest.mark.parametrize(
    ("told", "where", "why"),
    [
        ("clients.optimizer=adan", "clients.optimizer", "torch.optim has no 'adan': did you mean"),
        ("clients.optimizer={kind: RMSprop, beta: 1}", "clients.optimizer.beta", "RMSprop has no option 'beta'"),
        ("clients.optimizer={kind: RMSprop, lr: 1}", "clients.optimizer.lr", "the learning rate is clients.lr"),
        ("clients.optimizer={kind: RMSprop, alpha: -1}", "clients.optimizer", "RMSprop cannot step here: Invalid"),
        ("clients.optimizer={kind: sgd, nesterov: true}", "clients.optimizer", "sgd cannot step here: Nesterov"),
        ("clients.optimizer=LBFGS", "clients.optimizer", "LBFGS cannot step here"),
        ("clients.lr={B: 1}", "clients.lr", "has no learning rate for 'head'"),
        ("clients.lr={B: 1, head: 1, C: 1}", "clients.lr.C", "no tensor of this adapter is 'C'"),
    ],
)
def test_what_cannot_step_is_refused_before_anything_is_written(told, where, why, tiny, tmp_path):
    with pytest.raises(Exception, match=rf"--set .*: {where}: .*{why}"):
        simulate(tiny(told), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("use", "why"),
    [("Fit", "Fit does not step by `self.optimizer`"), ("Own", "Own makes an optimiser of its own")],
)
def test_clients_that_step_by_themselves_are_not_told_how(use, why, tiny, tmp_path):
    told = (f"clients.use=tests.optimizers.test_contract:{use}", "clients.optimizer=adamw")
    with pytest.raises(Exception, match=f"clients.optimizer: .*:{why}"):
        simulate(tiny(*told, private=False), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("{kind: adamw, beta: 0.9}", "unknown key 'beta' in clients.optimizer: did you mean 'betas'"),
        ("{kind: sgd, betas: [0, 0]}", "unknown key 'betas' in clients.optimizer"),
        ("{kind: adamw, betas: [0.9, 1]}", "clients.optimizer.betas.1: should be less than 1"),
        (
            "{kind: NAdam, state: averaged}",
            "state: averaged is for adamw, whose second moment counts its own steps: NAdam takes fresh or kept",
        ),
        ("{kind: adamw, state: lost}", "clients.optimizer.state: should be"),
        ("{state: kept}", "clients.optimizer.kind is missing"),
    ],
)
def test_slips_are_told_by_line(told, why, tiny):
    with pytest.raises(ScenarioError) as caught:
        tiny(f"clients.optimizer={told}")
    assert len(caught.value.lines) == 1 and why in caught.value.lines[0]


def test_an_audit_reads_plain_steps(tiny):
    from fedlora.audit import audit

    with pytest.raises((SettingError, Exception), match=r"clients\.optimizer: an audit reads plain steps of SGD"):
        audit(tiny(ADAMW))
