"""Cohorts that coins draw: what one client more decides over is as rare as delta says."""

import numpy as np
import pytest
from scipy.stats import binom

from fedlora.errors import UserError
from fedlora.privacy import cohorts


def mixed(parts, interval):
    """The privacy loss of a step that is one of several by a chance that everybody sees, such as who else came."""
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    made = [(w, p._pmf_remove.to_dense_pmf()) for w, p in parts]
    low = min(p._lower_loss for _, p in made)
    probs = np.zeros(max(p._lower_loss + p.size for _, p in made) - low)
    for weight, p in made:
        probs[p._lower_loss - low :][: p.size] += weight * p._probs
    infinite = sum(w * p._infinity_mass for w, p in made)
    return pld.PrivacyLossDistribution(DensePLDPmf(interval, low, probs, infinite, True))


def real_epsilon(total, size, rounds, noise, delta, rule):
    """Of a client whose coming lets all three changes of a sum in, and of one that lets in its own alone."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    rate, interval = size / total, 2e-3
    step = lambda changes: pld.from_gaussian_mechanism(  # noqa: E731
        noise / changes, value_discretization_interval=interval, sampling_prob=rate
    )
    chance = [np.prod([(total - 1 - i) / (i + 1) for i in range(k)]) * rate**k * (1 - rate) ** (total - 1 - k)
              for k in range(3)]  # fmt: skip
    assert cohorts.fewer(total, rate) == pytest.approx(sum(chance))
    one = step(1)
    if not rule:
        return one.self_compose(rounds).get_epsilon_for_delta(delta)
    none = pld.identity(interval)
    parts = [(chance[0] + chance[1], none), (chance[2], step(3)), (1 - sum(chance), one)]
    return mixed(parts, interval).self_compose(rounds).get_epsilon_for_delta(delta)


@pytest.mark.parametrize(
    "total, size, rounds, noise, real",
    [(100, 4, 100, 0.857, 31.7), (1000, 8, 100, 0.568, 25.6), (200, 10, 50, 0.838, 13.4)],
)
def test_small_cohorts_that_are_no_sum_would_cost_more_than_is_stated_and_are_refused(
    total, size, rounds, noise, real, tiny
):
    assert real_epsilon(total, size, rounds, noise, 1e-5, rule=True) == pytest.approx(real, rel=0.02)
    assert real_epsilon(total, size, rounds, noise, 1e-5, rule=False) < 4.05
    with pytest.raises(UserError, match="a cohort too small for a sum shows who was drawn"):
        tiny(*whole(total, size, rounds))


def test_where_small_cohorts_are_rare_the_cost_is_what_is_stated_and_the_scenario_is_taken(tiny):
    """The documented example: 100 of 1000; and 40, with a noise of its own."""
    for size, noise in ((100, 1.36), (40, 0.83)):
        control = real_epsilon(1000, size, 100, noise, 1e-5, rule=False)
        assert real_epsilon(1000, size, 100, noise, 1.01e-5, rule=True) <= control
        assert 100 * cohorts.fewer(1000, size / 1000) <= cohorts.RARE / 2 * 1e-5
        assert tiny(*whole(1000, size, 100)).most_members < 200


def whole(total, size, rounds):
    return (
        f"clients.total={total}",
        f"clients.per_round={size}",
        "clients.use=sgd",
        f"rounds={rounds}",
        "privacy={unit: client, epsilon: 4, delta: 1.0e-5, clip_norm: 0.5}",
        "secure_aggregation={}",
    )


def test_the_largest_cohort_is_passed_no_more_often_than_was_said():
    for total, rate, chance in ((1000, 0.1, 1e-9), (50, 0.2, 1e-4), (10**6, 1e-4, 1e-10), (20, 0.5, 1e-12)):
        least = cohorts.most(total, rate, chance)
        assert least == total or binom.sf(least - 1, total - 1, rate) <= chance
        assert cohorts.fewer(total, rate) == pytest.approx(binom.cdf(2, total - 1, rate))
    assert cohorts.most(20, 0.5, 1e-12) == 20 and cohorts.most(1000, 0.1, 1e-9) < 180
