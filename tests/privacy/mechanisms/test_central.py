"""Client-level privacy at the server: sensitivity, noise, sampling and the bound that adapts."""

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedlora.adapter import Update
from fedlora.engine import Replies
from fedlora.engine.base import gathered
from fedlora.errors import ContractError, SettingError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.mechanisms.bands import coefficients, in_weights
from fedlora.privacy.mechanisms.central import CLIP_NORM, COUNT_NOISE, SUM_NOISE, WITHIN, Central, check, clip

RECEIVED = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[0.0]], np.float32)}
QUIET = Central(noise_multiplier=1e-12, sample_rate=0.5, total=8, root=1)


def sent(*change: float, client: int = 0, weight: float = 7.0) -> Update:
    a, b = np.array(change[:2], np.float32), np.array([change[2:]], np.float32)
    adapter = {"a": RECEIVED["a"] + a, "b": RECEIVED["b"] + b}
    return Update(adapter=adapter, weight=weight, clients=(client,), metrics={"train_loss": 0.5})


def change(update: Update) -> list[float]:
    return [*(update.adapter["a"] - RECEIVED["a"]), *(update.adapter["b"] - RECEIVED["b"]).ravel()]


def test_a_change_is_clipped_over_all_tensors_together():
    """(2, 3, 6) has norm 7: at a bound of 3.5 it is halved, and no tensor by itself would have been."""
    clipped = clip(sent(2, 3, 6), RECEIVED, 3.5, share_metrics=False)
    assert change(clipped) == pytest.approx([1, 1.5, 3])
    assert clipped.weight == 1 and clipped.metrics == {WITHIN: 0.0}
    short = clip(sent(2, 3, 6), RECEIVED, 7.5, share_metrics=True)
    assert change(short) == [2, 3, 6] and short.metrics == {WITHIN: 1.0, "train_loss": 0.5}
    assert change(clip(sent(0, 0, 0), RECEIVED, 1.0, share_metrics=False)) == [0, 0, 0]


def test_the_sum_is_divided_by_the_expected_cohort_and_not_by_who_came():
    """Two of an expected four clients sent (2, 0, 0) and (0, 4, 0): the mean change is (0.5, 1, 0)."""
    updates = [sent(2, 0, 0, weight=1.0), sent(0, 4, 0, client=1, weight=1.0)]
    released, bound = QUIET.release(1, RECEIVED, updates, 1.0)
    assert change(released) == pytest.approx([0.5, 1, 0], abs=1e-6) and bound == 1.0
    summed, _ = QUIET.release(1, RECEIVED, gathered([Replies(updates, [])], True).updates, 1.0)
    assert change(summed) == pytest.approx([0.5, 1, 0], abs=1e-6)
    nobody, _ = QUIET.release(1, RECEIVED, [], 1.0)
    assert change(nobody) == pytest.approx([0, 0, 0], abs=1e-6)


NUMBERS = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5), st.floats(0.01, 10))
def test_one_client_more_or_less_moves_the_mean_by_the_bound_over_the_cohort_at_most(changes, bound):
    updates = [clip(sent(*c, client=i), RECEIVED, bound, False) for i, c in enumerate(changes)]
    one, other = (QUIET.release(1, RECEIVED, u, bound)[0] for u in (updates, updates[1:]))
    moved = math.hypot(*(np.array(change(one)) - change(other)))
    assert moved <= bound / 4 + 1e-4


def test_noise_has_the_stated_standard_deviation_and_is_drawn_afresh_for_each_round_and_scale():
    """Chi-square at a false-alarm rate of one in a million, over 20,000 draws."""
    held = {"w": np.zeros((100, 200), np.float32)}
    made = Central(noise_multiplier=3.0, sample_rate=0.5, total=8, root=1)
    drawn = made.release(1, held, [], 0.2)[0].adapter["w"] * 4 / (3.0 * 0.2)
    low, high = chi2.ppf([5e-7, 1 - 5e-7], drawn.size)
    assert low < float((drawn.astype(np.float64) ** 2).sum()) < high and abs(drawn.mean()) < 5 / drawn.size**0.5
    for other in (made.release(2, held, [], 0.2), made.release(1, held, [], 0.4)):
        assert abs(np.corrcoef(drawn.ravel(), other[0].adapter["w"].ravel())[0, 1]) < 5 / drawn.size**0.5
    assert np.array_equal(made.release(1, held, [], 0.2)[0].adapter["w"] * 4 / (3.0 * 0.2), drawn)


def test_cohorts_are_poisson():
    made = Central(noise_multiplier=1.0, sample_rate=0.2, total=50, root=1)
    sizes = np.array([len(made.cohort(round)) for round in range(1, 401)])
    assert abs(sizes.mean() - 10) < 5 * (8 / 400) ** 0.5 and 0.7 < sizes.var() / 8 < 1.3
    assert made.cohort(1) == made.cohort(1) == sorted(made.cohort(1)) != made.cohort(2)
    assert Central(noise_multiplier=1.0, sample_rate=1.0, total=5, root=1).cohort(3) == [0, 1, 2, 3, 4]


def test_the_bound_moves_towards_the_quantile():
    """Of 40 expected clients 30 were within and 10 not: share 3/4, so log C falls by 0.2 (3/4 - 1/2)."""
    made = Central(noise_multiplier=1.0, sample_rate=0.4, total=100, root=1, quantile=0.5)
    updates = [Update(adapter={}, weight=40.0, clients=tuple(range(40)), metrics={WITHIN: 0.75})]
    bounds = [made.release(round, {}, updates, 2.0)[1] for round in range(1, 400)]
    logs = np.log(np.array(bounds) / 2.0)
    assert logs.mean() == pytest.approx(-0.05, abs=0.002)
    assert logs.std() == pytest.approx(0.2 * 2 / 40, rel=0.15)  # noise of 40 / 20 clients on the count


def test_both_noises_together_cost_what_one_of_the_stated_multiplier_does():
    made = Central(noise_multiplier=1.5, sample_rate=0.5, total=200, root=1, quantile=0.5)
    assert made.sum_noise > 1.5
    both, one = RdpAccountant(), RdpAccountant()
    both.compose(GaussianDpEvent(made.sum_noise))
    both.compose(GaussianDpEvent(2 * 100 / 20))  # 5 clients on a count of terms of 1/2
    one.compose(GaussianDpEvent(1.5))
    assert both.get_epsilon(1e-5) == pytest.approx(one.get_epsilon(1e-5), rel=1e-9)


def test_too_few_clients_for_a_count_under_noise_are_refused():
    with pytest.raises(SettingError, match="10 clients a round are too few"):
        Central(noise_multiplier=1.0, sample_rate=0.5, total=20, root=1, quantile=0.5)


def test_an_event_is_a_round():
    event = QUIET.event(0.3)
    assert (event.noise_multiplier, event.sample_rate, event.steps, event.clip_norm) == (1e-12, 0.5, 1, 0.3)


def test_a_client_is_told_no_less_noise_than_the_scenario_promises_on_the_count_as_on_the_sum():
    """A count of 40 expected clients carries noise of 2; none where nothing is shared out."""
    made = replace(QUIET, noise_multiplier=1.0, sample_rate=0.4, total=100, quantile=0.5, shared=True)
    told = made.words(0.3)
    assert told == {CLIP_NORM: 0.3, SUM_NOISE: made.sum_noise, COUNT_NOISE: 2.0}
    made.check_words(told, 0.5)  # the bound has adapted
    for wrong in ({COUNT_NOISE: 1.9}, {SUM_NOISE: 1.0}, {COUNT_NOISE: math.nan}, {SUM_NOISE: "much"}):
        with pytest.raises(ContractError, match="less noise"):
            made.check_words({**told, **wrong}, 0.5)
    for wrong in ({}, {CLIP_NORM: 0.0}, {CLIP_NORM: math.inf}, {CLIP_NORM: -1.0}, {CLIP_NORM: True}):
        with pytest.raises(ContractError, match="names no bound"):
            made.check_words({k: v for k, v in told.items() if k != CLIP_NORM} | wrong, 0.5)
    with pytest.raises(ContractError, match="says count-noise"):
        QUIET.check_words({CLIP_NORM: 0.3, COUNT_NOISE: 1.0}, 0.3)
    with pytest.raises(ContractError, match=r"not the scenario's 0\.3"):
        QUIET.check_words({CLIP_NORM: 0.4}, 0.3)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1e4), st.integers(0, 2**32))
def test_a_clipped_change_is_within_the_bound_however_coarse_float32_is_there(scale, bound, seed):
    rng = np.random.default_rng(seed)
    received = {"w": (scale * rng.standard_normal(50)).astype(np.float32)}
    sent = {"w": received["w"] + (3 * bound * rng.standard_normal(50)).astype(np.float32)}
    made = clip(Update(adapter=sent, weight=9.0, clients=(0,)), received, bound, False).adapter["w"]
    moved = np.linalg.norm(made.astype(np.float64) - received["w"].astype(np.float64))
    assert moved <= bound * (1 + 2e-6)


def test_a_change_beyond_the_bound_is_refused_in_words_that_do_not_tell_its_norm():
    """(2, 3, 6) has norm 7."""
    with pytest.raises(ContractError) as told:
        check(sent(2, 3, 6, weight=1.0), RECEIVED, 3.5)
    assert str(told.value) == "a change longer than the bound, 3.5, was sent"
    with pytest.raises(ContractError, match="longer than the bound"):
        check(sent(math.nan, 0, 0, weight=1.0), RECEIVED, 3.5)


BANDED = Central(noise_multiplier=2.0, sample_rate=0.4, total=10, root=1, coefficients=coefficients(4, 12))


def test_under_bands_clients_take_turns():
    """Of ten clients in four groups a round takes each of its own group with probability 0.4: one on average."""
    cohorts = [BANDED.cohort(round) for round in range(1, 2001)]
    assert all(client % 4 == round % 4 for round, took in enumerate(cohorts, 1) for client in took)
    assert abs(sum(map(len, cohorts)) / len(cohorts) - BANDED.expected) < 0.1 and BANDED.expected == 1.0


def test_bands_take_back_noise_of_the_rounds_before_as_the_formula_says():
    """C times the noise of successive rounds is independent noise of the stated deviation, and sums as well."""
    held, size, rounds = {"w": np.zeros((100, 200), np.float32), "v": np.zeros(1, np.float32)}, 20_000, 12
    xs = [BANDED.release(round, held, [], 0.5)[0].adapter["w"].ravel() / 1.0 for round in range(1, rounds + 1)]
    c, low, high = BANDED.coefficients, *chi2.ppf([5e-7, 1 - 5e-7], size)
    zs = [sum(weight * xs[t - j] for j, weight in enumerate(c[: t + 1])).astype(np.float64) for t in range(rounds)]
    assert all(low < float(z @ z) < high for z in zs)
    assert all(abs(np.corrcoef(zs[t], zs[t - 1])[0, 1]) < 5 / size**0.5 for t in range(1, rounds))
    sums, told = np.cumsum(xs, axis=0).std(axis=1), in_weights(c, rounds)
    assert sums == pytest.approx(told, rel=0.03) and told[-1] < 0.8 * rounds**0.5
    assert [x.std() for x in xs] == pytest.approx([BANDED.deviation(t + 1, 0.5) for t in range(rounds)], rel=0.03)


def test_a_process_that_begins_later_draws_the_same_banded_noise():
    again = replace(BANDED).release(7, RECEIVED, [], 1.0)[0]
    for round in range(1, 8):
        last = BANDED.release(round, RECEIVED, [], 1.0)[0]
    assert change(again) == change(last)
    assert change(BANDED.release(7, RECEIVED, [], 1.0, draw=1)[0]) != change(last)


@pytest.mark.parametrize("told", [{"coefficients": coefficients(4, 40)}, {"sample_rate": 0.5}, {"total": 11}])
def test_banded_noise_on_other_terms_is_another(told):
    """Two sums under one Z and two matrices would show their difference."""
    held = {"w": np.zeros(20_000, np.float32)}
    one, other = (made.release(9, held, [], 1.0)[0].adapter["w"] for made in (BANDED, replace(BANDED, **told)))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 20_000**0.5


def test_a_banded_round_under_another_key_is_a_turn_more_for_its_group():
    """Not one of b: groups that wait do not pay for it, so it is not divided among them."""
    once, more = BANDED.event(1.0), BANDED.event(1.0, again=True)
    assert (more.bands, more.sample_rate) == (1, 0.4)
    eight = [replace(once, steps=8)]  # two turns of each group
    assert epsilon([*eight, more, more, more], 1e-5) == epsilon([replace(more, steps=5)], 1e-5)
    assert epsilon([replace(once, steps=11)], 1e-5) == epsilon([replace(more, steps=3)], 1e-5)


def test_a_further_draw_of_a_banded_round_is_a_plain_gaussian_on_who_is_in_it():
    assert BANDED.event(1.0) == Event(noise_multiplier=2.0, sample_rate=0.4, steps=1, clip_norm=1.0, bands=4)
    assert BANDED.event(1.0, draw=1) == Event(noise_multiplier=2.0, sample_rate=1.0, steps=1, clip_norm=1.0)


@pytest.mark.parametrize("told", [{"quantile": 0.5}, {"shared": True}])
def test_bands_are_refused_where_a_bound_moves_or_clients_add_the_noise(told):
    with pytest.raises(ContractError, match="bands hold"):
        replace(BANDED, noise_multiplier=1e-3, **told)
