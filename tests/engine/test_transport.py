"""Compression on the way, in whole runs and by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.adapter import Instruction, Update
from fedlora.engine.transport import Transport
from fedlora.errors import ScenarioError, UserError
from fedlora.privacy.mechanisms.central import CLIP_NORM, WITHIN
from fedlora.rounds.checkpoint import Personal
from fedlora.simulation import simulate
from fedlora.strategies.fedavg_lora import FedAvgLoRA

BOTH = "compression={up: {kind: int8}, down: {kind: fp16}}"
MASK = "compression={up: {kind: mask, share: 0.5}}"
TOP = "compression={up: {kind: top_k, share: 0.1}}"


def final(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def asked(start, round=1, **config):
    return Instruction(round=round, adapter={"w": start}, train=("w",), send=("w",), config=config)


def update(tensor, **metrics):
    return Update(adapter={"w": np.asarray(tensor, np.float32)}, weight=1.0, clients=(2,), metrics=metrics)


def test_a_client_trains_from_what_arrives_and_the_servers_own_stays_exact(tiny):
    """1/3 is no fp16; a client that moves what it got by 1/4 moves the server's 1/3 by 1/4."""
    way = Transport(tiny("compression={down: {kind: fp16}}"), FedAvgLoRA())
    told = asked(np.full(4, 1 / 3, np.float32))
    got = way.received(told, 4)
    assert (got.adapter["w"] != told.adapter["w"]).all() and abs(got.adapter["w"] - told.adapter["w"]).max() < 4e-4
    assert same(got.adapter, way.received(told, 4).adapter)  # every client gets the same
    sent = way.outgoing(update(got.adapter["w"] + np.float32(0.25)), got)
    after = way.arrived(way.passed(sent, told), told)
    np.testing.assert_allclose(after.adapter["w"], np.full(4, 1 / 3 + 0.25), rtol=1e-6)


def test_what_top_k_leaves_out_is_sent_later_and_a_round_run_again_sends_the_same(tiny, tmp_path):
    way = Transport(tiny("compression={up: {kind: top_k, share: 0.5}}"), FedAvgLoRA(), Personal(tmp_path))
    told = asked(np.zeros(2, np.float32))

    def play(round):
        here = replace(told, round=round)
        return way.passed(way.outgoing(update([3.0, 2.0]), here), here).adapter["w"].tolist()

    assert [play(1), play(2), play(2), play(3)] == [[3, 0], [0, 4], [0, 4], [6, 0]]


def test_a_change_that_rounding_made_longer_is_clipped_again(tiny):
    way = Transport(tiny("compression={up: {kind: int4}}"), FedAvgLoRA())
    rng = np.random.default_rng(1)
    change = rng.normal(size=300)
    told = asked(np.zeros(300, np.float32), **{CLIP_NORM: 1.0})
    sent = way.outgoing(update(change / np.linalg.norm(change), **{WITHIN: 0.0}), told)
    passed = way.passed(sent, told)
    assert np.linalg.norm(passed.adapter["w"]) > 1.001
    got = way.arrived(passed, told)
    assert np.linalg.norm(got.adapter["w"]) <= 1 + 1e-6 and got.metrics == {WITHIN: 0.0}


def test_a_mask_is_each_clients_own_in_each_round_and_the_same_when_that_is_run_again(tiny):
    way = Transport(tiny("compression={up: {kind: mask, share: 0.1}}"), FedAvgLoRA())
    told = asked(np.zeros(400, np.float32))

    def places(client, round):
        here = replace(told, round=round)
        sent = way.outgoing(replace(update(np.ones(400)), clients=(client,)), here)
        got = way.passed(sent, here).adapter["w"]
        assert set(got) == {0.0, 10.0}
        return set(np.flatnonzero(got))

    drawn = [places(1, 1), places(2, 1), places(1, 2)]
    assert places(1, 1) == drawn[0] and all(len(one) == 40 for one in drawn)
    assert all(len(one & other) < 20 for i, one in enumerate(drawn) for other in drawn[:i])


@pytest.mark.parametrize("told", [BOTH, TOP, MASK])
def test_an_interrupted_run_goes_on_bit_for_bit(tiny, tmp_path, told):
    noise = ("privacy.epsilon=null", "privacy.noise_multiplier=1.0")
    whole = simulate(tiny(told, *noise, "rounds=4"), out=tmp_path / "whole")
    simulate(tiny(told, *noise, "rounds=2"), out=tmp_path / "part")
    part = simulate(tiny(told, *noise, "rounds=4"), out=tmp_path / "part", resume=True)
    assert same(final(whole), final(part))
    plain = simulate(tiny(*noise, "rounds=4"), out=tmp_path / "plain")
    assert not same(final(whole), final(plain)) and whole.summary["bytes_up_total"] < (
        0.75 * plain.summary["bytes_up_total"]
    )
    events = [(run.folder / "privacy.jsonl").read_text().splitlines() for run in (whole, plain)]
    assert [json.loads(x)["steps"] for x in events[0]] == [json.loads(x)["steps"] for x in events[1]]


def test_rounded_updates_learn_as_well(tiny, tmp_path):
    runs = [
        simulate(tiny(*told, "rounds=5", "clients.lr=0.2", private=False), out=tmp_path / str(i))
        for i, told in enumerate([(), (BOTH,), (TOP,), (MASK, "strategy.use=flexlora")])
    ]
    losses = [run.summary["loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[2] < runs[2].rounds[0]["loss"]
    assert losses[3] < runs[3].rounds[0]["loss"]  # right on average, it takes any strategy


def test_secure_aggregation_goes_with_less_on_the_way_down(tiny, tmp_path):
    secure = "secure_aggregation={range: 2.0}"
    run = simulate(tiny(secure, "compression={down: {kind: int8}}", private=False), out=tmp_path / "a")
    plain = simulate(tiny(secure, private=False), out=tmp_path / "b")
    assert run.summary["failures"] == 0 and run.summary["bytes_down_total"] < plain.summary["bytes_down_total"]
    with pytest.raises(ScenarioError, match=r"compression=.*: secure aggregation sends whole numbers of its own"):
        tiny(secure, BOTH, private=False)
    with pytest.raises(ScenarioError, match=r"compression=.*: secure aggregation sends whole numbers of its own"):
        tiny(secure, MASK, private=False)  # each client's mask is its own, so that a sum of them has no meaning


def test_what_cannot_be_is_one_line(tiny, tmp_path):
    with pytest.raises(
        UserError, match=r"compression.up: what top_k leaves out .* flexlora is no mean of changes"
    ):
        simulate(tiny(TOP, "strategy.use=flexlora"), out=tmp_path / "run")
    with pytest.raises(ScenarioError, match=r"compression.down.kind: should be 'fp16', 'bf16', 'int8' or 'int4'"):
        tiny("compression={down: {kind: top_k}}")
    with pytest.raises(ScenarioError, match=r"compression.up.share: should be .* equal to 0.001, not 0"):
        tiny("compression={up: {kind: mask, share: 0}}")
    with pytest.raises(ScenarioError, match="unknown kind 'zip'"):
        tiny("compression={up: {kind: zip}}")
