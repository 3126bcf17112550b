"""Whole runs on a tiny real model: the run folder, repeatability, budgets, resuming and stopping."""

import contextlib
import json
import math
import shutil
import signal
from importlib import metadata

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import planning
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import RoundError, UserError
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import accounting, ledger
from fedlora.privacy.replay import VERSIONS
from fedlora.reports.console import Silent, summary_lines
from fedlora.rounds import folder
from fedlora.rounds.loop import Loop
from fedlora.scenario import written
from fedlora.simulation import simulate

FILES = {
    "scenario.yaml",
    "origin.json",
    "partitions.json",
    "metrics.jsonl",
    "clients.jsonl",
    "privacy.jsonl",
    "privacy.head",
    "summary.json",
    "test.json",
}


def adapter(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return simulate(tiny(), out=tmp_path_factory.mktemp("runs") / "first")


def test_the_run_folder_holds_what_it_promises(run):
    assert {p.name for p in run.folder.iterdir()} == FILES | {"adapter", "checkpoint", "checkpoint.old"}
    rounds = run.rounds
    assert [line["round"] for line in rounds] == [1, 2]
    for line in rounds:
        assert {"clients", "failures", "loss", "accuracy", "bytes_up", "bytes_down", "epsilon", "seconds"} <= set(
            line
        )
        assert line["clients"] == 4 and line["failures"] == 0 and line["train_loss"] is None
    assert [(c["round"], c["client"]) for c in run.clients] == [(r, c) for r in (1, 2) for c in range(4)]
    assert {"num_examples", "steps", "bytes_up", "bytes_down", "epsilon", "seconds", "error"} <= set(
        run.clients[0]
    )
    partitions = json.loads((run.folder / "partitions.json").read_text())
    assert partitions["labels"] == ["bad", "good"]
    assert [sum(c["labels"]) for c in partitions["clients"]] == [c["num_examples"] for c in partitions["clients"]]


def test_of_very_many_clients_partitions_shows_some(tiny, monkeypatch):
    monkeypatch.setattr(folder, "SHOWN", 3)
    drawn = ("data.partition={kind: sampled, examples: 9}", "clients.total=1000001", "clients.per_round=2")
    told = folder.partitions(prepare(tiny(*drawn)).data)
    assert [c["client"] for c in told["clients"]] == [0, 500_000, 1_000_000] and told["clients_total"] == 1_000_001
    assert all(sum(c["labels"]) == c["num_examples"] == 9 for c in told["clients"])


def test_a_million_clients_of_which_two_train(tiny, tmp_path):
    """Privately: noise is calibrated for the one size that there is."""
    drawn = ("data.partition={kind: sampled, examples: 9}", "clients.total=1000000", "clients.per_round=2")
    made = simulate(tiny(*drawn), out=tmp_path / "run")
    assert made.summary["rounds"] == 2 and made.summary["failures"] == 0 and 0 < made.summary["epsilon"] <= 8
    assert sum(file.stat().st_size for file in made.folder.rglob("*") if file.is_file()) < 2**20


def labels_of_test_rows(run):
    """How many test rows have each label."""
    return np.bincount(prepare(written(run.folder)).data.test.targets)


def test_the_summary_adds_up(run):
    summary = json.loads((run.folder / "summary.json").read_text())
    keys = "scenario strategy rounds accuracy bytes_up_total bytes_down_total epsilon delta privacy_unit seconds"
    assert set(keys.split()) | {"clients_per_second", "failures", "seed", "versions"} <= set(summary)
    assert summary["bytes_up_total"] == sum(c["bytes_up"] for c in run.clients)
    assert summary["bytes_down_total"] == sum(line["bytes_down"] for line in run.rounds)
    assert summary["accuracy"] == run.rounds[-1]["accuracy"]
    assert summary["majority"] == max(labels_of_test_rows(run)) / sum(labels_of_test_rows(run))
    assert summary["epsilon"] == max(c["epsilon"] for c in run.clients) <= 8
    assert 0 < summary["bytes_up_head"] < summary["bytes_up_total"]
    assert "each example" in summary["privacy"] and "not a deployment" in summary["privacy"]


def test_epsilon_follows_from_the_ledger_alone(run):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    worst = 0.0
    lines = [json.loads(text) for text in (run.folder / "privacy.jsonl").read_text().splitlines()]
    for client in {line["client"] for line in lines}:
        accountant = PLDAccountant()
        for line in lines:
            if line["client"] == client:
                event = PoissonSampledDpEvent(line["sample_rate"], GaussianDpEvent(line["noise_multiplier"]))
                accountant.compose(event, line["steps"])
        worst = max(worst, accountant.get_epsilon(lines[0]["delta"]))
    assert run.summary["epsilon"] == pytest.approx(worst, rel=0.01)
    assert ledger.epsilon_of(run.folder / "privacy.jsonl") == run.summary["epsilon"]
    assert run.summary["epsilon"] > 0.97 * 8  # the budget is used, not just kept


def test_every_epsilon_says_what_it_is(run):
    summary = run.summary
    assert (summary["privacy_unit"], summary["delta"], summary["accountant"]) == ("example", 1e-3, "pld")
    assert (summary["neighbours"], summary["sampling"]) == ("zero_out", "poisson")
    told = (
        "(8, 0.001)-differential privacy for each example, neighbouring datasets differ in one example, which "
        "counts for nothing in one of them (zero-out: how many examples a client holds is public); the largest "
        "over clients, by privacy loss distributions (dp-accounting), assuming Poisson sampling of examples; "
        "noise was drawn from the scenario's seed, as fits a simulation and not a deployment; who holds which "
        "examples, the labels and the test set are taken as given"
    )
    told = told.replace("(8,", f"({summary['epsilon']:.3g},")
    card = (run.folder / "adapter" / "README.md").read_text()
    for text in (summary["privacy"], card):
        assert told in text
    lines = summary_lines(run)
    at = next(n for n, line in enumerate(lines) if line.startswith("  privacy"))
    assert lines[at : at + 2] == [
        f"  privacy  epsilon {summary['epsilon']:.3g} at delta 0.001 for each example, by the client that spent "
        "most",
        "           what was sent can raise the odds that a row was used at most "
        f"{math.exp(summary['epsilon']):,.0f}-fold, delta aside",
    ]
    assert all(len(line) <= 100 for line in lines[at : at + 2])


def test_a_delta_that_lets_an_example_out_is_warned_of(tiny, caplog):
    ready = prepare(tiny("privacy.delta=0.03"))
    calibrate(ready.scenario, ready.data)
    (record,) = caplog.records
    assert (
        record.getMessage().startswith("privacy.delta: 0.03 is not below 1/45") and "2e-03" in record.getMessage()
    )
    caplog.clear()
    calibrate(tiny("privacy.delta=0.022"), ready.data)
    assert not caplog.records


def test_the_exported_adapter_scores_what_the_summary_says(run, tiny_base, build):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    test = build().dataset.test
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    with torch.no_grad():
        right = [
            int(model(input_ids=torch.tensor(test.row(i))[None].long()).logits.argmax()) == test.targets[i]
            for i in range(len(test))
        ]
    assert np.mean(right) == pytest.approx(run.summary["accuracy"], abs=1e-9)


def test_repeats_bit_for_bit(run, tiny, tmp_path):
    again = simulate(tiny(), out=tmp_path / "again")
    assert same(adapter(run), adapter(again))
    assert [line["loss"] for line in run.rounds] == [line["loss"] for line in again.rounds]


def test_another_seed_draws_another_a_noise_cohort_and_batches(run, tiny, tmp_path):
    other = simulate(tiny("seed=4"), out=tmp_path / "other")
    one, two = adapter(run), adapter(other)
    assert all((one[n] != two[n]).any() for n in one)


def test_cohorts_follow_from_the_seed(tiny, tmp_path):
    def cohorts(name, *overrides):
        made = simulate(tiny("clients.per_round=2", "rounds=5", "eval_every=5", *overrides), out=tmp_path / name)
        return [c["client"] for c in made.clients]

    one = cohorts("a")
    assert len(one) == 10 and one == cohorts("b") and one != cohorts("c", "seed=4")
    assert len({tuple(one[i : i + 2]) for i in range(0, 10, 2)}) > 1


def test_ffa_lora_halves_the_bytes_and_keeps_a(run, tiny, tmp_path, build):
    lora = simulate(tiny("strategy.use=fedavg_lora"), out=tmp_path / "lora")
    first = build().task.initial
    ours, theirs = adapter(run), adapter(lora)
    for name in first:
        if ".lora_A." in name:
            assert np.array_equal(ours[name], first[name]) and not np.array_equal(theirs[name], first[name])
    assert all("aggregation_error" not in line for line in run.rounds)
    assert all(0 < line["aggregation_error"] < 2 for line in lora.rounds)
    factors = [r.summary["bytes_up_total"] - r.summary["bytes_up_head"] for r in (run, lora)]
    assert factors[0] < 0.52 * factors[1]


def test_plain_training_learns_and_shares_its_loss(tiny, tmp_path):
    made = simulate(
        tiny("clients.local_steps=60", "clients.lr=0.3", "clients.batch_size=32", "rounds=3", private=False),
        out=tmp_path / "plain",
    )
    assert made.summary["accuracy"] > 0.9
    assert made.rounds[-1]["train_loss"] < made.rounds[0]["train_loss"]
    assert made.summary["epsilon"] is None and not (made.folder / "privacy.jsonl").exists()
    assert made.summary["privacy"].startswith("none")


def test_shared_metrics_are_said_to_be_outside_of_epsilon(tiny, tmp_path):
    made = simulate(tiny("privacy.share_metrics=true", "rounds=1"), out=tmp_path / "shared")
    assert made.rounds[0]["train_loss"] > 0 and "not covered" in made.summary["privacy"]


def test_a_causal_model_runs_in_the_same_shape(tiny, tiny_lm, tmp_path):
    made = simulate(
        tiny("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj, v_proj]"),
        out=tmp_path / "lm",
    )
    assert made.summary["perplexity"] > 1 and "accuracy" not in made.summary
    assert made.summary["bytes_up_head"] == 0


@pytest.mark.parametrize("pattern, share", [("^", 1.0), ("no such words", 0.0)])
def test_a_causal_model_is_judged_by_its_own_words_where_asked(tiny, tiny_lm, tmp_path, pattern, share):
    lm = ("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj, k_proj, v_proj, o_proj]")
    asked = f"exact_match={{examples: 3, max_new_tokens: 2, pattern: '{pattern}'}}"
    made = simulate(tiny(*lm, asked, "eval_every=2"), out=tmp_path / "lm")
    assert [line.get("exact_match") for line in made.rounds] == [None, share]
    assert made.summary["exact_match"] == share and made.summary["perplexity"] > 1


@pytest.mark.parametrize("use", ["FedAdam", "FedMedian", "FedProx"])
def test_flowers_own_strategies_run_by_name(tiny, tmp_path, use):
    options = ["strategy.proximal_mu=0.1"] if use == "FedProx" else []
    made = simulate(tiny(f"strategy.use=flwr.serverapp.strategy:{use}", *options), out=tmp_path / use)
    assert made.summary["rounds"] == 2 and made.summary["failures"] == 0


def test_ones_own_strategy_runs_by_name(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from fedlora import Strategy\n\n\n"
        "@dataclass(kw_only=True)\n"
        "class TrimmedMean(Strategy):\n"
        "    trim: float = 0.1\n\n"
        "    def aggregate(self, adapter, updates):\n"
        "        k = int(self.trim * len(updates))\n"
        "        stacked = {n: np.sort([u.adapter[n] for u in updates], axis=0) for n in adapter}\n"
        "        return {n: x[k : len(x) - k].mean(axis=0) for n, x in stacked.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scenario = tiny("strategy.use=mine_for_test:TrimmedMean", "strategy.trim=0.25")
    assert simulate(scenario, out=tmp_path / "run").summary["rounds"] == 2


def test_a_folder_with_a_run_is_left_alone(run, tiny, tmp_path):
    with pytest.raises(UserError, match="already holds a run"):
        simulate(tiny(), out=run.folder)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    with pytest.raises(UserError, match=r"not an empty folder; name another with --out$"):
        simulate(tiny(), out=tmp_path / "busy")


@pytest.mark.parametrize(
    "override, where",
    [
        ("clients.batch_size=100", "clients.batch_size"),
        ("privacy={epsilon: 1.0e-9, delta: 1.0e-15}", "write accountant: rdp"),
        ("clients.total=500", "clients.total"),
        ("data.files.text=texts", "data.files.text"),
        ("model.adapter.targets=[nothing]", "model.adapter.targets"),
        ("model.base=/no/such/model", "model.base"),
        ("strategy.use=nowhere_at_all:X", "strategy.use"),
        ("strategy.momentum=1", "strategy.momentum"),
        ("data.partition={kind: dirichlet, alpha: 0.001, min_examples: 40}", "data.partition"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, override, where):
    with pytest.raises(UserError) as caught:
        simulate(tiny(override), out=tmp_path / "run")
    assert str(caught.value).startswith(f"--set {override.split('=')[0]}") and where in str(caught.value)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_what_needs_no_data_is_refused_before_processes_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora.engine.make", lambda *_: pytest.fail("an engine was made"))
    with pytest.raises(UserError, match=r"strategy\.momentum"):
        simulate(tiny("strategy.momentum=1"), out=tmp_path / "run")


def test_processes_that_wait_for_data_end_where_there_is_none(tiny, tmp_path):
    ends = []

    def watch(engine):
        engine.close = lambda: ends.append(engine)
        return engine

    with pytest.raises(UserError, match=r"data\.files\.text"):
        simulate(tiny("data.files.text=texts"), out=tmp_path / "run", watch=watch)
    assert len(ends) == 1 and list(tmp_path.iterdir()) == []


def test_noise_is_searched_for_once_and_at_sites_by_themselves(tiny, tmp_path, monkeypatch):
    """The cache is the user's, of simulations and plans; a run from it is the same run."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    scenario = tiny("privacy.epsilon=7.5")
    made, ready = simulate(scenario, out=tmp_path / "first"), prepare(scenario)
    monkeypatch.setattr(accounting, "calibrations", lambda *_: pytest.fail("searched again"))
    again = simulate(scenario, out=tmp_path / "second")
    assert same(adapter(made), adapter(again)) and again.summary["epsilon"] == made.summary["epsilon"]
    assert planning.plan(scenario).epsilon == pytest.approx(made.summary["epsilon"])
    monkeypatch.undo()
    kept = list((tmp_path / "cache" / "noise").iterdir())
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "site"))
    assert calibrate(scenario, ready.data) and len(kept) == 1 and not (tmp_path / "site" / "noise").exists()


def test_resuming_continues_bit_for_bit(tiny, tmp_path):
    whole = simulate(tiny("rounds=4"), out=tmp_path / "whole")

    class Stop(Silent):
        def round(self, line):
            if line["round"] == 2:
                raise KeyboardInterrupt

    cut = simulate(tiny("rounds=4"), out=tmp_path / "cut", display=Stop())
    assert cut.summary["stopped"] == "interrupted after round 2" and cut.summary["rounds"] == 2
    assert (cut.folder / "adapter" / "adapter_config.json").exists() and cut.summary["accuracy"] is not None
    done = simulate(tiny("rounds=4"), out=tmp_path / "cut", resume=True)
    assert same(adapter(whole), adapter(done)) and "stopped" not in done.summary
    for key in ("accuracy", "loss", "bytes_up_total", "bytes_down_total", "epsilon", "failures"):
        assert done.summary[key] == whole.summary[key]
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


@pytest.mark.parametrize("use", ["ffa_lora", "fedsa_lora"])
def test_a_damaged_checkpoint_costs_a_round(tiny, tmp_path, caplog, use):
    scenario = tiny(f"strategy.use={use}", "rounds=4", "data.client_test_share=0.2")
    whole = simulate(scenario, out=tmp_path / "whole")

    class Stop(Silent):
        def round(self, line):
            if line["round"] == 3:
                raise KeyboardInterrupt

    folder = simulate(scenario, out=tmp_path / "cut", display=Stop()).folder
    (folder / "checkpoint" / "adapter.safetensors").write_bytes(b"")
    done = simulate(scenario, out=folder, resume=True)
    assert f"{folder / 'checkpoint'}: is damaged; going on after round 2, from checkpoint.old" in caplog.text
    assert same(adapter(whole), adapter(done)) and [line["round"] for line in done.rounds] == [1, 2, 3, 4]
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


def test_a_run_that_goes_on_elsewhere_says_what_is_not_as_before(tiny, tmp_path, caplog, monkeypatch):
    made = simulate(tiny(), out=tmp_path / "run")
    monkeypatch.setattr("fedlora.simulation.versions", lambda: dict.fromkeys(VERSIONS, "0.0.1"))
    more = simulate(tiny("rounds=3"), out=made.folder, resume=True)
    assert f"began with fedlora {metadata.version('fedlora')}, now 0.0.1; flwr " in caplog.text
    assert "rounds: 3\n" in (more.folder / "scenario.yaml").read_text()


def test_a_scenario_edited_by_hand_is_not_gone_on_with(tiny, tmp_path):
    made = simulate(tiny(), out=tmp_path / "run")
    file = made.folder / "scenario.yaml"
    file.write_text(file.read_text().replace("lr: 0.5", "lr: 0.25"))
    with pytest.raises(UserError, match=r"another clients\.lr; a resumed run"):
        simulate(tiny("clients.lr=0.25", "rounds=3"), out=made.folder, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_drops_still_ends_the_run(tiny, tmp_path, number):
    """As when it arrives in a finaliser, whose exceptions are ignored."""

    class Drop(Silent):
        def round(self, line):
            if line["round"] == 2:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(number)

    before = signal.getsignal(number)
    made = simulate(tiny("rounds=5"), out=tmp_path / "run", display=Drop())
    assert made.summary["stopped"] == "interrupted after round 2"
    assert signal.getsignal(number) == before


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.stages = [], []

    def note(self, what):
        self.notes.append(what)

    def stage(self, what):
        self.stages.append(what)


def test_a_run_that_has_ended_is_not_started_again(run, tiny, tmp_path):
    """Unless it has rounds left, or lacks what is written at the end."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = simulate(tiny(), out=folder, resume=True, display=(told := Told()))
    assert told.notes == [f"{folder} has ended after round 2; nothing to do"] and told.stages == []
    assert again.summary == run.summary and before == {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    for gone in ("summary.json", "adapter/README.md"):
        (folder / gone).unlink()
        simulate(tiny(), out=folder, resume=True, display=(told := Told()))
        assert "loading the model" in told.stages and (folder / gone).exists() and told.notes == []
    simulate(tiny("rounds=3"), out=folder, resume=True, display=(told := Told()))
    assert "loading the model" in told.stages and told.notes == []


def test_resuming_with_another_base_or_start_is_refused_before_a_model_is_loaded(
    tiny, tiny_base, tmp_path, monkeypatch
):
    base, first = tmp_path / "base", tmp_path / "first"
    shutil.copytree(tiny_base, base)
    told = (f"model.base={base}", "rounds=1")
    simulate(tiny(*told), out=first)
    told = (*told, f"model.start={first}", "rounds=2")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            simulate(tiny(*told), out=tmp_path / "run")

    def refused():
        with pytest.raises(UserError) as caught:
            simulate(tiny(*told), out=tmp_path / "run", resume=True, display=(shown := Told()))
        assert "loading the model" not in shown.stages
        return str(caught.value)

    weights = first / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "it began with another adapter (model.start): put back what it had" in refused()
    weights.write_bytes(kept)
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert "it began with another base model (the files of model.base): put back what it had" in refused()


def test_resuming_refuses_another_scenario_and_says_which_key(run, tiny, tmp_path):
    with pytest.raises(UserError, match=r"another clients\.lr, seed"):
        simulate(tiny("seed=9", "clients.lr=0.1"), out=run.folder, resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        simulate(tiny(), out=tmp_path / "none", resume=True)


def test_a_budget_ends_a_run_that_would_pass_it(tiny, tmp_path):
    """With a noise multiplier of one's own, whoever would pass epsilon in the next round sits out."""
    made = simulate(tiny("rounds=3", "privacy.noise_multiplier=0.5"), out=tmp_path / "fixed")
    assert made.summary["stopped"].startswith("after round") and made.summary["epsilon"] <= 8
    assert "stopped" in (printed := "\n".join(summary_lines(made))) and "--resume" not in printed
    assert ledger.epsilon_of(made.folder / "privacy.jsonl") <= 8


def test_when_everybody_fails_the_run_says_so_and_stops(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora.strategies.ffa_lora.FFALoRA.config", lambda self, round: {"fail": 0})
    scenario = tiny("clients.use=tests.engine.faulty:Faulty", "clients.total=1", "clients.batch_size=8")
    with pytest.raises(RoundError, match="its only client failed; client 0: RuntimeError: as told"):
        simulate(scenario, out=tmp_path / "run")
    assert len(ledger.read(tmp_path / "run" / "privacy.jsonl")) == 1  # it may have trained: it counts


def test_a_failed_client_is_counted_and_the_others_weigh_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora.strategies.ffa_lora.FFALoRA.config", lambda self, round: {"fail": 1})
    made = simulate(tiny("clients.use=tests.engine.faulty:Faulty", "rounds=1"), out=tmp_path / "run")
    assert made.summary["failures"] == 1 and made.rounds[0]["clients"] == 3
    assert [c["error"] for c in made.clients] == [None, "RuntimeError: as told", None, None]


@pytest.mark.parametrize("killed", [1, 2])
def test_a_round_that_was_paid_for_runs_again_without_paying_twice(tiny, tmp_path, monkeypatch, killed):
    """Killed between the spend and the checkpoint of a round: nobody rests, nothing is spent again."""
    from fedlora.rounds.loop import Loop

    whole = simulate(tiny(), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = Loop._record

        def record(self, round, *rest):
            if round == killed:
                raise RuntimeError("killed")
            original(self, round, *rest)

        patch.setattr(Loop, "_record", record)
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(), out=tmp_path / "cut")
    with (tmp_path / "cut" / "clients.jsonl").open("a") as stream:
        stream.write('{"round": 2, "cli')  # cut short in mid-line
    done = simulate(tiny(), out=tmp_path / "cut", resume=True)
    assert same(adapter(whole), adapter(done)) and done.rounds[-1]["resting"] == 0
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


def test_a_checkpoint_without_its_ledger_is_not_gone_on_from(tiny, tmp_path):
    made = simulate(tiny(), out=tmp_path / "run")
    for name in ("privacy.jsonl", "privacy.head"):
        (made.folder / name).unlink()
    with pytest.raises(
        UserError, match=r"privacy\.jsonl: is not the ledger that the checkpoint was saved with, whose 8 lines"
    ):
        simulate(tiny("rounds=3"), out=made.folder, resume=True)


def test_a_round_run_again_with_other_noise_pays_again(tiny, tmp_path):
    """More rounds are calibrated to more noise: what a round cost before still counts."""
    made = simulate(tiny(), out=tmp_path / "run")
    for name in (
        "checkpoint",
        "checkpoint.old",
        "metrics.jsonl",
        "clients.jsonl",
    ):  # as if killed before the first checkpoint
        path = made.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = simulate(tiny("rounds=3"), out=made.folder, resume=True)
    lines = ledger.read(made.folder / "privacy.jsonl")
    assert again.summary["rounds"] < 3 and "stopped" in again.summary and again.summary["epsilon"] <= 8
    assert len(lines) == 8  # the budget was spent: nobody trains a third time, and nothing is forgotten


WHOLE = ("clients.use=sgd", "clients.per_round=2", "rounds=6", "eval_every=6")
FOR_CLIENTS = "privacy={unit: client, epsilon: 8, delta: 1.0e-2, clip_norm: 0.5}"


def recomputed(folder, unit):
    """Epsilon by dp-accounting from the lines of the ledger alone, the largest over those who hold a budget."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    lines = [json.loads(text) for text in (folder / "privacy.jsonl").read_text().splitlines()]
    accountants = {}
    for line in (line for line in lines if line["unit"] == unit):
        event = PoissonSampledDpEvent(line["sample_rate"], GaussianDpEvent(line["noise_multiplier"]))
        accountants.setdefault(line["client"], PLDAccountant()).compose(event, line["steps"])
    return max(
        a.get_epsilon(next(li["delta"] for li in lines if li["unit"] == unit)) for a in accountants.values()
    )


def test_clients_are_protected_whole(tiny, tmp_path):
    """Poisson cohorts, some of them empty; each round is paid for once, whoever came."""
    made = simulate(tiny(*WHOLE, FOR_CLIENTS, "seed=5"), out=tmp_path / "run")
    lines = ledger.read(made.folder / "privacy.jsonl")
    assert [(li["round"], li["client"], li["unit"], li["sample_rate"]) for li in lines] == [
        (r, None, "client", 0.5) for r in range(1, 7)
    ]
    assert {line["clients"] for line in made.rounds} >= {1, 2} and made.summary["privacy_unit"] == "client"
    assert made.summary["epsilon"] == pytest.approx(recomputed(made.folder, "client"), rel=0.01)
    assert 7.5 < made.summary["epsilon"] <= 8 and made.summary["example_epsilon"] is None
    assert (
        "privacy for each client" in made.summary["privacy"] and "not from the server" in made.summary["privacy"]
    )
    assert all(line["train_loss"] is None for line in made.rounds) and "train_loss" not in made.clients[0]


def test_a_round_without_clients_is_noise_and_is_paid_for(tiny, tmp_path):
    made = simulate(tiny(*WHOLE, FOR_CLIENTS, "clients.per_round=1", "seed=4"), out=tmp_path / "run")
    assert 0 in {line["clients"] for line in made.rounds} and made.summary["rounds"] == 6
    assert len(ledger.read(made.folder / "privacy.jsonl")) == 6


def test_examples_and_clients_are_protected_at_the_same_time(tiny, tmp_path):
    both = FOR_CLIENTS[:-1] + ", example: {epsilon: 3, delta: 1.0e-3, clip_norm: 1.0}}"
    made = simulate(tiny(*WHOLE, both, "clients.use=dp_sgd"), out=tmp_path / "run")
    for unit, key, most in (("client", "epsilon", 8), ("example", "example_epsilon", 3)):
        assert made.summary[key] == pytest.approx(recomputed(made.folder, unit), rel=0.01)
        assert made.summary[key] == ledger.epsilon_of(made.folder / "privacy.jsonl", unit) <= most
        assert f"privacy for each {unit}" in made.summary["privacy"]


def test_a_budget_of_clients_ends_a_run_that_would_pass_it(tiny, tmp_path):
    noisy = FOR_CLIENTS.replace("clip_norm", "noise_multiplier: 1.0, clip_norm")
    made = simulate(tiny(*WHOLE, noisy, "rounds=30"), out=tmp_path / "run")
    assert "another would pass" in made.summary["stopped"] and 6 < made.summary["epsilon"] <= 8


@pytest.mark.parametrize(
    ("told", "bounds"), [("noise_multiplier: 0.09, clip: quantile", 6), ("epsilon: 8, bands: 2", 1)]
)
def test_a_run_that_protects_clients_resumes_bit_for_bit(tiny, tmp_path, told, bounds):
    asked = FOR_CLIENTS.replace("epsilon: 8", told)
    whole = simulate(tiny(*WHOLE, asked), out=tmp_path / "whole")

    class Stop(Silent):
        def round(self, line):
            if line["round"] == 3:
                raise KeyboardInterrupt

    simulate(tiny(*WHOLE, asked), out=tmp_path / "cut", display=Stop())
    done = simulate(tiny(*WHOLE, asked), out=tmp_path / "cut", resume=True)
    assert same(adapter(whole), adapter(done))
    lines = ledger.read(whole.folder / "privacy.jsonl")
    assert lines == ledger.read(done.folder / "privacy.jsonl")
    assert len({line["clip_norm"] for line in lines}) == bounds  # one that adapts moves with every round
    assert {line.get("bands", 1) for line in lines} == ({2} if "bands" in told else {1})


def test_a_release_on_other_terms_is_another_draw_and_is_paid_for(tiny, tmp_path, monkeypatch):
    """Bands are fitted to the rounds: with more of these a round that runs again has other noise over one sum."""
    asked = FOR_CLIENTS.replace("epsilon: 8", "noise_multiplier: 2.0, bands: 2")

    def killed(self, round, *rest):
        if round == 3:
            raise RuntimeError("killed")
        return record(self, round, *rest)

    record = Loop._record
    monkeypatch.setattr(Loop, "_record", killed)
    for count, rounds in enumerate((5, 6, 7, 5)):
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*WHOLE, asked, f"rounds={rounds}"), out=tmp_path / "run", resume=count > 0)
    again = [line for line in ledger.read(tmp_path / "run" / "privacy.jsonl") if line["round"] == 3]
    assert [(line["draw"], line.get("bands", 1)) for line in again] == [(0, 2), (1, 1), (2, 1)]
    assert [line["sample_rate"] for line in again[1:]] == [1.0, 1.0]  # one cohort: its coins hide nobody again


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("strategy.use=flexlora", "strategy.use"),
        ("strategy.use=flwr.serverapp.strategy:FedAdam", "strategy.use"),
        ("privacy.clip=quantile", "privacy.clip: 2 clients a round are too few for a bound that adapts"),
    ],
)
def test_what_has_no_known_sensitivity_for_a_client_is_refused(tiny, tmp_path, override, where):
    with pytest.raises(UserError, match=where):
        simulate(tiny(*WHOLE, FOR_CLIENTS, override), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.example={epsilon: 1, delta: 0.1}"], "goes with unit: client"),
        ([FOR_CLIENTS, "clients.use=dp_sgd"], "add privacy.example, or write clients.use: sgd"),
        (["privacy.unit=client", "privacy.example={delta: 0.1}"], "needs epsilon"),
    ],
)
def test_a_unit_that_does_not_fit_its_client_is_a_line(tiny, overrides, words):
    with pytest.raises(UserError, match=words):
        tiny(*overrides)


def test_a_batch_too_small_for_a_bound_that_adapts_is_a_line_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match=r"privacy.clip: batches of 8 are too small for a bound that adapts"):
        simulate(tiny("privacy.clip=quantile", "privacy.epsilon=1"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Flat(DPSGD):
    """A client of one's own that knows one way to clip."""

    clips = ("flat",)


def test_a_client_that_does_not_know_the_way_to_clip_is_a_line(tiny, tmp_path):
    use = f"clients.use={__name__}:Flat"
    with pytest.raises(UserError, match=r"privacy.clip: .*:Flat knows no automatic: take one of flat"):
        simulate(tiny(use, "privacy.clip=automatic"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_automatic_clipping_costs_what_flat_clipping_costs(tiny, tmp_path):
    flat, automatic = (
        simulate(tiny(f"privacy.clip={way}", "engine.fused=2"), out=tmp_path / way)
        for way in ("flat", "automatic")
    )
    one, other = (ledger.read(made.folder / "privacy.jsonl") for made in (flat, automatic))
    kept = ("round", "client", "noise_multiplier", "sample_rate", "steps", "clip_norm")
    assert [[line[k] for k in kept] for line in one] == [[line[k] for k in kept] for line in other]
    assert not same(adapter(flat), adapter(automatic))
