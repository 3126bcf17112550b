"""The privacy page keeps to its figures and to the code's."""

import math
import re
from pathlib import Path

import pytest

from fedlora import scenario
from fedlora.privacy import accounting, cohorts, grid

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
NUMBER = r"([\d.]+)"
ROWS = re.findall(
    rf"^\| ([^|]+) \| (\d+) \| {NUMBER} \| {NUMBER} \| {NUMBER} \| {NUMBER} \| ([^|]+) \| (\w+) \|$", PAGE, re.M
)
AUDITED = scenario.load("audit")


def test_the_audit_table_has_the_true_client_and_each_seeded_fault():
    assert [row[0] for row in ROWS] == [
        "`dp_sgd` as it is",
        "one noise of a client in every round",
        "no noise on the classifier",
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_audit_s_verdict_follows_from_its_figures(row):
    _, _, claimed, server, anyway, model, noise, verdict = row
    assert float(anyway) <= float(server)
    refuted = max(float(server), float(model)) > float(claimed) or not noise.startswith("as stated")
    assert verdict == ("refuted" if refuted else "stands") == ("stands" if row == ROWS[0] else "refuted")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_claims_are_what_the_scenario_s_ledger_says(row):
    """Clients of 95 tweets."""
    told, asked = AUDITED.clients, AUDITED.privacy
    assert f"four clients of {95} tweets" in PAGE and told.total == 4
    rate, rounds = told.batch_size / 95, AUDITED.rounds
    assert int(row[1]) == rounds
    noise = accounting.calibrate(asked.epsilon, asked.delta, rate, rounds * told.local_steps)
    event = accounting.Event(noise_multiplier=noise, sample_rate=rate, steps=rounds, clip_norm=asked.clip_norm)
    assert float(row[2]) == pytest.approx(accounting.epsilon([event], asked.delta), abs=0.06)


def test_what_it_says_of_secure_aggregation_are_the_code_s_constants():
    for said in (
        f"`range` / 2^{grid.BITS - 1}",
        f"Up to {cohorts.MOST:,} clients",
        f"{['', 'one', 'two', 'three'][cohorts.LEAST]} clients at least",
        f"{['eight'][int(grid.FINE) - 8]} steps to a standard deviation",
    ):
        assert said in PAGE
    worst = -2 * math.pi**2 * grid.FINE**2 / 2  # of the exponents in the paper's Theorem 1: k / (k + 1) = 1/2
    assert worst < -600
