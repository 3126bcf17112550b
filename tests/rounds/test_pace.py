"""Rounds on a virtual clock: who is used, what is paid, and that a run can be broken off anywhere."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.adapter import Instruction, Update
from fedlora.engine.intake import Intake
from fedlora.errors import RoundError, UserError
from fedlora.planning import plan
from fedlora.privacy import ledger
from fedlora.reports.console import summary_lines
from fedlora.reports.planned import plan_lines
from fedlora.rounds.pace import Pace
from fedlora.rounds.progress import UnderWay
from fedlora.rounds.world import Journey
from fedlora.simulation import simulate

TIERS = (
    "clients.tiers={fast: {share: 0.5, seconds_per_example: 0.01}, slow: {share: 0.5, seconds_per_example: 0.3}}"
)
TEN = ("clients.total=10", "clients.per_round=4", "clients.batch_size=4", TIERS)
BUFFERED = "world={concurrency: 6, spread: 0.3, dropout: 0.1, deadline: 100}"
CROWD = "world={over_select: 1.5, spread: 0.3, dropout: 0.1, deadline: 100}"


def final(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_a_world_without_limits_changes_nothing_but_the_cohorts(tiny, tmp_path):
    run = simulate(tiny("world={}"), out=tmp_path / "run")
    plain = simulate(tiny(), out=tmp_path / "plain")
    assert same(final(run), final(plain)) and "virtual_seconds" not in plain.rounds[0]
    slowest = [max(c["virtual_seconds"] for c in run.clients if c["round"] == r) for r in (1, 2)]
    assert [line["virtual_seconds"] for line in run.rounds] == pytest.approx(np.cumsum(slowest).tolist(), abs=1e-3)
    assert run.summary["virtual_seconds"] == run.rounds[-1]["virtual_seconds"]


def test_of_more_than_needed_the_first_are_used_and_the_others_have_paid(tiny, tmp_path):
    told = ("world={over_select: 2}", *TEN, "rounds=3")
    run = simulate(tiny(*told), out=tmp_path / "run")
    paid = [(line["round"], line["client"]) for line in ledger.read(run.folder / "privacy.jsonl")]
    for line in run.rounds:
        of_round = [c for c in run.clients if c["round"] == line["round"]]
        used = [c for c in of_round if c["error"] is None]
        late = [c for c in of_round if c["error"] == "late"]
        assert (len(used), len(late)) == (4, 4) == (line["clients"], line["late"]) and line["failures"] == 0
        end = max(c["virtual_seconds"] for c in used)
        assert all(c["virtual_seconds"] == end and c["bytes_up"] < used[0]["bytes_up"] for c in late)
        assert {(line["round"], c["client"]) for c in of_round} <= set(paid)
    assert all(c["epsilon"] > 0 for c in run.clients if c["error"] == "late")


def test_by_the_deadline_the_slow_send_what_they_managed_and_pay_for_that(tiny, tmp_path):
    """Two steps of 8 examples at 0.3 s take 4.8 s: by 4 s one is done."""
    slow = "clients.tiers={slow: {share: 1, seconds_per_example: 0.3, megabits_up: 1000}}"
    run = simulate(tiny("world={deadline: 4, partial_work: true}", slow), out=tmp_path / "run")
    assert [c["steps"] for c in run.clients] == [1] * 8 and run.rounds[-1]["virtual_seconds"] < 8
    assert {line["steps"] for line in ledger.read(run.folder / "privacy.jsonl")} == {1}


@pytest.mark.parametrize("world", [BUFFERED, CROWD])
@pytest.mark.parametrize("more", [(), ("compression={up: {kind: top_k, share: 0.2}}",)])
def test_a_run_goes_on_bit_for_bit(tiny, tmp_path, world, more):
    told = (world, *TEN, *more, "privacy.epsilon=null", "privacy.noise_multiplier=1.0")
    whole = simulate(tiny(*told, "rounds=6"), out=tmp_path / "whole")
    simulate(tiny(*told, "rounds=3"), out=tmp_path / "part")
    part = simulate(tiny(*told, "rounds=6"), out=tmp_path / "part", resume=True)
    assert same(final(whole), final(part))
    for one, other in zip(whole.clients, part.clients, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    clock = [[line["virtual_seconds"] for line in run.rounds] for run in (whole, part)]
    assert clock[0] == clock[1] == sorted(clock[0])


def test_updates_are_taken_as_they_come_with_less_weight_for_older_ones(tiny, tmp_path):
    run = simulate(tiny("world={concurrency: 6}", *TEN, "rounds=5", private=False), out=tmp_path / "run")
    assert max(line["staleness"] for line in run.rounds) > 0 and run.rounds[0]["staleness"] == 0
    step = simulate(tiny("world={}", *TEN, "rounds=5", private=False), out=tmp_path / "step")
    assert run.rounds[-1]["virtual_seconds"] < step.rounds[-1]["virtual_seconds"]
    saved = json.loads((run.folder / "checkpoint" / "state.json").read_text())
    assert 4 <= len(saved["words"]["under_way"]) <= 6
    ids = [(c["round"], c["client"]) for c in run.clients]
    assert len(set(ids)) == len(ids)


def test_the_mean_of_a_buffer_by_hand(tiny, build):
    """A change of 3 trained one adapter ago counts 3 / sqrt(2)."""
    scenario, worker = tiny("world={concurrency: 2}", private=False), build(private=False)
    pace = Pace(
        scenario=scenario,
        strategy=worker.strategy,
        data=worker.dataset,
        intake=Intake(scenario, worker.strategy, worker.dataset.num_examples),
        spends=lambda instruction, client: None,
    )
    told = Instruction(round=5, adapter={"w": np.ones(1, np.float32)}, train=("w",), send=("w",))
    way = Journey(
        client=1, round=4, start=0, trains=1, sends=2, arrives=3, gone=9, steps=2, bytes_down=1, bytes_up=1
    )
    change = Update(adapter={"w": np.full(1, 3, np.float32)}, weight=2.0, clients=(1,))
    change = replace(change, moments=np.array([[8, 0.5]], np.float32))
    told = replace(told, moments=np.array([[2, 0.1]], np.float32))
    made = pace._arrived(told, UnderWay(way, change), staleness=3)
    assert made.moments.tolist() == [[5.0, pytest.approx(0.3)]]  # half of either
    made = pace._arrived(told, UnderWay(way, change), staleness=1)
    assert made.adapter["w"][0] == pytest.approx(1 + 3 / 2**0.5) and made.adapter["w"].dtype == np.float32


@pytest.mark.parametrize(
    "told",
    [
        (CROWD, *TEN, "rounds=4"),
        (BUFFERED, *TEN, "rounds=4"),
        ("world={deadline: 3, partial_work: true}", TIERS, "strategy.use=flora", "rounds=3"),
        ("world={deadline: 900, availability: {kind: markov}}", *TEN, "clients.min_replies=2", "rounds=3"),
    ],
)
def test_a_plan_tells_the_bytes_and_the_virtual_time(tiny, tmp_path, told):
    planned, run = plan(tiny(*told)), simulate(tiny(*told), out=tmp_path / "run")
    keys = ("round", "clients", "late", "bytes_up", "bytes_down")
    assert [[a[k] for k in keys] for a in planned.rounds] == [[b[k] for k in keys] for b in run.rounds]
    assert planned.virtual_seconds == pytest.approx(run.summary["virtual_seconds"], abs=1e-3)
    assert planned.epsilon == pytest.approx(run.summary["epsilon"], rel=1e-9)
    hours = f"{run.summary['virtual_seconds'] / 3600:.2f} virtual hours"
    assert any(hours in line for line in plan_lines(planned.to_json()))
    assert any(hours in line for line in summary_lines(run))


@pytest.mark.parametrize(
    "told, words",
    [
        (
            ("world={concurrency: 2}", "strategy.use=rolora"),
            "take one of fedavg_lora, ffa_lora, la_lora$",
        ),
        (("world={concurrency: 2}", "strategy.use=flexlora"), "take one of"),
        (("world={}", "strategy.use=fedask"), "makes 2 trips"),
        (
            ("world={deadline: 9, availability: {kind: trace, file: none.csv}}",),
            "world.availability.file: none.csv: is no table",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tiny, tmp_path, told, words):
    with pytest.raises(UserError, match=words):
        simulate(tiny(*told), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_round_tried_again_counts_who_was_late_before_by_how_it_ended(tiny, tmp_path):
    """Three of four must arrive by a deadline that one in two passes: some rounds take a second try."""
    told = ("world={deadline: 0.9, spread: 0.3}", "clients.min_replies=3", "clients.retries=9", "clients.total=8")
    tiers = "clients.tiers={one: {share: 1, seconds_per_example: 0.05}}"
    run = simulate(
        tiny(*told, tiers, "clients.per_round=4", "rounds=4", "seed=1", private=False), out=tmp_path / "run"
    )
    for line in run.rounds:
        mine = [c["error"] for c in run.clients if c["round"] == line["round"]]
        assert (
            line["clients"] == mine.count(None) >= 3
            and line["late"] + line["failures"] == len(mine) - line["clients"]
        )
    assert max(sum(c["round"] == line["round"] for c in run.clients) for line in run.rounds) > 4


def test_where_nobody_comes_the_run_says_so(tiny, tmp_path):
    (file := tmp_path / "trace.csv").write_text("client,start,end\n99,0,1\n")
    for more in ("", ", concurrency: 2"):
        world = f"world={{deadline: 9, availability: {{kind: trace, file: {file}}}{more}}}"
        with pytest.raises(RoundError, match="nobody came within 7 days of virtual time"):
            simulate(tiny(world), out=tmp_path / f"run{len(more)}")


def test_clients_protected_whole_are_drawn_by_coins_among_those_that_are_there(tiny, tmp_path):
    whole = ("privacy={unit: client, epsilon: 8, delta: 1.0e-2, clip_norm: 0.5}", "clients.use=sgd")
    world = "world={deadline: 2, availability: {kind: markov, on: 2000, off: 2000}}"
    told = (*whole, world, *TEN, "compression={up: {kind: int8}}", "rounds=3")
    run, plain = (
        simulate(tiny(*told), out=tmp_path / "run"),
        simulate(tiny(*told, "world=null"), out=tmp_path / "all"),
    )
    assert run.summary["epsilon"] == plain.summary["epsilon"]  # the rate is an upper bound
    asked = [{(c["round"], c["client"]) for c in r.clients} for r in (run, plain)]
    assert asked[0] < asked[1] and any(c["error"] == "late" for c in run.clients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("world", [BUFFERED, CROWD])
def test_nothing_depends_on_who_runs_the_clients(tiny, tmp_path, world):
    told = (world, *TEN, "compression={up: {kind: top_k, share: 0.2}, down: {kind: int8}}", "rounds=3")
    runs = [
        simulate(
            tiny(*told, f"engine.kind={kind}", f"engine.workers={workers}"), out=tmp_path / f"{kind}{workers}"
        )
        for kind, workers in (("inline", 1), ("ray", 1), ("ray", 2))
    ]
    assert same(final(runs[0]), final(runs[1])) and same(final(runs[0]), final(runs[2]))
    lines = [[{**c, "seconds": 0} for c in run.clients] for run in runs]
    assert lines[0] == lines[1] == lines[2]
