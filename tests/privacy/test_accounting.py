import logging
import math
import time
from functools import partial

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm

from fedlora.errors import SettingError, UserError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event, calibrate, epsilon
from fedlora.privacy.wording import FROM_SERVER, statement
from fedlora.scenario import Privacy

DELTA = 1e-5
SST2 = 200 / (67349 / 3)  # FFA-LoRA's experiment: batches of 200, three clients


def event(noise_multiplier: float, sample_rate: float, steps: int) -> Event:
    return Event(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, clip_norm=1.0)


def spent(noise: float, sample_rate: float, steps: int, accountant="pld", delta: float = DELTA) -> float:
    return epsilon([event(noise, sample_rate, steps)], delta, accountant)


ACCOUNTANTS = {"pld": partial(PLDAccountant, value_discretization_interval=1e-4), "rdp": RdpAccountant}
RUNS = {
    "few": [(0.6, 0.02, 40)],
    "ordinary": [(1.3, 0.1, 200)],
    "much noise": [(5.0, 0.05, 1000)],
    "every example": [(20.0, 1.0, 100)],
    "two noises": [(1.0, 0.01, 100), (2.0, 0.01, 300)],
    "two noises, two rates": [(0.8, 0.02, 50), (3.0, 0.1, 50)],
}


@pytest.mark.parametrize(
    ("target", "noise", "opacus"), [(6, 0.9895, 0.995), (3, 1.5145, 1.516), (1, 3.692, 3.692)]
)
def test_the_noise_of_the_ffa_lora_paper(target, noise, opacus):
    """Opacus, which the paper used, stops anywhere within its tolerance of 0.01 below the target."""
    rdp = calibrate(target, DELTA, SST2, 10_000, "rdp")
    assert rdp == pytest.approx(noise, abs=1e-9)
    assert rdp == pytest.approx(opacus, rel=0.006)
    assert target * 0.988 < spent(opacus, SST2, 10_000, "rdp") <= target
    assert calibrate(target, DELTA, SST2, 10_000, "pld") < calibrate(target, DELTA, SST2, 10_000, "prv") < rdp


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_epsilon_is_what_dp_accounting_says(run, accountant):
    other = ACCOUNTANTS[accountant]()
    for noise, rate, steps in run:
        other.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    ours = epsilon([event(*part) for part in run], DELTA, accountant)
    assert ours == pytest.approx(other.get_epsilon(DELTA), rel={"pld": 0.01, "rdp": 1e-9}[accountant])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_default_is_the_tightest_and_no_accountant_is_below_the_truth(run):
    """Between the optimistic and the pessimistic discretisation of the losses lies the true epsilon."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism as losses

    lower = None
    for noise, rate, steps in run:
        part = losses(
            noise,
            pessimistic_estimate=False,
            use_connect_dots=False,
            value_discretization_interval=1e-3,
            sampling_prob=rate,
        ).self_compose(steps)
        lower = part if lower is None else lower.compose(part)
    events = [event(*part) for part in run]
    pld, prv, rdp = (epsilon(events, DELTA, name) for name in ("pld", "prv", "rdp"))
    assert 0 < lower.get_epsilon_for_delta(DELTA) <= pld < prv < rdp
    assert epsilon(events, DELTA) == pld and prv < pld + 0.0125


def test_an_epsilon_past_the_grid_of_random_variables_is_renyis():
    began = time.perf_counter()
    assert spent(0.1, 0.1, 100, "prv") == spent(0.1, 0.1, 100, "rdp") > 1000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (10.0, 25), (100.0, 400), (1000.0, 400)])
def test_without_sampling_it_is_the_analytic_gaussian(noise, steps):
    exact = get_epsilon_gaussian(noise / math.sqrt(steps), DELTA)  # steps compose into one with less noise
    assert spent(noise, 1.0, steps) == pytest.approx(exact, rel=0.01)


def test_much_noise_on_rare_examples_is_accounted_tightly():
    # In the limit of many small steps the losses are normal (Dong et al., 2019): a Gaussian with noise
    # 1 / (sample_rate * sqrt(steps * (exp(1 / noise_multiplier**2) - 1))).
    for noise, rate, steps in ((1.48, 1e-4, 10_000), (35.0, 0.01, 10_000), (3.64, 1e-3, 10_000)):
        limit = get_epsilon_gaussian(1 / (rate * math.sqrt(steps * math.expm1(noise**-2))), DELTA)
        assert spent(noise, rate, steps) == pytest.approx(limit, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1.3, 0.1), (0.7, 0.01), (8.0, 0.5)]),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
def test_events_add_up(parameters, parts):
    together = spent(*parameters, sum(parts))
    assert epsilon([event(*parameters, steps) for steps in parts], DELTA) == together
    assert spent(*parameters, sum(parts) + 1) > together >= 0


def test_epsilon_falls_with_noise_and_rises_with_the_sample_rate():
    by_noise = [spent(noise, 0.05, 100) for noise in (0.5, 0.7, 1.0, 1.49, 1.51, 3.0, 10.0)]
    by_rate = [spent(1.0, rate, 100) for rate in (0.001, 0.01, 0.1, 1.0)]
    assert by_noise == sorted(by_noise, reverse=True) and by_rate == sorted(by_rate)
    assert len({*by_noise, *by_rate}) == 11


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_nothing_taken_is_nothing_spent(accountant):
    assert epsilon([], DELTA, accountant) == 0.0
    assert epsilon([event(1.0, 0.1, 0)], DELTA, accountant) == 0.0


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [
        *((6, 0.01, 40, "pld"), (6, 0.01, 200, "pld"), (6, 0.1, 40, "pld"), (6, 0.1, 200, "pld")),
        *((0.1, 0.01, 1000, "pld"), (0.1, 1.0, 10_000, "pld"), (0.5, 1e-4, 10_000, "pld")),
        *((1, 0.5, 1, "pld"), (50, 0.01, 1, "pld"), (50, 0.1, 10_000, "pld")),
        *(
            (6, 0.1, 200, "prv"),
            (1, 0.01, 200, "prv"),
            (6, 0.1, 200, "rdp"),
            (0.1, 1.0, 10_000, "rdp"),
            (50, 0.01, 1, "rdp"),
        ),
    ],
)
def test_calibration_spends_the_target_and_not_a_hundredth_less_noise_would_do(target, rate, steps, accountant):
    began = time.perf_counter()
    noise = calibrate.__wrapped__(target, DELTA, rate, steps, accountant)
    assert time.perf_counter() - began < 10
    assert spent(noise, rate, steps, accountant) <= target < spent(0.99 * noise, rate, steps, accountant)


@pytest.mark.parametrize(("target", "rate", "delta"), [(1e6, 0.01, DELTA), (6.0, 1e-6, DELTA)])
def test_a_target_that_asks_for_next_to_nothing_is_quick_and_kept(target, rate, delta):
    noise = calibrate(target, delta, rate, 10)
    assert 0 < noise < 0.3 and spent(noise, rate, 10, "pld", delta) <= target


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_target_out_of_reach_is_told_at_once_and_in_a_line(accountant):
    began = time.perf_counter()
    with pytest.raises(SettingError) as caught:
        calibrate(1e-6, DELTA, 1.0, 10_000, accountant)
    assert time.perf_counter() - began < 5
    assert caught.value.key == "privacy.epsilon" and len(str(caught.value).splitlines()) == 1
    assert "no noise reaches epsilon 1e-06 at delta 1e-05 over 10000 steps" in caught.value.message


@pytest.mark.parametrize(
    "wrong",
    [
        *({"noise_multiplier": v} for v in (0.0, -1.0, math.nan, math.inf, 1e300)),
        *({"sample_rate": v} for v in (0.0, -0.1, 1.1, math.nan, 1e-300)),
        *({"clip_norm": v} for v in (0.0, -1.0, math.nan, math.inf)),
        *({"steps": v} for v in (-1, 1.0, True, 10**8)),
    ],
    ids=str,
)
def test_what_is_no_event_is_refused(wrong):
    fine = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, "clip_norm": 1.0}
    with pytest.raises(UserError, match="not an event"):
        Event(**{**fine, **wrong})


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_next_to_no_noise_is_no_privacy(accountant):
    assert spent(1e-300, 0.1, 10, accountant) == spent(9e-4, 0.1, 10, accountant) == math.inf
    assert 1e5 < spent(1e-3, 0.1, 1, accountant) < math.inf


def test_an_event_survives_json_and_passes_over_further_keys():
    one = Event(noise_multiplier=0.1 + 0.2, sample_rate=1 / 3, steps=7, clip_norm=2.0)
    assert Event.from_json({**one.to_json(), "round": 3}) == one


def test_orders_that_renyi_cannot_use_are_no_news(caplog):
    with caplog.at_level(logging.WARNING):
        spent(2.0, 0.5, 10, "rdp", 0.1)
    assert not caplog.records


@pytest.mark.parametrize(("accountant", "name"), [("pld", "loss distr"), ("prv", "Opacus"), ("rdp", "Renyi")])
def test_the_statement_says_what_holds_for_whom(accountant, name):
    line = statement(5.98, 1e-5, "example", accountant)
    assert line.startswith("(5.98, 1e-05)-differential privacy for each example, ")
    for words in (
        "differ in one example, which counts for nothing in one of them",
        "how many examples a client holds is public",
        "largest over clients",
        "Poisson sampling of ex",
        name,
    ):
        assert words in line
    other = statement(5.98, 1e-5, "client", accountant)
    assert (
        "for each client" in other
        and "how many clients there are is public" in other
        and "over clients" not in other
    )


def test_many_noise_multipliers_follow_from_a_few(monkeypatch):
    monkeypatch.setattr(accounting, "_SEARCHES", 8)
    rates = [float(r) for r in np.geomspace(0.004, 0.3, 30)]
    few = accounting.calibrations(6.0, 1e-5, rates[:3], 50, "rdp")
    assert few == [accounting.calibrate(6.0, 1e-5, rate, 50, "rdp") for rate in rates[:3]]
    for rate, noise in zip(rates, accounting.calibrations(6.0, 1e-5, rates, 50, "rdp"), strict=True):
        event = accounting.Event(noise_multiplier=noise, sample_rate=rate, steps=50, clip_norm=1.0)
        assert 6 * 0.98 < accounting.epsilon([event], 1e-5, "rdp") <= 6
        assert noise == pytest.approx(accounting.calibrate(6.0, 1e-5, rate, 50, "rdp"), rel=5e-3)


@given(
    st.lists(
        st.tuples(st.floats(0.8, 2), st.sampled_from([0.1, 1.0]), st.integers(10, 50)), min_size=1, max_size=3
    )
)
@settings(max_examples=10, deadline=None)
def test_runs_that_one_holder_took_part_in_cost_what_they_cost_together(parts):
    events = [event(*part) for part in parts]
    together = accounting.epsilon_of_runs([[[one]] for one in events], DELTA)
    assert together == pytest.approx(epsilon(events, DELTA, "rdp"), rel=0.02)
    assert together == pytest.approx(accounting.epsilon_of_runs([[events]], DELTA))


def test_over_runs_whoever_spent_most_counts():
    """The example may have been the first holder's in one run and the second's in the other."""
    little, much = [event(4.0, 0.1, 10)], [event(1.0, 0.1, 10)]
    assert accounting.epsilon_of_runs([[little, much], [much, little]], DELTA) == pytest.approx(
        epsilon(2 * much, DELTA, "rdp"), rel=0.02
    )
    assert accounting.epsilon_of_runs([], DELTA) == accounting.epsilon_of_runs([[[]], []], DELTA) == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_under_zero_out_the_accountants_give_the_same(accountant):
    """Replaced by what counts for nothing, or left out: the sums of a step are the same, and so are its losses."""
    from dp_accounting.privacy_accountant import NeighboringRelation

    found = []
    for relation in (NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.ADD_OR_REMOVE_ONE):
        other = ACCOUNTANTS[accountant](neighboring_relation=relation)
        other.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.3)), 200)
        found.append(other.get_epsilon(DELTA))
    assert found[0] == found[1] == pytest.approx(spent(1.3, 0.1, 200, accountant), rel=0.01)


def test_from_the_server_a_client_sends_nothing():
    line = statement(3.0, 1e-5, FROM_SERVER, "pld", 0.75)
    assert line.startswith("(3, 1e-05)-differential privacy for each client, from the server, which follows")
    assert "neighbouring runs differ in that one client sends nothing; " in line and "75%" in line


@pytest.mark.parametrize("noise", [0.8, 2.0])
def test_the_profile_of_one_gaussian_step_is_the_textbook_s(noise):
    """Balle and Wang (2018), Theorem 8, at a sensitivity of 1."""
    epsilons = [-1.0, 0.0, 0.5, 2.0]
    found = accounting.profile([event(noise, 1.0, 1)], epsilons)
    for e, delta in zip(epsilons, found, strict=True):
        exact = norm.cdf(0.5 / noise - e * noise) - math.exp(e) * norm.cdf(-0.5 / noise - e * noise)
        assert exact - 1e-9 <= delta <= exact + 2e-3


def test_of_nothing_the_profile_is_that_of_no_difference():
    assert accounting.profile([], [-1.0, 0.0, 1.0]) == pytest.approx([1 - math.exp(-1), 0, 0])


@pytest.mark.parametrize("accountant", ["pld", "prv"])
@pytest.mark.parametrize("delta", [1e-14, 1e-20])
def test_a_delta_that_is_not_resolved_is_told_with_the_accountant_that_does(accountant, delta):
    told = {"epsilon": 3, "delta": delta}
    with pytest.raises(
        ValidationError, match=f"accountant {accountant} tells no delta below 1e-13.*accountant: rdp"
    ):
        Privacy.model_validate({**told, "accountant": accountant})
    assert Privacy.model_validate({**told, "accountant": "rdp"}).delta == delta


def test_a_search_ends_whatever_an_accountant_says():
    with pytest.raises(SettingError, match="write accountant: rdp, which does"):
        accounting.calibrate(3.0, 1e-15, 0.25, 2, "pld")
    noise = accounting.calibrate(3.0, 1e-15, 0.25, 2, "rdp")
    assert accounting.epsilon([event(noise, 0.25, 2)], 1e-15, "rdp") <= 3


def test_no_epsilon_is_told_in_words():
    said = statement(math.inf, 1e-5, "example", "pld")
    assert said.startswith("no epsilon bounds what is lost at delta 1e-05, for each example, neighbouring")
    assert "inf" not in said
