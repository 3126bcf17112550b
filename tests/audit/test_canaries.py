"""Canaries go where they should, and through the client's own mechanism."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.audit.canaries import LOUDNESS, Canaried, Canaries
from fedlora.client import Rng, Settings
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import ContractError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def told(names, **changes):
    base = {"local_steps": 3, "noise_multiplier": 1e-9, "clip_norm": 0.5, "micro_batch_size": 4}
    return Settings(round=1, train=names, send=names, batch_size=8, lr=0.25, **{**base, **changes})


SIZES = (300, 200, 3)


def test_directions_are_orthonormal_and_found_again():
    hidden = Canaries(1, 40, 3).within(SIZES)
    rows = hidden.rows(np.arange(40))
    np.testing.assert_allclose(rows @ rows.T, np.eye(40), atol=1e-6)
    mixed, chosen = 2.0 * rows[3] - rows[7], np.array([7, 0, 3])
    np.testing.assert_allclose(hidden.along(mixed, chosen).sum(0), [-1, 0, 2], atol=1e-6)
    assert np.abs(rows[hidden.home < 3]).max() < 0.5  # along no tensor's own axes


def test_a_quarter_of_the_canaries_lie_in_a_tensor_each_as_many_in_one_as_in_another_where_there_is_room():
    hidden = Canaries(1, 40, 3).within(SIZES)
    assert np.bincount(hidden.home).tolist() == [30, 5, 4, 1]  # of three numbers one holds a canary
    rows = hidden.rows(np.arange(40))
    parts = np.stack(
        [np.square(part).sum(1) for part in np.split(rows, [300, 500], axis=1)], 1
    )  # (canaries, tensors)
    for group in (1, 2, 3):
        np.testing.assert_allclose(
            parts[hidden.home == group], np.eye(3)[[group - 1]].repeat(sum(hidden.home == group), 0), atol=1e-6
        )
    np.testing.assert_allclose(parts[hidden.home == 0].mean(0), hidden.shares[0], atol=0.02)


def test_what_lies_along_a_canary_is_told_apart_by_tensor():
    hidden = Canaries(1, 40, 3).within(SIZES)
    rows, canaries = hidden.rows(np.arange(40)), np.arange(40)
    vector = np.random.default_rng(0).standard_normal(503).astype(np.float32)
    parts = np.split(vector, [300, 500])
    expected = [part @ row for part, row in zip(parts, np.split(rows.T, [300, 500]), strict=True)]
    np.testing.assert_allclose(hidden.along(vector, canaries), expected, atol=1e-5)


@given(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@hypothesis.settings(max_examples=50, deadline=None)
def test_directions_fit_wherever_there_are_as_many_numbers(count, sizes):
    if count > sum(sizes):
        with pytest.raises(UserError, match="ask for fewer"):
            Canaries(2, count, 2).within(tuple(sizes))
        return
    rows = Canaries(2, count, 2).within(tuple(sizes)).rows(np.arange(count))
    np.testing.assert_allclose(rows @ rows.T, np.eye(count), atol=1e-5)


def test_coins_are_fair_and_clients_share_the_canaries_out():
    hidden = Canaries(1, 2000, 3)
    assert 900 < hidden.included.sum() < 1100  # 4.5 standard deviations
    assert sorted(np.concatenate([hidden.of(c) for c in range(3)])) == list(range(2000))


def test_more_canaries_than_directions_are_refused():
    with pytest.raises(UserError, match="50 trained numbers; ask for fewer"):
        Canaries(1, 51, 1).within((30, 20))
    Canaries(1, 50, 1).within((30, 20))


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
    directions = made.canaries.within(tuple(plain.adapter[n].size for n in names))
    draws = directions.along(change * 8 / (0.25 * 0.5), np.arange(200)).sum(0)
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
