"""Secure aggregation around an engine: the plain mean comes out, and nothing else does."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora import engine as engines
from fedlora import secure
from fedlora.adapter import Instruction, weighted_mean
from fedlora.engine.inline import InlineEngine
from fedlora.engine.secure import SecureEngine
from fedlora.errors import RoundError, UserError
from fedlora.simulation import calibrate, prepare, simulate
from fedlora.strategies.ffa_lora import FFALoRA

TWENTY = ("clients.total=20", "clients.batch_size=4", "clients.use=tests.engine.faulty:Flaky")
MASKED = "secure_aggregation={range: 2.0, survivors: 0.7}"


@pytest.fixture(scope="module")
def plain(tiny):
    ready = prepare(tiny(*TWENTY))
    engine = InlineEngine(20)
    engine.start(replace(ready.setup, noise=calibrate(ready.scenario, ready.data)))
    return engine


def instruct(engine, **config):
    made = FFALoRA()
    told = engine.description
    made.bind(told.layout, told.kind, told.initial, True)
    asked = made.instruct(1, told.initial, [4])
    return Instruction(round=1, adapter=asked.adapter, train=asked.train, send=asked.send, config=config)


@pytest.mark.parametrize("lost", ["", "1,4,5,12,19"], ids=["all", "five dropouts"])
def test_the_mean_is_the_plain_one_to_quantisation(plain, lost, monkeypatch):
    seen = []
    monkeypatch.setattr(
        secure.Collector, "total", lambda s, m, h, total=secure.Collector.total: seen.append(m) or total(s, m, h)
    )
    told = instruct(plain, lose=lost)
    expected = plain.train(told, range(20), partial_sums=False)
    guarded = SecureEngine(plain, seed=3, largest=2.0, share=0.7)
    guarded.description = plain.description
    replies = guarded.train(told, range(20), partial_sums=True)

    (update,) = replies.updates
    left = tuple(c for c in range(20) if str(c) not in lost.split(","))
    assert update.clients == left and update.weight == len(left) and update.metrics == {}
    for name, tensor in weighted_mean(expected.updates).items():
        np.testing.assert_allclose(update.adapter[name], tensor, rtol=0, atol=2.0 / 2**19 + 1e-6)
    assert sum(r.error is not None for r in replies.reports) == 20 - len(left)
    assert all(r.metrics == {} for r in replies.reports) and replies.reports[0].event is not None
    (masked,) = seen  # all of the updates that the server is given
    for one in expected.updates:
        flat = np.concatenate([(one.adapter[n] - told.adapter[n]).ravel() for n in told.send])
        shown = masked[one.clients[0]].view(np.int32).astype(np.float64)
        assert abs(np.corrcoef(flat, shown)[0, 1]) < 5 / len(flat) ** 0.5


def test_too_many_dropouts_end_the_round(plain):
    guarded = SecureEngine(plain, seed=3, largest=2.0, share=0.7)
    guarded.description = plain.description
    replies = guarded.train(instruct(plain, lose=",".join(map(str, range(7)))), range(20), partial_sums=True)
    assert not replies.updates and "too many dropped out" in replies.reports[19].error
    assert all(r.error and r.event for r in replies.reports)  # what they spent counts


def test_a_run_under_secure_aggregation_is_the_run_without(tiny, tmp_path):
    one = simulate(tiny(), out=tmp_path / "plain")
    other = simulate(tiny(MASKED), out=tmp_path / "masked")
    assert other.summary["loss"] == pytest.approx(one.summary["loss"], abs=1e-3)
    assert other.summary["epsilon"] == one.summary["epsilon"]
    assert other.summary["bytes_up_total"] > one.summary["bytes_up_total"]
    again = simulate(tiny(MASKED), out=tmp_path / "again")
    assert again.summary["loss"] == other.summary["loss"]  # masks cancel to the bit, whatever they were


def test_with_clients_protected_whole_and_a_bound_that_adapts(tiny, tmp_path):
    whole = "privacy={unit: client, noise_multiplier: 0.09, delta: 1.0e-2, clip_norm: 0.5, quantile: 0.5}"
    settings = ("clients.use=sgd", "rounds=3", whole)
    one = simulate(tiny(*settings), out=tmp_path / "plain")
    other = simulate(tiny(*settings, MASKED), out=tmp_path / "masked")
    assert other.summary["loss"] == pytest.approx(one.summary["loss"], abs=1e-3)
    assert other.summary["epsilon"] == one.summary["epsilon"]


def test_a_change_beyond_the_range_fails_its_client(tiny, tmp_path):
    with pytest.raises(RoundError, match=r"secure_aggregation\.range is 1e-06"):
        simulate(tiny("secure_aggregation.range=1.0e-6"), out=tmp_path / "run")


@pytest.mark.parametrize("use", ["flexlora", "fedask", "flwr.serverapp.strategy:FedMedian"])
def test_strategies_that_need_each_update_are_refused(tiny, tmp_path, use):
    with pytest.raises(UserError, match="secure aggregation gives sums"):
        simulate(tiny(MASKED, f"strategy.use={use}"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_it_goes_around_whichever_engine_runs_the_clients(tiny):
    made = engines.make(tiny(MASKED))
    assert isinstance(made, SecureEngine) and isinstance(made.inner, InlineEngine)
