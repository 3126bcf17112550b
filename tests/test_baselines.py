"""Baselines: scenarios made of another, whose figures can be worked out by hand; and a run of each."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.baselines import derive
from fedlora.cli import _parser, main
from fedlora.errors import UserError
from fedlora.scenario import load, parse, written
from fedlora.scenario.baseline import KINDS, configuration
from fedlora.simulation import simulate

TEXT = """
name: s
seed: 3
data: {dataset: tweets, partition: {kind: dirichlet, alpha: 0.3}, client_test_share: 0.2}
clients: {total: 10, per_round: 5, use: dp_sgd, local_steps: 2, batch_size: 8, lr: 4.0}
privacy: {epsilon: 6, delta: 1.0e-5, clip_norm: 0.5}
strategy: {use: ffa_lora}
rounds: 30
"""
ADAM = "strategy.server={kind: adam, lr: 0.02, betas: [0.8, 0.95], eps: 1.0e-6, schedule: {kind: linear}}"


def made(kind, *overrides, text=TEXT):
    return derive(parse(text, "s.yaml", overrides), kind)


def refusal(kind, *overrides, text=TEXT):
    with pytest.raises(UserError) as caught:
        made(kind, *overrides, text=text)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_baseline_sees_as_many_examples(kind):
    """30 rounds of 5 clients, each 2 steps of 8 examples: 2,400."""
    one = made(kind)
    told = one.clients
    assert one.rounds * told.cohort_size * told.local_steps * told.batch_size == 2400
    assert (one.rounds, told.local_steps, one.seed, one.model, one.eval_every) == (30, 2, 3, parse(TEXT).model, 1)
    assert one.name == f"s.{kind}" and one.baseline.kind == kind
    assert len({one.hash, parse(TEXT).hash}) == 2


def test_pooled_is_one_client_without_privacy_at_a_rate_of_its_own():
    one = made("pooled", "privacy.clip=quantile")
    told = one.clients
    assert (told.total, told.per_round, told.batch_size, told.use, told.options) == (1, None, 40, "sgd", {})
    assert one.privacy is None and one.data.partition.kind == "iid" and one.data.client_test_share == 0.2
    assert told.lr == 0.5  # the default; 4 was for clipped gradients
    assert one.strategy.use == "ffa_lora"


@pytest.mark.parametrize(
    "override", [ADAM, "clients.optimizer=adamw", "privacy={unit: client, epsilon: 6, delta: 1.0e-5}"]
)
def test_a_rate_that_clipping_did_not_set_stays(override):
    """Adam's steps do not depend on the length of gradients, and with unit: client those are not clipped."""
    use = ("clients.use=sgd",) if "unit" in override else ()
    one = made("pooled", override, *use)
    assert one.clients.lr == 4.0 and one.clients.use == "sgd" and one.privacy is None


def test_pooled_private_is_one_client_under_the_same_promise():
    one = made("pooled_private", "privacy.clip=quantile", ADAM)
    told, whole = one.clients, parse(TEXT, "s.yaml", ["privacy.clip=quantile", ADAM])
    assert (told.total, told.batch_size, told.use, told.lr, told.options) == (1, 40, "dp_sgd", 4.0, {})
    assert one.privacy == whole.privacy and one.strategy == whole.strategy


def test_what_needs_others_goes():
    whole = load("noniid", ["clients.min_replies=3", "clients.retries=2", "clients.max_norm=2", "engine.fused=2"])
    asked = {"secure_aggregation": {}, "compression": {"down": {"kind": "int8"}}, "world": {"deadline": 60}}
    for key, value in asked.items():
        told = f"{key}={json.dumps(value)}"
        for kind in KINDS:
            one = made(kind, told, "clients.per_round=null") if key != "world" else made(kind, told)
            assert getattr(one, key) is None
    tiers = "clients.tiers={a: {share: 0.5, rank: 4}, b: {share: 0.5}}"
    for kind in KINDS:
        told = derive(whole, kind).clients
        assert (told.min_replies, told.retries, told.max_norm) == (1, 0, None)
        assert derive(whole, kind).engine.fused == (2 if kind == "alone" else 1)
        assert (made(kind, tiers, "strategy.use=flexlora").clients.tiers is None) == (kind != "alone")


def test_alone_each_client_keeps_its_rows_epsilon_and_steps():
    one, whole = made("alone"), parse(TEXT)
    assert one.privacy == whole.privacy and one.data == whole.data
    assert one.clients.model_dump() == whole.clients.model_dump()
    assert (one.strategy.use, one.strategy.options) == ("alone", {"like": "ffa_lora"})
    assert made("alone", "strategy={use: la_lora, low_pass: false}").strategy.options == {
        "like": {"use": "la_lora", "low_pass": False}
    }
    assert made("alone", "strategy.use=fed_sb").model.adapter.kind == "lora_xs"


def test_alone_clients_take_the_steps_of_a_server_with_adam():
    """A round of 2 local steps takes a number as far as one step of the server at 0.02: 0.01 each."""
    told = made("alone", ADAM).clients
    assert told.lr == 0.01 and told.schedule.kind == "linear"
    assert told.optimizer.model_dump(exclude={"weight_decay", "floor"}) == {
        "kind": "adamw",
        "state": "kept",
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "correct_noise": False,
    }
    roles = made("alone", ADAM, "strategy.server.lr={B: 0.02, head: 0.04}").clients.lr
    assert roles == {"B": 0.01, "head": 0.02}


def test_alone_clients_keep_what_others_would_average():
    averaged = "clients.optimizer={kind: adamw, state: averaged}"
    assert made("alone", averaged).clients.optimizer.state == "kept"
    assert made("pooled", averaged).clients.optimizer.state == "averaged"


def test_alone_clients_take_the_steps_of_a_server_with_momentum():
    """The server moves by its rate times a change of rate times gradient: the product of both."""
    server = "strategy.server={kind: momentum, lr: 0.5, momentum: 0.8}"
    told = made("alone", server, "clients.schedule={kind: cosine}").clients
    assert told.lr == 2.0 and told.schedule.kind == "cosine"
    assert (told.optimizer.kind, told.optimizer.momentum, told.optimizer.state) == ("sgd", 0.8, "kept")
    assert made("alone", server, "clients.lr={B: 4, head: 2}").clients.lr == {"B": 2.0, "head": 1.0}
    assert made("alone", server, "strategy.server.momentum=0").clients.optimizer is None


def test_what_it_is_a_baseline_of_is_the_same_for_every_seed_and_engine():
    of = {made(kind, seed).baseline.of for kind, seed in itertools.product(KINDS, ("seed=1", "seed=2"))}
    of |= {made("alone", "engine.kind=ray").baseline.of, made("alone", "trackers=[tensorboard]").baseline.of}
    assert of == {configuration(parse(TEXT).model_dump())}
    assert made("alone", "rounds=31").baseline.of not in of


@pytest.mark.parametrize(
    "kind, overrides, said",
    [
        ("pool", (), "unknown kind 'pool'"),
        ("pooled", ("strategy.use=fedsa_lora",), "strategy.use: fedsa_lora ends with a model for each"),
        ("pooled_private", ("privacy=null", "clients.use=sgd"), "has no privacy: take pooled"),
        ("pooled_private", ("privacy.unit=client", "clients.use=sgd"), "protects whole clients: take pooled"),
        ("alone", ("privacy.unit=client", "clients.use=sgd"), "privacy.unit: protects clients in what is made"),
        ("alone", (ADAM, "strategy.server.kind=yogi"), "no client takes steps of yogi"),
        ("alone", (ADAM, "clients.optimizer=adamw"), "alone a client takes one kind of steps"),
        ("alone", ("strategy.server={kind: momentum, schedule: {}}", "clients.schedule={}"), "has one schedule"),
        ("pooled", ("clients.use=mine:Private",), "is its own to say: take pooled_private"),
    ],
)
def test_a_scenario_without_such_a_baseline_is_refused_in_one_line(kind, overrides, said):
    told = refusal(kind, *overrides)
    assert said in told and "\n" not in told


def test_a_baseline_has_none_itself(tmp_path):
    (tmp_path / "s.yaml").write_text(made("pooled").to_yaml())
    with pytest.raises(UserError, match=r"s\.yaml:\d+: baseline: this is a baseline already, pooled"):
        derive(load(tmp_path / "s.yaml"), "alone")


def test_the_command_knows_every_kind():
    for kind in KINDS:
        assert _parser().parse_args(["simulate", "smoke", "--baseline", kind]).baseline == kind


@pytest.mark.parametrize("kind", KINDS)
def test_each_runs_from_the_command_line_and_goes_on(kind, small, capsys):
    assert main(["simulate", "smoke", "--baseline", kind]) == 0
    (folder,) = (small / "runs").iterdir()
    assert folder.name.startswith(f"tiny.{kind}-") and written(folder).baseline.kind == kind
    summary = json.loads((folder / "summary.json").read_text())
    assert np.isfinite(summary["accuracy"]) and summary["failures"] == 0
    assert (summary["epsilon"] is None) == (kind == "pooled") and (summary["epsilon"] or 0) <= 8
    holders = json.loads((folder / "partitions.json").read_text())["clients"]
    assert sum(c["num_examples"] for c in holders) == 180 and len(holders) == (4 if kind == "alone" else 1)
    assert main(["simulate", "smoke", "--baseline", kind, "--resume"]) == 0


@pytest.mark.parametrize(
    "server, tolerance",
    [
        ("null", 0.0),
        ("{kind: momentum, lr: 0.5, momentum: 0.8, schedule: {kind: linear}}", 1e-5),
        ("{kind: momentum, lr: 0.5, momentum: 0}", 1e-6),
        ("{kind: adam, lr: 0.02, eps: 1.0e-4, schedule: {kind: cosine, warmup: 0.3}}", 1e-5),
    ],
)
def test_alone_with_nobody_else_a_client_does_what_federating_does(server, tolerance, tiny, tmp_path):
    """With one client and one local step the server's steps are the client's: the two ways to write them agree."""
    one = ("clients.total=1", "clients.local_steps=1", "clients.lr=1", "rounds=4", f"strategy.server={server}")
    together = simulate(tiny(*one), out=tmp_path / "together")
    alone = simulate(tiny(*one), baseline="alone", out=tmp_path / "alone")
    whole = load_file(together.folder / "checkpoint" / "adapter.safetensors")
    kept = load_file(alone.folder / "personal" / "0.4.safetensors")
    for name, tensor in kept.items():
        np.testing.assert_allclose(tensor, whole[name], rtol=0, atol=tolerance)
    assert alone.summary["epsilon"] == together.summary["epsilon"]


def test_nothing_is_written_where_there_is_none(small, capsys):
    assert main(["simulate", "smoke", "--baseline", "pooled_private", "--set", "privacy.unit=client"]) == 2
    assert main(["simulate", "smoke", "--baseline", "alone", "--set", "strategy.use=fedsa_lora"]) == 2
    assert not (small / "runs").exists() and len(capsys.readouterr().err.splitlines()) == 2


def test_from_python(tiny, tmp_path):
    run = simulate(tiny("rounds=1"), baseline="pooled", out=tmp_path / "run")
    assert run.scenario["baseline"]["kind"] == "pooled" and run.summary["epsilon"] is None
