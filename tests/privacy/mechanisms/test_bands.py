"""Banded noise: its size in the weights, who takes part when, what it costs, and what it is drawn from."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.client import Rng
from fedlora.errors import ContractError
from fedlora.privacy import accounting, ledger
from fedlora.privacy.accounting import Event, adds, alike, epsilon
from fedlora.privacy.mechanisms import bands
from fedlora.privacy.mechanisms.bands import Past
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.replay import Drawn
from fedlora.seeding import stream

SIGMA, BOUND, BATCH, RUN = 1.5, 0.5, 4, 60


def banded(mechanism, count, steps=RUN):
    return bands.banded(mechanism, bands.coefficients(count, steps))


def plain(steps=2, clip="flat", total=64):
    return ExampleGaussian(
        noise_multiplier=SIGMA,
        sample_rate=BATCH / total,
        total=total,
        batch_size=BATCH,
        steps=steps,
        clip_norm=BOUND,
        clip=clip,
    )


def matrix(c, steps):
    """C, (steps, steps)."""
    count = len(c)
    return sum(np.eye(steps, k=-j) * c[j] for j in range(min(count, steps)))


def noises(mechanism, rounds, numbers):
    """What an optimiser adds in steps of empty batches, over the noise of one step of DP-SGD, (steps, numbers)."""
    parameters = [torch.nn.Parameter(torch.zeros(numbers - 3)), torch.nn.Parameter(torch.zeros(3))]
    past, made = Past(7), []
    for k in range(rounds):
        noise = mechanism.noise(Rng(7, k + 1, 2, first=k * mechanism.steps, past=past))
        optimizer = mechanism.optimizer(torch.optim.SGD(parameters, lr=1.0), noise)
        for _ in range(mechanism.steps):
            before = torch.cat([p.detach().clone() for p in parameters])
            for last in (False, True):  # two micro-batches
                optimizer.zero_grad(set_to_none=True)
                for p in parameters:
                    p.grad_sample = p.new_zeros((0, *p.shape))
                if not last:
                    optimizer.signal_skip_step()
                optimizer.step()
            moved = before - torch.cat([p.detach() for p in parameters])
            made.append(moved.double().numpy() * BATCH / (SIGMA * BOUND))
    return np.stack(made)


def test_two_bands_by_hand():
    """C = [[1, 0], [1/2, 1]] / sqrt(5/4): the inverse takes back a half of the noise before."""
    scale = math.sqrt(1.25)
    c = (1 / scale, 0.5 / scale)
    np.testing.assert_allclose(bands.inverse(c, 4), scale * np.array([1, -1 / 2, 1 / 4, -1 / 8]))
    np.testing.assert_allclose(bands.in_weights(c, 2), scale * np.array([1, math.hypot(1, 1 / 2)]))
    np.testing.assert_allclose(bands.in_weights((1.0,), 3), [1, math.sqrt(2), math.sqrt(3)])
    np.testing.assert_allclose(bands.root(4), [1, 1 / 2, 3 / 8, 5 / 16])


def test_two_steps_are_fitted_as_by_hand():
    """With C = [[1, 0], [x, 1]] the mean square is (1 + x^2) (1 + (1 + (1 - x)^2)) / 2, least at x = 0.3059."""
    xs = np.linspace(0, 1, 100_001)
    best = xs[np.argmin((1 + xs**2) * (2 + (1 - xs) ** 2))]
    one, two = bands.coefficients(2, 2)
    assert two / one == pytest.approx(best, abs=1e-4)
    assert bands.error(2, 2) ** 2 == pytest.approx(((1 + xs**2) * (2 + (1 - xs) ** 2)).min() / 2)


@pytest.mark.parametrize("count, steps, least", [(16, 60, 0.003), (4, 80, 0.039), (16, 2000, 0.143)])
def test_fitted_bands_leave_less_than_the_root_of_the_sums(count, steps, least):
    """By how much: the figures of docs/privacy.md."""
    root = bands.root(count) / np.linalg.norm(bands.root(count))
    before = math.sqrt((bands.in_weights(tuple(root), steps) ** 2).mean())
    assert 1 - bands.error(count, steps) / before == pytest.approx(least, abs=0.001)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 300))
def test_what_is_fitted_has_norm_one_and_no_neighbour_is_better(count, steps):
    """Each coefficient moved by itself, further than it was rounded."""
    c = np.array(bands.coefficients(count, steps))
    assert c @ c == pytest.approx(1) and c[0] == c.max() and c.min() >= 0
    here = bands.error(count, steps)
    for j in range(1, count):
        for step in (-0.01, 0.01):
            other = c / c[0] + step * np.eye(count)[j]
            other /= np.linalg.norm(other)
            moved = math.sqrt((bands.in_weights(tuple(other), steps) ** 2).mean())
            assert moved >= here * (1 - 1e-5)


def test_coefficients_are_short_numbers_over_the_first():
    """So that a machine whose last bits differ finds the same."""
    c = np.array(bands.coefficients(8, 500))
    np.testing.assert_allclose((c / c[0]).round(4), c / c[0], rtol=0, atol=1e-12)
    assert bands.coefficients(8, 500) == bands.coefficients.__wrapped__(8, 500)


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_rows_and_columns_are_those_of_the_matrices(count):
    told = bands.coefficients(count, 30)
    c = matrix(told, 30)
    assert np.linalg.norm(c, axis=0).max() <= 1 + 1e-12  # what a row adds is no longer than the bound
    assert all(abs(c[:, t] @ c[:, t + count]) == 0 for t in range(max(30 - count, 0)))  # nor meets its next turn
    rows = np.linalg.norm(np.tril(np.ones((30, 30))) @ np.linalg.inv(c), axis=1)
    np.testing.assert_allclose(bands.in_weights(told, 30), rows)
    assert bands.error(count, 30) == pytest.approx(math.sqrt((rows**2).mean()))


def test_the_noise_in_the_weights_is_the_formulas_at_every_prefix():
    """To 2 %: of 20,000 numbers a deviation is known to 0.5 %, so that this is four of its own deviations."""
    made = noises(banded(plain(), 8), 30, 20_000)  # 60 steps in rounds of two
    c = bands.coefficients(8, 60)
    np.testing.assert_allclose(np.cumsum(made, 0).std(1), bands.in_weights(c, 60), rtol=0.02)
    white = matrix(c, 60) @ made  # C takes the noise of the steps apart again
    np.testing.assert_allclose(white.std(1), 1.0, rtol=0.02)
    assert np.abs(np.corrcoef(white) - np.eye(60)).max() < 5 / math.sqrt(20_000)


def drawn(mechanism, past, rounds):
    """The noise of each step of some rounds, by their numbers from 0."""
    made = []
    for k in rounds:
        noise = mechanism.noise(Rng(7, k + 1, 2, first=k * mechanism.steps, past=past))
        made += [noise.standard_normal(50) for _ in range(mechanism.steps)]
    return np.stack(made)


def test_what_is_kept_of_the_past_changes_no_bit():
    made = banded(plain(), 5)
    kept, forgotten, none = (drawn(made, past, range(9)) for past in (Past(7), Past(7, room=0), None))
    assert np.array_equal(kept, forgotten) and np.array_equal(kept, none)
    lost = drawn(made, Past(7), (0, 1, 2, 5, 6))  # rounds that were lost leave the others as they are
    assert np.array_equal(lost, kept[[*range(6), *range(10, 14)]])
    again = drawn(made, Past(7), (0, 1, 2, 1, 2, 3))
    assert np.array_equal(again, kept[[*range(6), 2, 3, 4, 5, 6, 7]])


def test_it_keeps_no_more_than_there_is_room_for():
    past = Past(7, room=3 * 100 * 8)
    for client in range(4):
        for step in range(6):
            past.noise((client,), 7, 0, bands.coefficients(4, RUN), step, 100)
            held = [x.nbytes for _, xs in past._kept.values() for x in xs]
            assert sum(held) <= past.room and len(held) <= 3


def test_steps_on_other_terms_have_other_noise():
    first = noises(banded(plain(), 4), 4, 4000)
    grown = replace(banded(plain(), 4), total=plain().total + 1)  # at the same rate: rows are in other groups
    longer = banded(plain(), 4, 90)  # fitted to another run: no noise of one is in another C
    for other in (banded(plain(total=128), 4), banded(plain(), 2), grown, longer):
        assert np.abs(np.corrcoef(first, noises(other, 4, 4000))[:8, 8:]).max() < 5 / math.sqrt(4000)
    fewer = noises(banded(plain(), 4), 4, 3900)
    assert np.abs(np.corrcoef(first[:, :3900], fewer)[:8, 8:]).max() < 5 / math.sqrt(3900)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 500), st.integers(10, 90), st.integers(0, 10**6))
def test_a_step_takes_rows_of_the_group_whose_turn_it_is_alone(count, step, total, seed):
    mechanism = banded(plain(total=total), min(count, total // BATCH))
    rows = np.flatnonzero(mechanism.taken(stream(seed, "coins"), step))
    assert set(rows % mechanism.bands) <= {step % mechanism.bands}
    every = BATCH / total * mechanism.bands
    assert mechanism.sample_rate == pytest.approx(every) and mechanism.expected == BATCH


def test_one_band_is_the_mechanism_as_it_is():
    independent = plain()
    drawn = independent.noise(Rng(7, 3, 2, past=Past(7))).standard_normal(5)
    assert np.array_equal(drawn, stream(7, 3, 2, independent.purpose).standard_normal(5))
    assert np.array_equal(independent.taken(stream(1), 0), independent.taken(stream(1), 5))


def test_a_bound_that_moves_has_no_bands():
    with pytest.raises(ContractError, match="a bound that is fixed"):
        bands.BandedGaussian(**{**vars(plain()), "quantile": 0.5, "clip": "quantile", "coefficients": (0.8, 0.6)})


@pytest.mark.parametrize("c", [(), (0.0, 1.0), (0.9, 0.6), (-0.8, 0.6)])
def test_coefficients_that_would_let_an_example_count_for_more_are_refused(c):
    with pytest.raises(ContractError, match="norm 1 at most"):
        bands.banded(plain(), c)


# What it costs.


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 9))
def test_steps_of_a_run_count_as_the_turns_of_the_group_that_has_had_most(rounds, count):
    """However they come: here by counting them."""
    told = {"noise_multiplier": 2.0, "sample_rate": 0.1, "clip_norm": 1.0}
    events = [Event(steps=n, bands=count, **told) for n in rounds]
    most = max(np.bincount(np.arange(sum(rounds)) % count, minlength=1), default=0) if sum(rounds) else 0
    assert accounting._history(events) == (((2.0, 0.1, most),) if most else ())
    together = [adds(events[:i], event) for i, event in enumerate(events)]
    assert all(event.bands == 1 for event in together) and sum(event.steps for event in together) == most
    assert alike(events, events[0]) == sum(rounds)


def test_steps_under_another_bound_or_other_bands_have_turns_of_their_own():
    """Each is counted from 0: groups of one may meet those of the other in the same rows."""
    told = {"noise_multiplier": 2.0, "sample_rate": 0.1, "steps": 5}
    both = [Event(clip_norm=c, bands=4, **told) for c in (1.0, 0.5)]
    assert accounting._history(both) == ((2.0, 0.1, 4),)
    mixed = [Event(clip_norm=1.0, bands=b, **told) for b in (1, 4, 5)]
    assert accounting._history(mixed) == ((2.0, 0.1, 5 + 2 + 1),)


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_epsilon_follows_from_the_ledger_alone_by_dp_accounting(accountant, tmp_path):
    """22 steps of 8 bands: three turns at eight times the rate. To 1 %; `prv` adds an error that it states."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    made, record = banded(plain(total=400), 8).event(), ledger.Ledger(tmp_path)
    for round in range(1, 12):
        record.spend(round, {5: made}, delta=1e-5, unit="example", accountant=accountant)
    lines = [json.loads(line) for line in (tmp_path / "privacy.jsonl").read_text().splitlines()]
    (b,), (rate,), (noise,) = ({line[k] for line in lines} for k in ("bands", "sample_rate", "noise_multiplier"))
    turns = math.ceil(sum(line["steps"] for line in lines) / b)
    assert (b, rate, turns) == (8, 0.08, 3)
    exact = (RdpAccountant if accountant == "rdp" else PLDAccountant)()
    exact.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), turns)
    told = ledger.epsilon_of(tmp_path / "privacy.jsonl")
    assert told == pytest.approx(exact.get_epsilon(1e-5), rel=0.01, abs=0.01 if accountant == "prv" else 0)
    assert told == epsilon(record.events[5], 1e-5, accountant)


def test_a_ledger_names_the_mechanism_so_that_who_knows_no_bands_refuses_it(tmp_path):
    independent, other = (m.event() for m in (plain(), banded(plain(), 8)))
    assert "bands" not in independent.to_json() and Event.from_json(independent.to_json()) == independent
    assert other.to_json()["bands"] == 8 and Event.from_json(other.to_json()) == other
    record = ledger.Ledger(tmp_path)
    record.spend(1, {0: independent, 1: other}, delta=1e-5, unit="example", accountant="pld")
    one, two = (json.loads(line) for line in (tmp_path / "privacy.jsonl").read_text().splitlines())
    assert one["mechanism"] == ledger.MECHANISM and two["mechanism"] == ledger.BANDED != ledger.MECHANISM
    for wrong in ({**two, "mechanism": ledger.MECHANISM}, {**two, "bands": 1}, {**one, "bands": 2}):
        with pytest.raises(ledger.UserError, match="another mechanism"):
            ledger._checked(wrong, "here")


# What it is drawn from.


def test_keys_at_a_site_are_the_operating_systems_and_no_step_comes_twice_under_one():
    """A worker that starts anew has another key, and a block of its own; so has a count that goes back."""
    past = Past(None)
    one = past.block(3, 10, 2)
    assert past.block(3, 12, 2) == one and one[1] == 10 and past.block(3, 20, 2) == one  # rounds may be missed
    back = past.block(3, 21, 2)
    assert back[1] == 21 and back[0] != one[0]
    assert past.block(4, 20, 2)[0] not in (one[0], back[0])
    assert Past(None).block(3, 10, 2)[0] != one[0]
    assert Past(7).block(3, 10, 2) == Past(7).block(3, 10, 2) == (7, 0)


def test_a_block_that_begins_late_begins_with_the_whole_noise_of_a_first_step():
    mechanism = banded(plain(), 4)
    late = mechanism.noise(Rng(bytes(32), 9, 2, first=16, past=Past(None)))
    assert late.variance == pytest.approx(bands.coefficients(4, RUN)[0] ** -2)
    late.standard_normal(5)
    assert late.variance == pytest.approx((bands.inverse(bands.coefficients(4, RUN), 2) ** 2).sum())


def test_a_draw_that_nobody_counts_is_refused():
    assert [Drawn(("a",), firsts=(3, 5)).first(draw) for draw in range(2)] == [3, 5]
    with pytest.raises(ContractError, match="which is not known here"):
        Drawn(("a",)).first(1)


# Which bands.


def test_auto_takes_the_bands_with_the_least_noise_in_the_weights_and_one_where_they_do_not_pay():
    """The mean client of `noniid`, and one of whose rows a step takes more than a half."""
    rate, steps, asked = 32 / 3600, 60, []

    def noise(rate, turns):
        asked.append((round(rate * 3600 / 32), turns))
        return accounting.calibrate(3.0, 1e-5, rate, turns)

    best = bands.choose(3.0, 1e-5, rate, steps, noise)
    left = {b: noise(b * rate, turns) * bands.error(b, steps) for b, turns in asked[:]}
    assert left[best] == min(left.values()) < 0.7 * left[1] and best in (8, 16)
    assert bands.choose(3.0, 1e-5, 0.6, 60, noise) == bands.choose(3.0, 1e-5, 0.01, 1, noise) == 1


def test_auto_takes_one_band_where_the_real_accountant_finds_no_better():
    """Whatever Renyi DP would have it take."""
    assert bands.choose(3.0, 1e-5, 32 / 3600, 60, lambda rate, turns: rate) == 1
