"""Sweeps on a real Ray Tune: a small grid, killed once and started again; random draws; what tuning costs."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from fedlora import scenario
from fedlora.baselines import derive
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.privacy import accounting, ledger
from fedlora.privacy.together import total_epsilon
from fedlora.run import Run
from fedlora.simulation import simulate
from fedlora.sweep import _reason, judged_by, load, sweep

ROOT = Path(__file__).parents[1]

# Ray's processes outlive the objects that stand for them.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def file(tiny, tmp_path):
    """Two strategies, two epsilons, two seeds."""
    (tmp_path / "tiny.yaml").write_text(tiny("rounds=3").to_yaml())
    made = tmp_path / "sweep.yaml"
    made.write_text(f"""name: small
scenario: {tmp_path / "tiny.yaml"}
settings: {{clients.lr: 0.25}}
search:
  strategy.use: [ffa_lora, fedavg_lora]
  privacy.epsilon: [4, 8]
  seed: [0, 1]
parallel: 1
""")
    return made


def runs(out):
    return [Run.open(file.parent) for file in sorted((out / "runs").glob("*/scenario.yaml"))]


def highest(out):
    """The best accuracy of a run that ended and learnt, if any did."""
    return max((run.summary["accuracy"] for run in runs(out) if run.ended and run.learnt), default=None)


def finished(out):
    """When each run that ended wrote its summary."""
    return {f.parent.name: f.stat().st_mtime_ns for f in (out / "runs").glob("*/summary.json")}


def half_way(out):
    """The first line of each run that has gone some rounds, and has some to go."""
    return {run.folder: run.rounds[0] for run in runs(out) if not run.summary and 2 <= len(run.rounds) <= 4}


def spent_in_rounds(run):
    """Rounds in which each client paid, by its ledger."""
    lines = [json.loads(text) for text in (run.folder / "privacy.jsonl").read_text().splitlines()]
    return sorted((line["client"], line["round"]) for line in lines)


@pytest.mark.timeout(900)  # imports in four processes, which on a busy machine take minutes
def test_a_sweep_that_is_killed_goes_on_when_it_is_started_again(file, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedlora", "sweep", str(file), "--out", str(out)]
    file.write_text(file.read_text().replace("lr: 0.25", "lr: 0.25, rounds: 6"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 300
    while (len(finished(out)) < 2 or not half_way(out)) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before, begun = finished(out), half_way(out)
    assert 2 <= len(before) < 8 and begun

    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (
        len(finished(out)) == 8 and before.items() <= finished(out).items()
    )  # what was finished was not run again
    first_lines = {run.folder: run.rounds[0] for run in runs(out)}
    assert begun.items() <= first_lines.items()  # seconds and all: what was begun went on, and not from the start
    assert [line["round"] for run in runs(out) for line in run.rounds] == [*range(1, 7)] * 8
    assert all(spent_in_rounds(run) == sorted(product(range(4), range(1, 7))) for run in runs(out))  # none twice

    first = next(line for line in done.stdout.splitlines() if "ffa_lora" in line)
    assert first.startswith("ffa_lora, epsilon 4") and re.search(r"0\.\d{4} ± 0\.\d{4}", first)
    assert '"low"' in (out / "comparison.html").read_text()  # the edge of an error band
    summary = json.loads((out / "sweep.json").read_text())
    assert (summary["runs"], summary["ended"], summary["failed"]) == (8, 8, 0)
    assert all(run.scenario["clients"]["lr"] == 0.25 for run in runs(out))
    assert summary["accuracy"] == highest(out)
    assert "Tuning on private data is not free: 8 runs together give (" in done.stdout
    assert (
        8 < summary["epsilon_total"]["example"] < 4 * 4 + 4 * 8 + 8
    )  # no less than one run's, no more than the sum
    assert not (out / ".tune").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_draws_repeat_and_early_stopping_ends_what_falls_behind(file, tmp_path):
    text = file.read_text().partition("search:")[0] + "parallel: 1\n"
    file.write_text(
        f"{text}search: {{clients.lr: {{draw: loguniform, low: 0.0001, high: 1.0}}}}\n"
        "samples: 4\nseed: 4\nstop_early: {grace: 1, factor: 2}\n"
    )
    said = []
    done = sweep(file, tmp_path / "out", said.append)
    rates = {run.scenario["clients"]["lr"] for run in runs(tmp_path / "out")}
    assert len(rates) == 4 and 0.0001 <= min(rates) and max(rates) <= 1.0
    assert (done.summary["runs"], done.summary["failed"], len(said)) == (4, 0, 4)
    lengths = sorted(len(run.rounds) for run in runs(tmp_path / "out"))
    assert lengths[0] < 3 == lengths[-1]  # one was ended, one went through
    sweep(file, tmp_path / "out")
    assert {run.scenario["clients"]["lr"] for run in runs(tmp_path / "out")} == rates
    with pytest.raises(UserError, match="holds another sweep"):
        file.write_text(file.read_text().replace("seed: 4", "seed: 5"))
        sweep(file, tmp_path / "out")
    gc.collect()  # while its warnings are still let pass


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_fail_are_told_and_counted_and_cost_what_they_spent(file, tmp_path):
    """The comparison is made of the others; where none is left, it says so."""
    text = file.read_text().partition("search:")[0] + "parallel: 1\n"
    broken = "tests.engine.faulty:Broken"
    file.write_text(f"{text}search: {{clients.use: [dp_sgd, '{broken}'], seed: [0, 1]}}\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedlora", "sweep", str(file), "--out"]
    told = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert told.returncode == 1, told.stderr
    assert [line.rpartition(": ")[2] for line in told.stderr.splitlines()].count("failed") == 2
    why = "A run failed: round 1: all 4 clients failed; client 0: RuntimeError: gone."
    assert told.stdout.count(why) == 1 and why in (out / "comparison.html").read_text()
    summary = json.loads((out / "sweep.json").read_text())
    assert (summary["runs"], summary["ended"], summary["failed"]) == (4, 2, 2)
    every = [run.folder for run in runs(out)]
    ended = [run.folder for run in runs(out) if run.ended]
    assert summary["epsilon_total"]["example"] == total_epsilon(every)["example"][0]
    assert summary["epsilon_total"]["example"] > total_epsilon(ended)["example"][0]  # they may have trained
    assert summary["accuracy"] == highest(out) and (summary["best"] is None) == (highest(out) is None)

    file.write_text(f"{text}search: {{clients.use: ['{broken}'], seed: [0, 1]}}\n")
    told = subprocess.run(
        [*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert told.returncode == 1 and "A run failed: round 1: all 4" in told.stdout
    assert "best: none was measured" in told.stdout


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Two finished runs, of two rounds."""
    folder = tmp_path_factory.mktemp("pair") / "runs"
    return [simulate(tiny(f"seed={seed}", private=False), out=folder / str(seed)).folder for seed in (0, 1)]


def test_a_run_that_has_not_learnt_is_never_called_best(file, pair, tmp_path, monkeypatch):
    """Of 60 test rows; 3 * sqrt(0.8 * 0.2 / 60) = 0.155."""

    def end(folder, accuracies, losses):
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        told = [
            json.dumps({**line, "accuracy": value, "loss": loss})
            for line, value, loss in zip(lines, accuracies, losses, strict=True)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(told) + "\n")

    monkeypatch.setattr("fedlora.sweep.explore", lambda asked, folder, told: [(place, None) for place in pair])
    end(pair[0], (1.0, 0.8), (0.1, 0.3))
    end(pair[1], (0.7, 0.75), (0.3, 0.2))
    made = sweep(file, tmp_path / "out")
    assert made.summary["best"] == str(pair[1]) and made.summary["accuracy"] == 0.75
    assert any("it collapsed: accuracy was 1.0000" in line.lower() for line in made.lines())
    end(pair[1], (1.0, 0.75), (0.1, 0.2))
    made = sweep(file, tmp_path / "out")
    assert made.summary["best"] is made.summary["accuracy"] is None and "best: none has learnt" in made.lines()


def test_the_best_is_that_of_the_figure_that_the_sweep_names(file, tiny, tmp_path, monkeypatch):
    told = ("metrics=[brier]", "clients.lr=3", "rounds=4")
    pair = [simulate(tiny(f"seed={seed}", *told, private=False), out=tmp_path / f"{seed}") for seed in (0, 1)]
    monkeypatch.setattr("fedlora.sweep.explore", lambda *_: [(run.folder, None) for run in pair])
    monkeypatch.setattr(Run, "learnt", True)
    file.write_text(file.read_text().replace("name: small", "name: small\nmetric: brier"))
    with pytest.raises(UserError, match=f"{file}:2: metric: an evaluation here has no 'brier'"):
        load(file)
    file.write_text(file.read_text().replace("{clients.lr: 0.25}", "{clients.lr: 0.25, metrics: [brier]}"))
    made = sweep(file, tmp_path / "out")
    least = min(pair, key=lambda run: run.summary["metrics"]["brier"])
    assert (made.summary["best"], made.summary["brier"]) == (str(least.folder), least.summary["metrics"]["brier"])
    assert made.comparison.table().head[2] == "brier" and judged_by(load(file), least_of(file)) == ("brier", False)


def test_baselines_are_points_too_and_never_the_best(file, tiny, tmp_path, monkeypatch):
    file.write_text(file.read_text().replace("  seed: [0, 1]\n", "  baseline: [null, pooled]\n"))
    points = [*map((made := load(file)).run, made.points())]
    kinds = [point.baseline and point.baseline.kind for point in points]
    assert kinds == [None, "pooled"] * 4 and [point.privacy is None for point in points] == [False, True] * 4
    run = simulate(tiny("rounds=3"), out=tmp_path / "run")
    pooled = simulate(derive(tiny("rounds=3"), "pooled"), out=tmp_path / "pooled")
    monkeypatch.setattr(Run, "learnt", True)
    monkeypatch.setattr("fedlora.sweep.explore", lambda *_: [(r.folder, None) for r in (run, pooled)])
    monkeypatch.setattr("fedlora.sweep.final", lambda r: 0.9 if r.folder == pooled.folder else 0.6)
    assert sweep(file, tmp_path / "out").summary["best"] == str(run.folder)
    for wrong in ("[null, poold]", "[5]", "[true]", "[0]", "{draw: randint, low: 0, high: 2}"):
        file.write_text(re.sub("baseline: .*", f"baseline: {wrong}", file.read_text()))
        with pytest.raises(UserError, match=f"{file}:.*baseline should be null or one of pooled"):
            load(file)


def test_where_the_best_alone_leaves_a_baseline_does_not_choose_the_partition(file, tmp_path):
    file.write_text(
        file.read_text()
        .replace("{clients.lr: 0.25}", "{clients.lr: 0.25, data.partition.seed: 11}")
        .replace("  seed: [0, 1]\n", "  baseline: [pooled_private, null]\nselect: {mean: 3}\n")
    )
    asked = load(file).drawn(tmp_path)
    assert asked.settings["data.partition.seed"] == 11


def select(file, mean=3):
    file.write_text(file.read_text().replace("  seed: [0, 1]\n", f"select: {{mean: {mean}}}\n"))
    return load(file)


def test_where_the_best_alone_leaves_each_run_is_drawn_once(file, tmp_path, monkeypatch):
    """Of four points; each run has a seed of its own, and all of them one partition, by the scenario's seed 3."""
    monkeypatch.setattr("fedlora.selecting.number", lambda mean, coins: 12)
    made = select(file)
    asked = made.drawn(tmp_path)
    assert asked == made.drawn(tmp_path) and asked.settings == {"clients.lr": 0.25, "data.partition.seed": 3}
    points = [asked.run(point) for point in asked.points()]
    assert len(points) == 12 == len({point.seed for point in points}) and asked.select is None
    assert {(point.strategy.use, point.privacy.epsilon) for point in points} <= {
        (use, epsilon) for use in ("ffa_lora", "fedavg_lora") for epsilon in (4, 8)
    }
    (tmp_path / "drawn.json").write_text('[{"seed": 3}]')
    with pytest.raises(UserError, match="is damaged"):
        made.drawn(tmp_path)


def test_the_best_alone_is_priced_beside_the_sum(file, tiny, tmp_path, monkeypatch):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    file.write_text(file.read_text().replace("[4, 8]", "[1, 2]"))
    select(file)
    run = simulate(tiny("rounds=3", "privacy.epsilon=2"), out=tmp_path / "run")
    monkeypatch.setattr("fedlora.sweep.explore", lambda *_: [(run.folder, None)])
    summary = sweep(file, tmp_path / "out").summary
    (line, *_) = [json.loads(text) for text in (run.folder / "privacy.jsonl").read_text().splitlines()]
    one = PoissonSampledDpEvent(line["sample_rate"], GaussianDpEvent(line["noise_multiplier"]))

    def counted(steps):
        by_hand = RdpAccountant()
        by_hand.compose(RepeatAndSelectDpEvent(SelfComposedDpEvent(one, steps), 3.0, 1.0))
        return pytest.approx(by_hand.get_epsilon(1e-3), rel=0.03)

    assert summary["epsilon_of_best"] == counted(6)
    said = summary["privacy"][-1]
    assert "does not hold against anyone who saw other runs" in said and "for each example" in said
    again = shutil.copytree(run.folder, tmp_path / "out" / "runs" / "again")  # and tried a round once more
    event = accounting.Event.from_json({**line, "steps": 6})
    ledger.Ledger(again).spend(3, {0: event}, 1, delta=1e-3, unit="example", accountant="pld")
    assert sweep(file, tmp_path / "out").summary["epsilon_of_best"] == counted(12) != counted(6)


def least_of(file):
    """The first point of a sweep's grid."""
    return (made := load(file)).run(next(made.points()))


@pytest.mark.parametrize(
    "old, new, line, words",
    [
        ("name: small", "name: small\nnothing: 1", 2, "unknown key 'nothing': "),
        ("name: small", "name: small\nstop_early: {grac: 1}", 2, "did you mean 'grace'?"),
        ("seed: [0, 1]", "seed: 3", 4, "seed should be a list of values"),
        ("seed: [0, 1]", "seed: []", 4, "seed should be a list of values"),
        ("seed: [0, 1]", "seed: [0, 1]\nselect: {mean: 4}", 1, "each run has a seed of its own"),
        (
            "seed: [0, 1]",
            "clients.lr: {draw: uniform, low: 1, high: 2}\nselect: {mean: 4}",
            1,
            "a point of a grid",
        ),
        ("seed: [0, 1]", "clients.batch_size: [8]\nstop_early: {}\nselect: {mean: 4}", 1, "tells of the others"),
        ("seed: [0, 1]", "privacy.share_metrics: [true]\nselect: {mean: 4}", 8, "scores are of public rows"),
        ("seed: [0, 1]", "clients.batch_size: [8]\nselect: {mean: 0.5}", 8, "select.mean"),
        ("seed: [0, 1]", "clients.batch_size: [8]\nselect: {mean: 4, men: 4}", 8, "did you mean 'mean'?"),
        ("seed: [0, 1]", "clients.lr: {draw: normal, low: 0, high: 1}", 7, "'uniform', 'loguniform' or 'randint'"),
        ("seed: [0, 1]", "clients.lr: {draw: loguniform, low: 0, high: 1}", 7, "needs 0 < low < high"),
        ("seed: [0, 1]", "clients.lr: {draw: uniform, low: 1}", 7, "search.clients.lr.high: is missing"),
        ("seed: [0, 1]", "seed: [0, -1]", 7, "seed: should be greater than or equal to 0, not -1"),
        ("seed: [0, 1]", "sed: [0]", 7, "did you mean 'seed'?"),
        ("fedavg_lora", "fedavg_lra", 5, "did you mean 'fedavg_lora'?"),
        ("clients.lr: 0.25", "clients.lr: -1", 3, "clients.lr: should be at least 1e-12"),
        ("name: small", "name: small\nsamples: 2", 1, "no key draws: leave it out"),
        ("name: small", "name: [", 3, "not YAML"),
        ("seed: [0, 1]", "seed: [0, 1]\n  seed: [2]", 8, "is written twice, first on line 7"),
        ("seed: [0, 1]", "seed, rounds: [0, 1]", 4, "seed, rounds should be a list of lists, each of 2 values"),
        ("seed: [0, 1]", "seed, rounds: [[0, 1], [1]]", 4, "a list of lists, each of 2 values"),
        (
            "seed: [0, 1]",
            "seed, rounds: [[0, 1], [1, 0]]",
            7,
            "rounds: should be greater than or equal to 1, not 0",
        ),
    ],
)
def test_slips_are_told_by_line_before_anything_is_written(file, tmp_path, old, new, line, words, capsys):
    file.write_text(file.read_text().replace(old, new))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert words in told and f"{file}:{line}: " in told and len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_settings_joined_by_commas_move_together(file):
    text = file.read_text().replace(
        "strategy.use: [ffa_lora, fedavg_lora]",
        """strategy.use, model.adapter.r:
    - [fedavg_lora, 2]
    - [ffa_lora, 4]""",
    )
    file.write_text(
        text.replace(
            "privacy.epsilon: [4, 8]",
            """privacy, clients.use:
    - [null, sgd]
    - [{epsilon: 4, delta: 0.001}, dp_sgd]""",
        )
    )
    made = [run for sweep in [load(file)] for run in map(sweep.run, sweep.points())]
    assert [(m.strategy.use, m.model.adapter.r) for m in made] == [("fedavg_lora", 2)] * 4 + [("ffa_lora", 4)] * 4
    assert [m.privacy and m.privacy.epsilon for m in made] == [None, None, 4, 4] * 2


def test_what_is_set_from_the_command_line_is_the_same_in_every_run(file, tmp_path, capsys):
    made = load(file, ["clients.lr=0.5", "data.max_length=9"])
    assert {(run.clients.lr, run.data.max_length) for run in map(made.run, made.points())} == {(0.5, 9)}
    command = ["sweep", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, "--set", "clients.lr=-1"]) == 2 and main([*command, "--set", "clients.lr"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("--set clients.lr=-1: clients.lr: should be at least 1e-12")
    assert told[1].startswith("--set clients.lr: overrides read 'key.subkey=value'")


def test_what_failed_in_a_run_is_told_without_rays_trace_of_it():
    error = RuntimeError(
        "ray::train() (pid=1)\n  File x\nfedlora.errors.UserError: --set a=1: a: too high; lower it"
    )
    assert _reason(error) == "--set a=1: a: too high; lower it"
    assert _reason(RuntimeError("the worker died")) == "the worker died"


def test_a_sweep_that_is_not_there_is_told_with_those_that_are(capsys):
    assert main(["sweep", "epsilom"]) == 2
    assert capsys.readouterr().err == "epsilom: no such file; did you mean 'epsilon'?\n"


@pytest.mark.parametrize("name", scenario.shipped(scenario.SWEEPS))
def test_the_shipped_sweeps_are_sound_and_say_how_long_they_take(name):
    made = load(name)
    assert made.name == name.rpartition("/")[2] and "minutes" in (scenario.SWEEPS / f"{name}.yaml").read_text()


def test_what_tuning_costs_counts_whoever_spent_most_in_each_run(tiny, tmp_path):
    from fedlora import simulate

    plain = simulate(tiny("rounds=1", private=False), out=tmp_path / "plain")
    private = [simulate(tiny("rounds=1", f"seed={s}"), out=tmp_path / f"{s}") for s in (1, 2)]
    assert total_epsilon([plain.folder]) == {}
    value, words = total_epsilon([run.folder for run in (plain, *private)])["example"]
    events = [
        accounting.Event(
            noise_multiplier=line["noise_multiplier"], sample_rate=line["sample_rate"], steps=2, clip_norm=1
        )
        for run in private
        for line in [json.loads((run.folder / "privacy.jsonl").read_text().splitlines()[0])]
    ]  # iid: clients are alike, so that the first stands for all
    assert value == pytest.approx(accounting.epsilon(events, 1e-3, "rdp"), rel=0.05) and len(events) == 2
    assert words.startswith("2 runs together give (") and "for each example" in words


SHARED = (
    "clients.use=sgd",
    "rounds=1",
    "privacy={unit: client, noise_multiplier: 2.0, delta: 1.0e-2, clip_norm: 0.5}",
    "secure_aggregation={range: 1.0, noise: shared, honest: 0.75}",
)


@pytest.mark.parametrize("example", [False, True], ids=["clients alone", "examples too"])
def test_what_tuning_costs_from_the_server_is_no_cost_of_examples(example, tmp_path):
    """Two runs with shared noise: a line for clients, one for a client from the server, one for examples."""
    spent = {
        None: accounting.Event(noise_multiplier=4.0, sample_rate=0.5, steps=1, clip_norm=0.5),
        ledger.Whole(0): accounting.Event(noise_multiplier=2.0, sample_rate=1.0, steps=1, clip_norm=0.5),
        3: accounting.Event(noise_multiplier=8.0, sample_rate=0.1, steps=2, clip_norm=1.0),
    }
    delta = {"client": 1e-2, "client_from_server": 1e-2, "example": 1e-3}
    for name in ("one", "two"):
        record = ledger.Ledger(tmp_path / name)
        record.folder.mkdir()
        for holder, event in spent.items():
            if example or holder != 3:
                told = {"delta": delta[ledger.unit(holder)], "unit": ledger.unit(holder), "accountant": "pld"}
                record.spend(1, {holder: event}, **told, **({"honest": 0.75} if holder == (0,) else {}))
    found = total_epsilon([tmp_path / "one", tmp_path / "two"])
    assert set(found) == {"client", "client_from_server", *(["example"] if example else [])}
    for holder, event in spent.items():
        unit = ledger.unit(holder)
        if unit in found:
            assert found[unit][0] == pytest.approx(accounting.epsilon(2 * [event], delta[unit], "rdp"), rel=0.05)
    told = found["client_from_server"][1]
    assert "for each client, as if" in told and "from the server" in told and "sends nothing" in told
    assert "75%" in told and "zero-out" in found["client"][1] and "Renyi" in told


def test_a_sweep_over_shared_noise_tells_both_epsilons(tiny, tmp_path):
    from fedlora import simulate

    run = simulate(tiny(*SHARED), out=tmp_path / "run")
    found = total_epsilon([run.folder])
    assert set(found) == {"client", "client_from_server"}
    renyi = ledger.epsilon_of(run.folder / "privacy.jsonl", "client_from_server", "rdp")
    assert found["client_from_server"][0] == pytest.approx(renyi, rel=0.05)
    assert found["client_from_server"][0] > found["client"][0]
