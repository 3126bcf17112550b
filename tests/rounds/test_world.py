"""Devices: times by hand, who is there, and that all of it follows from the seed."""

import math

import pytest

from fedlora.errors import ScenarioError, SettingError
from fedlora.rounds.world import DAY, HOUR, World
from fedlora.seeding import generator

SLOW = "clients.tiers={one: {share: 1, seconds_per_example: 0.5, megabits_down: 8, megabits_up: 1}}"
WAY = {"num_examples": 40, "bytes_down": 3_000_000, "bytes_up": 1_000_000}


def world(tiny, told, *overrides, **options):
    return World(tiny(f"world={told}", *overrides, **options))


def test_a_journey_by_hand(tiny):
    """3 MB at 8 Mbit/s is 3 s; two steps of 8 examples at 0.5 s are 8 s; 1 MB at 1 Mbit/s is 8 s."""
    way = world(tiny, "{}", SLOW).journey(0, 1, 100.0, **WAY)
    assert (way.trains, way.sends, way.arrives, way.steps) == (103, 111, 119, 2)
    assert way.comes and way.gone == math.inf and way.ends == 119
    assert way.sent(101.5) == (1_500_000, 0) and way.sent(113) == (3_000_000, 250_000)


@pytest.mark.parametrize("deadline, steps, comes", [(19, 2, True), (16, 1, True), (14, 1, False)])
def test_by_a_deadline_a_slow_client_sends_the_steps_that_it_manages(tiny, deadline, steps, comes):
    way = world(tiny, f"{{deadline: {deadline}, partial_work: true}}", SLOW).journey(0, 1, 0.0, **WAY)
    assert (way.steps, way.comes) == (steps, comes)
    late = world(tiny, f"{{deadline: {deadline}}}", SLOW).journey(0, 1, 0.0, **WAY)
    assert late.steps == 2 and late.comes == (deadline >= 19) and late.ends == min(19, deadline)


def test_a_share_of_the_clients_vanishes_and_speeds_are_spread(tiny):
    """Of 2,000 coins at 0.3 between 522 and 678 fall so, but for once in ten thousand."""
    made = world(tiny, "{dropout: 0.3, deadline: 1000, spread: 0.5}", SLOW)
    ways = [made.journey(c, 1, 0.0, **WAY) for c in range(2000)]
    assert 522 < sum(not way.comes for way in ways) < 678
    times = [math.log((way.sends - way.trains) / 8) for way in ways]
    assert abs(sum(times) / 2000) < 0.05 and sum(t * t for t in times) / 2000 == pytest.approx(0.25, rel=0.15)
    assert ways == [made.journey(c, 1, 0.0, **WAY) for c in range(2000)]
    assert all(made.journey(c, 2, 0.0, **WAY).arrives != ways[c].arrives for c in range(9))


def test_by_day_fewer_are_there_than_at_night(tiny):
    made = world(tiny, "{deadline: 9, availability: {kind: diurnal, low: 0.1, high: 0.8, peak_hour: 2}}")
    there = {hour: sum(made.is_there(c, hour * HOUR + 5) for c in range(1000)) for hour in (2, 14, 26)}
    assert 740 < there[2] < 860 and 60 < there[14] < 140 and 740 < there[26] < 860
    client = next(c for c in range(1000) if made.is_there(c, 2 * HOUR))
    assert made._until(client, 2 * HOUR + 1) % HOUR == 0 and made._until(client, 2 * HOUR + 1) >= 3 * HOUR


def test_clients_come_and_go_by_their_share_of_the_time(tiny):
    made = world(tiny, "{deadline: 9, availability: {kind: markov, on: 1000, off: 3000}}")
    assert 195 < sum(made.is_there(c, 50_000.0) for c in range(1000)) < 305
    stays = [made._until(c, DAY + 5) - DAY - 5 for c in range(1000) if made.is_there(c, DAY + 5)]
    assert 750 < sum(stays) / len(stays) < 1250  # exponential: what is left is as long as the whole


def test_a_trace_is_read_and_repeated(tiny, tmp_path):
    (file := tmp_path / "trace.csv").write_text("client,start,end\n1,10,20\n0,0,5\n1,30,40\n")
    made = world(tiny, f"{{deadline: 9, availability: {{kind: trace, file: {file}, period: 50}}}}")
    seen = [[t for t in range(0, 100, 5) if made.is_there(c, t)] for c in (0, 1, 2)]
    assert seen == [[0, 50], [10, 15, 30, 35, 60, 65, 80, 85], []]
    assert made._until(1, 62.0) == 70.0 and made.journey(1, 1, 12.0, **WAY).gone == 20
    for text in ("client,begin\n1,2\n", "client,start,end\n1,5,5\n", "client,start,end\none,1,2\n"):
        file.write_text(text)
        with pytest.raises(SettingError, match="no table of client, start and end"):
            world(tiny, f"{{deadline: 9, availability: {{kind: trace, file: {file}}}}}")


def test_of_many_clients_few_are_looked_at(tiny, monkeypatch):
    made = world(tiny, "{}", "clients.total=1000000")
    looked = []
    monkeypatch.setattr(made, "_until", lambda client, time: looked.append(client) or math.inf)
    assert len(set(made.look(5, 0.0, 1, "cohort"))) == 5 == len(looked)


def test_a_tier_gives_rank_and_speed(tiny):
    tiers = "clients.tiers={a: {share: 0.5, rank: 2, megabits_up: 1}, b: {share: 0.5, megabits_up: 2}}"
    scenario = tiny(tiers, "strategy.use=flexlora")
    assert scenario.clients.possible_ranks(4) == [2, 4]
    for client in range(20):
        tier = scenario.clients.tier(client, scenario.seed)
        assert scenario.clients.rank(client, scenario.seed, 4) == {1: 2, 2: 4}[tier.megabits_up]
    assert {scenario.clients.rank(c, scenario.seed, 4) for c in range(20)} == {2, 4}
    assert generator(scenario.seed, 0, "tier").random() < 0.5 or scenario.clients.rank(0, scenario.seed, 4) == 4


@pytest.mark.parametrize(
    "overrides, private, words",
    [
        (("world={dropout: 0.1}",), True, "set world.deadline"),
        (("world={partial_work: true}",), True, "set world.deadline"),
        (("world={concurrency: 2}", "clients.retries=1"), True, "rounds in step"),
        (("world={concurrency: 2, over_select: 2}",), True, "rounds in step"),
        (("world={}", "secure_aggregation={}"), False, "not simulated"),
        (("world={over_select: 2}", "privacy={unit: client, epsilon: 8, delta: 1.0e-2}"), False, "does not cover"),
        (("world={concurrency: 2}", "privacy={unit: client, epsilon: 8, delta: 1.0e-2}"), False, "are drawn"),
        (("world={availability: {on: 3}}",), True, "needs a kind, one of diurnal, markov, trace"),
        (("clients.tiers={a: {share: 0.5}}",), True, "sum to 1"),
        (("clients.tiers={a: {share: 1}}", "clients.ranks={kind: list, values: [4]}"), True, "not both"),
    ],
)
def test_what_cannot_be_is_one_line(tiny, overrides, private, words):
    told = [*overrides, *([] if private else ["clients.use=sgd"])]
    with pytest.raises(ScenarioError, match=words):
        tiny(*told, private=private or "privacy" in str(overrides))
