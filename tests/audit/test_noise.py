"""Noise is measured by itself: the true one is never accused, each way to spoil it is."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedlora.audit import noise
from fedlora.audit.noise import Seen, measure, places, worth

SIZES = (900, 900, 200)
NAMES = ("query", "value", "head")
SIGMA = 2.0


def update(client, round, drawn, gradient=0.0, steps=1, noise=SIGMA):
    """An update of a client of 40 examples: `drawn` over all numbers, and a gradient along one direction."""
    vector = drawn + gradient * np.ones(sum(SIZES)) / math.sqrt(sum(SIZES))
    tensors = np.split(vector.astype(np.float32), np.cumsum(SIZES)[:-1])
    return Seen(
        client=client,
        round=round,
        steps=steps,
        rate=0.25,
        noise=noise,
        examples=40,
        names=NAMES,
        sizes=SIZES,
        worth=np.full(3, float(steps)),
        squares=np.array([float(np.square(t, dtype=np.float64).sum()) for t in tensors]),
        kept=tuple(tensors),
        parts=np.zeros((3, 0)),
    )


def run(seed=0, clients=3, rounds=10, gradient=8.0, spoil=lambda noise, client, round: noise, **more):
    """Updates with fresh noise, which `spoil` may change."""
    rng = np.random.default_rng(seed)
    made = []
    for round in range(1, rounds + 1):
        for client in range(clients):
            drawn = SIGMA * math.sqrt(more.get("steps", 1)) * rng.standard_normal(sum(SIZES))
            made.append(update(client, round, spoil(drawn, client, round), gradient, **more))
    return made


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_the_true_noise_is_not_accused_whatever_the_gradients(seed, steps):
    """Even where all of ten examples agree in every round on one direction."""
    found = measure(run(seed, gradient=10.0 * steps, steps=steps), canaries=20)
    assert not found.refuted and found.visible and 0.97 < found.least < 1.03
    assert found.lines() == [
        "as stated in each tensor of 30 updates, none of it used again",
        f"measured {found.least:.3f} of the stated deviation in {found.where}, the least likely",
    ]


def test_the_level_of_the_sizes_is_exact_without_gradients():
    """At a level of 0.2 a quarter is for the sizes: 0.05 of 400 true runs of a tensor are accused."""
    accused, rng = 0, np.random.default_rng(1)
    base = update(0, 1, np.zeros(sum(SIZES)))
    for _ in range(400):
        squares = SIGMA**2 * rng.chisquare(np.array(SIZES[:1]))
        only = replace(
            base, names=NAMES[:1], sizes=SIZES[:1], worth=np.ones(1), squares=squares, kept=base.kept[:1]
        )
        accused += bool(measure([only], canaries=0, level=0.2).short)
    assert 8 <= accused <= 34  # 20 expected, three standard deviations of 4.4


def test_a_run_of_true_noise_that_gradients_took_back_as_far_as_they_can_is_not_accused():
    """In the second step the gradients of ten examples point against the first step's noise."""
    rng, made = np.random.default_rng(2), []
    for round in range(1, 21):
        first, second = SIGMA * rng.standard_normal((2, sum(SIZES)))
        back = -10 * first / np.linalg.norm(first)  # ten examples are drawn
        made.append(update(0, round, first + back + second, steps=2))
    assert not measure(made, canaries=0).refuted


@pytest.mark.parametrize("missing", [0.0, 0.5, 0.95])
def test_a_tensor_with_less_noise_is_named(missing):
    def spoil(drawn, client, round):
        drawn[1800:] *= missing
        return drawn

    found = measure(run(rounds=20, gradient=2.0, spoil=spoil), canaries=20)
    assert found.short == ("head",) and found.where == "head" and found.refuted
    assert found.lines()[0] == "too little in head"


@pytest.mark.parametrize("sign", [1, -1])
def test_one_noise_in_every_round_of_a_client_is_found(sign):
    kept = {}

    def spoil(drawn, client, round):
        kept[client] = sign * kept.get(client, drawn)
        return kept[client]

    found = measure(run(rounds=4, spoil=spoil), canaries=20)
    assert not found.short and found.repeats == 3 * 6  # pairs of four rounds, of three clients
    assert found.repeated[0] == "client 0 in round 1 and client 0 in round 2"


def test_one_noise_of_all_clients_in_a_round_is_found():
    found = measure(
        run(spoil=lambda drawn, client, round: SIGMA * np.random.default_rng(round).standard_normal(2000)), 20
    )
    assert found.repeats == 10 * 3 and found.refuted


def test_a_noise_used_twice_in_one_tensor_alone_is_found():
    def spoil(drawn, client, round):
        if client == 2 and round in (3, 7):
            drawn[:900] = SIGMA * np.random.default_rng(5).standard_normal(900)
        return drawn

    found = measure(run(spoil=spoil), canaries=20)
    assert found.repeated == ("client 2 in round 3 and client 2 in round 7",) and found.repeats == 1
    assert found.lines()[0] == "used again in 1 pair of updates: client 2 in round 3 and client 2 in round 7"


def test_noise_of_which_a_half_is_used_again_is_found():
    common = SIGMA * np.random.default_rng(9).standard_normal(2000)
    found = measure(run(spoil=lambda drawn, client, round: math.sqrt(0.5) * (drawn + common)), canaries=20)
    assert found.repeats > 100 and not found.short


def test_one_noise_in_two_tensors_of_a_size_is_found():
    def spoil(drawn, client, round):
        drawn[900:1800] = drawn[:900]
        return drawn

    found = measure(run(rounds=1, spoil=spoil), canaries=20)
    assert found.repeated == tuple(f"two tensors of client {c} in round 1" for c in range(3))


def test_gradients_alone_are_not_taken_for_noise_that_repeats():
    """Without noise, rounds correlate fully; that the noise is missing is what is said."""
    found = measure(run(spoil=lambda drawn, client, round: 0 * drawn, gradient=9.0), canaries=20)
    assert set(found.short) == set(NAMES) and found.repeats == 0


def test_too_few_numbers_are_said_to_be_too_few():
    found = measure(run(rounds=2, noise=SIGMA * 0.2, spoil=lambda drawn, client, round: 0.2 * drawn), canaries=20)
    assert not found.visible and "too few numbers" in found.lines()[0]


@pytest.mark.parametrize(
    ("config", "role", "steps", "expected"),
    [
        ({}, "A", 3, 3),
        ({"turns": "B,A"}, "B", 3, 2),  # the first and the third step
        ({"turns": "B,A"}, "A", 1, 0),
        ({"turns": "B,A"}, "head", 3, 3),
        ({"proximal-mu": 0.5}, "B", 3, 1 + 0.9**2 + 0.9**4),  # at a rate of 0.2
        ({"low-pass": True}, "head", 2, 2),
    ],
)
def test_how_many_steps_noise_a_tensor_holds(config, role, steps, expected):
    assert worth(config, role, steps, 0.2) == pytest.approx(expected)


def test_what_is_filtered_or_rests_is_not_measured():
    assert math.isnan(worth({"low-pass": True}, "A", 2, 0.2))
    made = [replace(u, worth=np.array([math.nan, 0.0, 1.0])) for u in run()]
    assert measure(made, canaries=20).where == "head"
    assert measure([], canaries=20).lines() == ["not measured: no update came"]


def test_tensors_of_one_size_keep_the_same_places(monkeypatch):
    monkeypatch.setattr(noise, "KEPT", 100)
    kept = places((600, 600, 50), np.random.default_rng(0))
    assert [len(k) for k in kept] == [48, 48, 4] and (kept[0] == kept[1]).all()
    assert len(set(kept[0])) == 48 and kept[2].max() < 50
