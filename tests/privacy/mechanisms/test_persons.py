"""DP-SGD for each person: what a person adds to a sum, and whose rows a step takes, whoever else is there."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.client import Rng
from fedlora.privacy.mechanisms.bands import banded, coefficients
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.mechanisms.persons import Persons, cut
from fedlora.seeding import stream

BOUND = 0.7
SHAPES = ((3, 2), (4,))


class Silent:
    """In the place of noise."""

    def standard_normal(self, size):
        return np.zeros(size)

    normal = lambda self, mean, std: np.zeros(1)  # noqa: E731


def people(owners):
    """Persons of rows 10, 11, ..."""
    return Persons(10 + np.arange(len(owners)), np.array(owners))


def lengths(rows):
    return rows * 7 % 5 + 1


def clipped_sum(drawn, gradients, size, clip="flat"):
    """The sum of a step without noise, by the optimiser of the mechanism, (numbers,).

    Args:
        drawn: the rows of each person.
        gradients: of each row a flat vector.
        size: of micro-batches.
        clip: how.
    """
    quantile = 0.5 if clip == "quantile" else None
    mechanism = ExampleGaussian(
        noise_multiplier=1.0,
        sample_rate=0.5,
        total=100,
        batch_size=50,
        steps=1,
        clip_norm=BOUND,
        clip=clip,
        quantile=quantile,
    )
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = mechanism.optimizer(torch.optim.SGD(parameters, lr=1.0), Silent())
    begun, parts = [], cut(drawn, lengths, np.ones_like, size)
    for i, part in enumerate(parts):
        optimizer.zero_grad(set_to_none=True)
        given = torch.stack([gradients[int(row)] for row in part.rows])
        for p, piece in zip(parameters, torch.split(given, [6, 4], dim=1), strict=True):
            p.grad_sample = piece.reshape(-1, *p.shape)
        begun = part.join(parameters, begun)
        assert all(len(p.grad_sample) == part.whole for p in parameters)
        if i < len(parts) - 1:
            optimizer.signal_skip_step()
        optimizer.step()
    if not parts:
        return torch.zeros(10)
    return -50 * torch.cat([p.detach().flatten() for p in parameters])


def gradients_of(seed, rows, scale):
    made = torch.Generator().manual_seed(seed)
    return {10 + i: scale * torch.randn(10, generator=made) for i in range(rows)}


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=24),
    who=st.integers(0, 5),
    most=st.one_of(st.none(), st.integers(1, 4)),
    size=st.integers(1, 7),
    clip=st.sampled_from(["flat", "per_layer", "automatic", "quantile"]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_without_all_rows_of_a_person_the_clipped_sum_moves_by_the_bound_at_most(
    owners, who, most, size, clip, seed, scale
):
    """Also in a bound that adapts: its first value."""
    drawn = people(owners).drawn(np.ones(len(set(owners)), bool), most, lambda p: stream(seed, p), 0)
    gradients = gradients_of(seed, len(owners), scale)
    names = sorted(set(owners))
    without = [rows for name, rows in zip(names, drawn, strict=True) if name != who]
    moved = clipped_sum(drawn, gradients, size, clip) - clipped_sum(without, gradients, size, clip)
    assert float(moved.norm()) <= BOUND * (1 + 1e-4)
    if who not in names:
        assert float(moved.norm()) == 0.0


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_is_clipped_is_the_mean_of_a_persons_rows(size):
    """Two rows of lengths 4 and 2 on one axis, one on another: means of length 3 and 0.5; one is cut."""
    gradients = {10: torch.zeros(10), 11: torch.zeros(10), 12: torch.zeros(10)}
    gradients[10][0], gradients[11][0], gradients[12][9] = 4.0, 2.0, 0.5
    made = clipped_sum([np.array([10, 11]), np.array([12])], gradients, size)
    assert made.tolist() == pytest.approx([BOUND, *[0.0] * 8, 0.5], rel=1e-5)
    opposed = {10: gradients[10], 11: -gradients[10]}
    assert float(clipped_sum([np.array([10, 11])], opposed, size).norm()) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 9))
def test_micro_batches_hold_each_row_once_and_persons_in_a_row(owners, most, size):
    drawn = people(owners).drawn(np.ones(len(set(owners)), bool), most, lambda p: stream(1, p), 0)
    parts = cut(drawn, lengths, np.ones_like, size)
    rows = np.concatenate([part.rows for part in parts])
    assert sorted(rows) == sorted(np.concatenate(drawn)) and all(len(part.rows) < 1.5 * size + 1 for part in parts)
    assert sum(part.whole for part in parts) == len(drawn)
    assert sum(part.shares.sum() for part in parts) == pytest.approx(len(drawn))
    assert [part.begun for part in parts] == [False, *(part.goes_on for part in parts[:-1])]


def test_which_rows_of_a_person_are_taken_depends_on_nobody_else():
    owners = np.repeat(np.arange(4), 9)
    every = people(owners).drawn(np.ones(4, bool), 3, Rng(7, 1, 0), 2)
    others = 100 + np.arange(27)  # another person's rows in the place of all but those of person 2
    changed = Persons(np.concatenate([others, 10 + np.arange(18, 27)]), np.repeat([0, 1, 3, 2], 9))
    alone = changed.drawn(np.array([False, False, True, False]), 3, Rng(7, 1, 0), 2)
    assert np.array_equal(every[2], alone[0]) and len(alone[0]) == 3
    again = people(owners).drawn(np.ones(4, bool), 3, Rng(7, 1, 0), 3)
    assert any(not np.array_equal(one, other) for one, other in zip(every, again, strict=True))


def test_every_row_of_a_person_is_as_likely():
    """Of 5 rows 2 are taken: of 2,000 steps each in 800, give or take five deviations of 22."""
    made, counts = people([0] * 5), np.zeros(5)
    for step in range(2000):
        (rows,) = made.drawn(np.ones(1, bool), 2, lambda p: stream(3, p), step)
        counts[rows - 10] += 1
    assert np.abs(counts - 800).max() < 110


def test_groups_of_banded_noise_are_of_persons():
    plain = ExampleGaussian(
        noise_multiplier=1.0, sample_rate=0.25, total=8, batch_size=2, steps=4, clip_norm=BOUND
    )
    made, owners = banded(plain, coefficients(4, 60)), np.repeat(np.arange(8), 3)
    for step in range(8):
        drawn = people(owners).drawn(made.taken(stream(5, step), step), None, lambda p: stream(1, p), step)
        assert len(drawn) == 2 and all(len(rows) == 3 for rows in drawn)  # all of a group, at four times the rate
        assert {int(rows[0] - 10) // 3 % 4 for rows in drawn} == {step % 4}
