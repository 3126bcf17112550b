"""What a client owes the ledger, by what its site says."""

import dataclasses

import pytest

from fedlora import prepare
from fedlora.engine.replies import Report
from fedlora.privacy.accounting import Event
from fedlora.privacy.affordable import could_be
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger

A = Event(noise_multiplier=2.0, sample_rate=0.1, steps=2, clip_norm=1.0)
B = dataclasses.replace(A, sample_rate=0.2)
TERMS = {"delta": 1e-3, "unit": "example", "accountant": "pld"}


def of(event, steps):
    return dataclasses.replace(event, steps=steps)


@pytest.mark.parametrize(
    ("known", "event", "spent", "again", "owed"),
    [
        ([], A, None, False, [A]),  # a client that keeps no ledger
        ([], A, (A,), False, [A]),
        ([], A, (of(A, 6),), False, [of(A, 6)]),  # two replies were lost
        ([A], A, (A,), True, []),  # the answer of before
        ([], A, (A,), True, [A]),  # which the server had not heard
        ([of(A, 8)], A, (of(A, 4),), False, [A]),  # a ledger that went back: it has trained all the same
        ([of(A, 8)], None, (of(A, 4),), False, []),  # a refusal
        ([A, B], A, (A, B, A), False, [A]),  # there and back
        ([A], B, (of(A, 4), B), False, [A, B]),
        ([A, B, A], None, (A, B, A, B), False, [B]),
        ([], A, (), False, [A]),
    ],
)
def test_what_is_owed(tmp_path, known, event, spent, again, owed):
    record = Ledger(tmp_path)
    for round, one in enumerate(known, 1):
        record.spend(round, {0: one}, **TERMS)
    told = dict.fromkeys(("scenario", "client", "settings", "data", "central"))
    sizes = {"num_examples": 1, "steps": 2, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
    report = Report(client=0, event=event, spent=spent, again=again, **sizes)
    found = Budget(**told, ledger=record)._owed(report)
    assert sorted(found, key=repr) == sorted(owed, key=repr)


@pytest.mark.parametrize(
    ("privacy", "spent", "fine"),
    [
        ("{epsilon: 8}", (A,), True),
        ("{epsilon: 8}", (), True),
        ("{epsilon: 8}", (of(A, 4000),), False),  # more steps than a hundred lives have
        ("{epsilon: 8}", (of(A, 1700),), False),  # beyond what was promised
        ("{epsilon: 8}", (of(A, 0),), False),
        ("{epsilon: 8}", (dataclasses.replace(A, bands=4),), False),
        ("{epsilon: 8, bands: 4}", (dataclasses.replace(A, bands=4),), True),
        ("{epsilon: 8}", (dataclasses.replace(A, noise_multiplier=0.1),), False),
        ("{epsilon: 8}", (dataclasses.replace(A, sample_rate=5e-7),), True),
        ("{noise_multiplier: 0.005}", (dataclasses.replace(A, noise_multiplier=0.005),), True),
        ("{noise_multiplier: 2}", (of(A, 200),), True),
        ("{noise_multiplier: 3}", (A,), False),
    ],
)
def test_what_an_honest_site_may_have_paid(tiny, privacy, spent, fine):
    assert could_be(spent, tiny(f"privacy={privacy}", "rounds=9")) is fine


@pytest.mark.parametrize(
    ("change", "fine"),
    [({}, True), ({"steps": 100}, True), ({"steps": 101}, False), ({"sample_rate": 0.5}, False)],
)
def test_a_statistic_has_noise_of_its_own_beside_noise_that_is_fixed(tiny, change, fine):
    """Of noise that makes epsilon 2, where training has 3; with half of it, epsilon is more."""
    told = ("compress={use: lord}", "statistics={kind: gram, epsilon: 2}", "privacy={noise_multiplier: 3}")
    scenario = tiny(*told, "rounds=9")
    event = prepare.statistic(scenario)
    assert could_be((dataclasses.replace(event, **change),), scenario) is fine
    assert not could_be((dataclasses.replace(event, noise_multiplier=event.noise_multiplier / 2),), scenario)


def test_without_privacy_nothing_is_paid(tiny):
    plain = tiny(private=False)
    assert could_be((), plain) and not could_be((A,), plain)
