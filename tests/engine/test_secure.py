"""Secure aggregation around an engine: the plain mean comes out, and nothing else does."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from fedlora import engine as engines
from fedlora.adapter import Instruction, Update, weighted_mean
from fedlora.engine.inline import InlineEngine
from fedlora.engine.secure import SecureEngine, mean, to_vector
from fedlora.errors import ContractError, RoundError, UserError
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import grid, ledger
from fedlora.privacy.collector import Collector, Sum
from fedlora.privacy.mechanisms import central
from fedlora.privacy.noise import Stream
from fedlora.scenario import SecureAggregation
from fedlora.seeding import stream
from fedlora.simulation import simulate
from fedlora.strategies.ffa_lora import FFALoRA

TWENTY = ("clients.total=20", "clients.batch_size=4", "clients.use=tests.engine.faulty:Flaky")
ASKED = SecureAggregation(range=2.0, survivors=0.7)
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
        Collector, "total", lambda s, m, h, total=Collector.total: seen.append(m) or total(s, m, h)
    )
    told = instruct(plain, lose=lost)
    expected = plain.train(told, range(20), partial_sums=False)
    guarded = SecureEngine(plain, seed=3, asked=ASKED, most=20)
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
    assert not set(masked) & set(range(20))  # by pseudonym
    for one in expected.updates:
        flat = np.concatenate([(one.adapter[n] - told.adapter[n]).ravel() for n in told.send])
        for vector in masked.values():
            shown = vector.view(np.int32).astype(np.float64)
            assert abs(np.corrcoef(flat, shown)[0, 1]) < 5 / len(flat) ** 0.5


def test_too_many_dropouts_end_the_round(plain):
    guarded = SecureEngine(plain, seed=3, asked=ASKED, most=20)
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
    whole = "privacy={unit: client, noise_multiplier: 0.09, delta: 1.0e-2, clip_norm: 0.5, clip: quantile}"
    settings = ("clients.use=sgd", "rounds=3", whole)
    one = simulate(tiny(*settings), out=tmp_path / "plain")
    other = simulate(tiny(*settings, MASKED), out=tmp_path / "masked")
    assert other.summary["loss"] == pytest.approx(one.summary["loss"], abs=1e-3)
    assert other.summary["epsilon"] == one.summary["epsilon"]


def test_a_change_beyond_the_range_fails_its_client_and_is_not_told(tiny, tmp_path):
    with pytest.raises(RoundError, match=r"a number changed by more than secure_aggregation\.range, 1e-06; 0 of"):
        simulate(tiny("secure_aggregation.range=1.0e-6"), out=tmp_path / "run")


def test_where_clients_are_protected_whole_a_change_beyond_the_range_is_cut_and_no_number_fails():
    """The bound of 5 has adapted beyond the range of 1: of (3, 0.25, -4) the sum has (1, 0.25, -1)."""
    held = {"w": np.zeros(3, np.float32)}
    told = Instruction(round=1, adapter=held, train=("w",), send=("w",), config={central.CLIP_NORM: 5.0})
    update = Update(adapter={"w": np.array([3, 0.25, -4], np.float32)}, weight=1.0, clients=(0,))
    vector = to_vector(told, update, 3, 3, 1.0, lambda _: Stream.fresh())
    assert grid.dequantise(vector, 1.0) == pytest.approx([1, 0.25, -1], abs=2**-18)


def test_a_change_is_no_longer_than_the_bound_when_it_is_rounded():
    """A bound of some 50 steps over 400 numbers, of which rounding alone may be 20 steps long."""
    held, bound = {"w": np.zeros(400, np.float32)}, 1e-4
    told = Instruction(round=1, adapter=held, train=("w",), send=("w",), config={central.CLIP_NORM: bound})
    for k in range(20):
        drawn = np.random.default_rng(k).normal(0, 1, 400)
        update = Update(
            adapter={"w": (drawn * bound / np.linalg.norm(drawn)).astype(np.float32)}, weight=1.0, clients=()
        )
        vector = to_vector(told, update, 3, 3, 1.0, lambda _, k=k: stream(k, "test"))
        assert np.linalg.norm(grid.dequantise(vector, 1.0)) <= bound
    with pytest.raises(ContractError, match="too coarse for clip_norm"):
        to_vector(replace(told, config={central.CLIP_NORM: 1e-5}), update, 3, 3, 1.0, lambda _: Stream.fresh())


def test_whether_a_sum_fits_and_noise_is_fine_enough_does_not_depend_on_how_many_came():
    """Each of 100 would add less noise than the grid takes; each of the 10 that came would add enough."""
    instruction = asked_for_noise(**{central.SUM_NOISE: 2.5e-4})
    vectors(instruction, 10, most=10)
    for members in (10, 100):
        with pytest.raises(ContractError, match="too little for the grid"):
            vectors(instruction, members, most=100)


@pytest.mark.parametrize("use", ["flexlora", "fedask", "flwr.serverapp.strategy:FedMedian"])
def test_strategies_that_need_each_update_are_refused(tiny, tmp_path, use):
    with pytest.raises(UserError, match="secure aggregation gives sums"):
        simulate(tiny(MASKED, f"strategy.use={use}"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_it_goes_around_whichever_engine_runs_the_clients(tiny):
    made = engines.make(tiny(MASKED))
    assert isinstance(made, SecureEngine) and isinstance(made.inner, InlineEngine)


# Noise that clients share out.

SHARED = (
    "clients.use=sgd",
    "rounds=3",
    "privacy={unit: client, noise_multiplier: 2.0, delta: 1.0e-2, clip_norm: 0.5}",
    "secure_aggregation={range: 1.0, noise: shared, honest: 0.75}",
)


def asked_for_noise(size=20_000, **more):
    held = {"w": np.zeros(size, np.float32)}
    told = {central.CLIP_NORM: 0.5, central.SUM_NOISE: 2.0, **more}
    return Instruction(round=1, adapter=held, train=("w",), send=("w",), config=told)


def vectors(instruction, members, change=0.0, within=1.0, most=None):
    update = Update(
        adapter={"w": instruction.adapter["w"] + np.float32(change)},
        weight=1.0,
        clients=(0,),
        metrics={central.WITHIN: within},
    )
    rng = stream(1, "test")
    return [to_vector(instruction, update, members, most or members, 1.0, lambda _: rng) for _ in range(members)]


def test_noise_of_all_members_adds_up_to_the_stated_one_and_the_server_adds_what_dropouts_did_not():
    """z C = 1, of ten members; of seven that stay 0.7 of the variance. Chi-square at one in a million."""
    instruction = asked_for_noise()
    every = vectors(instruction, 10)
    whole = central.Central(noise_multiplier=2.0, sample_rate=0.5, total=20, root=1, shared=True)
    for stayed in (10, 7):
        total = sum(every[:stayed], np.zeros(20_000, np.uint32))
        made = mean(instruction, Sum(total, tuple(range(10)), tuple(range(stayed))), 1.0)
        assert made.metrics == {} and made.weight == stayed
        for noised, variance in (
            (made.adapter["w"] * stayed, stayed / 10),
            (released(whole, made, stayed / 10) * 10, 1.0),
        ):
            low, high = chi2.ppf([5e-7, 1 - 5e-7], noised.size)
            assert low < float((noised.astype(np.float64) ** 2).sum()) / variance < high


def released(whole, update, carried):
    zeros = {"w": np.zeros(20_000, np.float32)}
    return whole.release(1, zeros, [update], 0.5, carried=carried)[0].adapter["w"]


def test_the_count_of_a_bound_that_adapts_carries_its_noise_too():
    """Of 100 members all were within: their mean is 1, under noise of 5 clients on the sum."""
    instruction = asked_for_noise(size=10, **{central.COUNT_NOISE: 5.0})
    drawn = []
    for k in range(60):
        rng = stream(k, "test")
        update = Update(adapter=dict(instruction.adapter), weight=1.0, clients=(0,), metrics={central.WITHIN: 1.0})
        parts = [to_vector(instruction, update, 100, 100, 1.0, lambda _, rng=rng: rng) for _ in range(100)]
        made = mean(
            instruction, Sum(sum(parts, np.zeros(11, np.uint32)), tuple(range(100)), tuple(range(100))), 1.0
        )
        drawn.append(100 * (made.metrics[central.WITHIN] - 1))
    assert 0.6 < np.std(drawn) / 5 < 1.5 and abs(np.mean(drawn)) < 5 * 5 / 60**0.5


def test_without_a_bound_that_adapts_nobody_says_whether_it_was_clipped():
    """The server would see that count without noise."""
    assert [len(v) for v in vectors(asked_for_noise(size=10), 2)] == [10, 10]


def test_a_grid_too_coarse_for_the_noise_and_a_sum_that_does_not_fit_are_refused():
    with pytest.raises(
        ContractError, match=r"noise of \d.* steps is too little .* lower secure_aggregation\.range"
    ):
        vectors(asked_for_noise(**{central.SUM_NOISE: 1e-5}), 10)
    with pytest.raises(ContractError, match=r"does not fit: raise secure_aggregation\.range"):
        vectors(asked_for_noise(**{central.SUM_NOISE: 2000.0}), 10)


def test_what_the_server_sees_is_accounted_for_by_who_stayed():
    """Nine of ten stayed, three in four of them keep their noise to themselves, rounding lengthens 0.5 by 0.01."""
    whole = central.Central(noise_multiplier=2.0, sample_rate=0.5, total=20, root=1, shared=True)
    event = whole.seen(0.5, 0.75 * 0.9, 0.01)
    assert event.noise_multiplier == pytest.approx(2.0 * 0.675**0.5 / 1.02)
    assert (event.sample_rate, event.steps, event.clip_norm) == (1.0, 1, 0.5)


def test_rounding_lengthens_a_change_by_no_more_than_is_accounted_for():
    values = np.random.default_rng(2).normal(0, 1e-6, 1000)
    for seed in range(20):
        made = grid.dequantise(grid.quantise(values, 1.0, np.random.default_rng(seed)), 1.0)
        assert np.linalg.norm(made - values) <= grid.rounding(1000, 1.0)


def test_a_run_with_shared_noise_has_two_epsilons_and_the_ledger_alone_gives_both(tiny, tmp_path, capsys):
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    from fedlora.cli import main
    from fedlora.planning import plan

    run = simulate(tiny(*SHARED), out=tmp_path / "run")
    file = run.folder / "privacy.jsonl"
    events = ledger.replay(file)
    seen = {holder.client: spent for holder, spent in events.items() if isinstance(holder, ledger.Whole)}
    assert set(seen) == {0, 1, 2, 3} and all(len(spent) == 3 for spent in seen.values()) and len(events[None]) == 3
    (z,) = {event.noise_multiplier for spent in seen.values() for event in spent}
    assert 1.72 < z < 2 * 0.75**0.5  # but for rounding
    again = PLDAccountant()
    again.compose(GaussianDpEvent(z), 3)
    assert run.summary["server_epsilon"] == pytest.approx(again.get_epsilon(1e-2), rel=0.01)
    assert run.summary["server_epsilon"] > run.summary["epsilon"]
    said = "from the server, which follows the protocol and sees each round's sum"
    assert said in run.summary["privacy"] and "of those who sent 75% keep" in run.summary["privacy"]
    among = PLDAccountant()  # another client knows a third of the noise at most, its own
    among.compose(GaussianDpEvent(2.0 * (2 / 3) ** 0.5), 3)
    assert (
        f"({among.get_epsilon(1e-2):.3g}, 0.01)-differential privacy for each client, from another client that"
        in (run.summary["privacy"])
    )
    assert "cohorts too small or too large for a sum add at most 1% to delta" in run.summary["privacy"]
    assert plan(tiny(*SHARED)).server_epsilon == pytest.approx(run.summary["server_epsilon"], rel=1e-6)
    assert main(["ledger", str(run.folder)]) == 0
    assert capsys.readouterr().out.count(said) == 3  # by every accountant


def test_shared_noise_goes_with_clients_protected_whole(tiny):
    for wrong, words in (
        ([*SHARED, "clients.max_norm=1"], "says nothing of norms"),
        (["secure_aggregation={honest: 0.5}"], "goes with noise: shared"),
        ([MASKED, "privacy=null", "clients.use=sgd", "clients.retries=1"], "two sums of a round"),
    ):
        with pytest.raises(UserError, match=words):
            tiny(*wrong)
