"""Canaries go where they should, and through the client's own mechanism."""

import numpy as np
import pytest

from fedlora.audit.canaries import LOUDNESS, Canaried, Canaries
from fedlora.audit.run import likelihood_ratio
from fedlora.client import Rng, Settings
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import ContractError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def told(names, **changes):
    base = {"local_steps": 3, "noise_multiplier": 1e-9, "clip_norm": 0.5, "micro_batch_size": 4}
    return Settings(round=1, train=names, send=names, batch_size=8, lr=0.25, **{**base, **changes})


def test_directions_are_orthonormal_and_found_again():
    hidden = Canaries(1, 20, 3)
    rows = hidden.directions(np.arange(20), 50)
    np.testing.assert_allclose(rows @ rows.T, np.eye(20), atol=1e-6)
    mixed = 2.0 * rows[3] - rows[7]
    np.testing.assert_allclose(hidden.along(mixed), np.eye(20)[3] * 2 - np.eye(20)[7], atol=1e-6)
    assert np.abs(rows).max() < 0.5  # along no tensor's own axes


def test_coins_are_fair_and_clients_share_the_canaries_out():
    hidden = Canaries(1, 2000, 3)
    assert 900 < hidden.included.sum() < 1100  # 4.5 standard deviations
    assert sorted(np.concatenate([hidden.of(c) for c in range(3)])) == list(range(2000))


def test_more_canaries_than_directions_are_refused():
    with pytest.raises(UserError, match="50 trained numbers; ask for fewer"):
        Canaries(1, 51, 1).fits(50)
    Canaries(1, 50, 1).fits(50)


def test_a_canary_that_is_in_moves_the_update_by_what_is_clipped_and_one_that_is_out_does_not(build):
    """Without noise each draw shows as one clipping bound along the canary's own direction."""
    worker = build()
    task, part = worker.task, worker.dataset.partition(1)
    names = tuple(sorted(n for n, s in task.layout.items() if s.role != "A"))
    made = Canaried("dp_sgd", {}, seed=5, canaries=200, among=4)
    settings, rng = told(names), Rng(3, 1, 1)
    plain = DPSGD().fit(task, {}, part, settings, rng)
    update = made.fit(task, {}, part, settings, rng)

    change = np.concatenate([(plain.adapter[n] - update.adapter[n]).ravel() for n in names])
    draws = made.canaries.along(change * 8 / (0.25 * 0.5))
    mine = made.canaries.of(1)
    inside = mine[made.canaries.included[mine]]
    outside = np.setdiff1d(np.arange(200), inside)
    coins, expected = rng("canaries"), np.zeros(len(inside))
    for _ in range(3):
        expected += coins.random(len(inside)) < 8 / len(part)
    assert expected.sum() > 5
    np.testing.assert_allclose(draws[inside], expected, atol=0.2)  # the first canaries move what follows a little
    assert np.abs(draws[outside]).max() < 0.2 and LOUDNESS > 1  # clipped: else ten bounds would show


def test_the_audited_client_claims_and_says_what_it_did(build):
    settings = told(("x",))
    made = Canaried("dp_sgd", {}, seed=5, canaries=4, among=4)
    assert made.private and made.spends(40, settings) == DPSGD().spends(40, settings)


def test_a_client_without_opacus_cannot_be_audited(build):
    worker = build(private=False)
    names = tuple(sorted(worker.task.layout))
    made = Canaried("sgd", {}, seed=5, canaries=4, among=4)
    with pytest.raises(ContractError, match="SGD took 0 of 3 steps"):
        made.fit(worker.task, {}, worker.dataset.partition(0), told(names), Rng(3, 1, 0))


def test_the_likelihood_ratio_of_a_single_step_is_the_textbooks():
    """log(1 - q + q exp((2 x - 1) / (2 s^2))) with s the scale of what is seen."""
    seen = np.array([-0.5, -0.25, 0.0, 0.25, 0.5, 0.1, 1.0])
    scale = 1.4826 * np.median(np.abs(seen - 0.1))
    expected = np.log(0.7 + 0.3 * np.exp((2 * seen - 1) / (2 * scale**2)))
    np.testing.assert_allclose(likelihood_ratio(seen, 1, 0.3), expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(likelihood_ratio(seen, 2, 1.0)).all()
