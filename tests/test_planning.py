"""A plan is held to the run that follows it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora import planning, plugins, scenario, suitability
from fedlora.cli import main
from fedlora.engine.secure import exchanged
from fedlora.errors import SettingError, UserError
from fedlora.planning import plan
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import accounting, ledger
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import error
from fedlora.reports.planned import plan_lines
from fedlora.run import Run
from fedlora.scenario import Privacy
from fedlora.simulation import simulate
from fedlora.strategies.ffa_lora import FFALoRA

SKEWED = ("data.partition={kind: dirichlet, alpha: 1.0, min_examples: 12}", "rounds=3", "seed=5")
CLIENTS = "privacy={unit: client, epsilon: 8, delta: 1.0e-2, clip_norm: 0.5}"
SIZES = ("round", "clients", "bytes_up", "bytes_down")


def agrees(planned, run: Run) -> None:
    assert [{k: line[k] for k in SIZES} for line in planned.rounds] == [
        {k: line[k] for k in SIZES} for line in run.rounds
    ]
    for key in ("bytes_up_total", "bytes_down_total", "hash", "strategy", "delta"):
        assert getattr(planned, key) == run.summary[key]
    if run.summary["epsilon"] is None:
        assert planned.epsilon is planned.noise_multiplier is None
        return
    assert planned.epsilon == pytest.approx(run.summary["epsilon"], rel=1e-9)
    assert [line["epsilon"] for line in planned.rounds] == pytest.approx([line["epsilon"] for line in run.rounds])
    spent = [line for line in ledger.read(run.folder / "privacy.jsonl") if line["unit"] == planned.unit]
    assert planned.noise_multiplier == max(line["noise_multiplier"] for line in spent)


@pytest.mark.parametrize("strategy", plugins.names("strategies"))
def test_each_strategy_runs_as_planned(tiny, tmp_path, strategy):
    own, free = "data.client_test_share=0.2", "model.adapter.kind=auto"
    needs = {"fedsa_lora": [own], "dual_lora": [own, free], "fed_sb": [free]}
    scenario = tiny(*SKEWED, *needs.get(strategy, ()), f"strategy.use={strategy}")
    planned = plan(scenario)
    run = simulate(scenario, out=tmp_path / "run")
    agrees(planned, run)
    (same,) = [a for a in planned.alternatives if a["strategy"] == strategy]
    assert same["bytes_up_total"] == planned.bytes_up_total == run.summary["bytes_up_total"]


@pytest.mark.parametrize(
    "overrides, private",
    [
        (("clients.per_round=2", "rounds=4"), True),
        (("privacy.share_metrics=true",), True),
        (("clients.per_round=3",), False),
        (("model.head=frozen", "strategy.use=flwr.serverapp.strategy:FedProx", "strategy.proximal_mu=0.1"), False),
        (("privacy.noise_multiplier=0.5", "rounds=5"), True),  # stops where the budget ends
        ((CLIENTS, "clients.use=sgd", "clients.per_round=2"), False),
        ((f"{CLIENTS[:-1]}, example: {{epsilon: 8, delta: 1.0e-3}}}}",), True),
        (("clients.ranks={kind: list, values: [4, 2]}", "strategy.use=flexlora"), True),
        (("compression={up: {kind: int4}, down: {kind: fp16}}", "strategy.use=flora"), False),
        (("compression={up: {kind: top_k, share: 0.1}}",), True),
        (("privacy.bands=2", "clients.per_round=2", "rounds=4"), True),
        ((CLIENTS, "clients.use=sgd", "compression={up: {kind: int8}, down: {kind: bf16}}"), False),
    ],
)
def test_other_scenarios_run_as_planned(tiny, tmp_path, overrides, private):
    scenario = tiny(*SKEWED, *overrides, private=private)
    planned, run = plan(scenario), simulate(scenario, out=tmp_path / "run")
    agrees(planned, run)
    assert planned.stopped == run.summary.get("stopped")


@pytest.mark.parametrize("bands", ["", ", bands: 2"])
def test_clients_as_the_unit_run_as_planned(tiny, tmp_path, bands):
    scenario = tiny("clients.per_round=2", "rounds=3", "clients.use=sgd", f"{CLIENTS[:-1]}{bands}}}")
    planned = plan(scenario)
    agrees(planned, simulate(scenario, out=tmp_path / "run"))
    assert "sample_rate" not in planned.groups[0]


def test_bands_for_clients_cost_turns_of_a_group(tiny):
    """Of two bands three rounds are two turns of one group, at twice the rate: half the clients, all of them."""
    planned = plan(tiny("clients.per_round=2", "rounds=3", "clients.use=sgd", f"{CLIENTS[:-1]}, bands: 2}}"))
    assert planned.noise_multiplier == accounting.calibrate(8, 1e-2, 1.0, 2)
    assert planned.epsilon == pytest.approx(8, rel=0.01) and planned.signal["bands"] == 2
    assert "banded noise, b = 2: clients take turns by round" in "\n".join(plan_lines(planned.to_json()))
    auto = plan(tiny("clients.per_round=1", "rounds=9", "clients.use=sgd", f"{CLIENTS[:-1]}, bands: auto}}"))
    assert auto.signal["bands"] in (1, 2, 4) and auto.epsilon <= 8


@pytest.mark.parametrize("epsilon, bands, left", [(2, 4, 0.93), (8, 8, 0.71)])
def test_what_bands_leave_of_the_noise_for_clients_is_that_of_the_docs(epsilon, bands, left):
    """1,000 clients, of which a round takes 50, 100 rounds, delta 1e-4: the table of docs/privacy.md."""
    asked = Privacy(epsilon=epsilon, delta=1e-4, unit="client")
    sigma = accounting.calibrate(epsilon, 1e-4, bands * 0.05, -(-100 // bands))
    assert planning._in_weights(asked, bands, sigma, 0.05, 100) == pytest.approx(left, abs=0.005)


def test_a_plan_says_what_bands_leave_of_the_noise_for_clients(tiny):
    told = "clients.per_round=2", "rounds=4", "clients.use=sgd"
    planned = plan(tiny(*told, f"{CLIENTS[:-1]}, bands: 2}}"))
    plain = accounting.calibrate(8, 1e-2, 0.5, 4)
    assert planned.in_weights == pytest.approx(
        planned.noise_multiplier * error(2, 4) / (plain * error(1, 4)), 0.01
    )
    text = " ".join("\n".join(plan_lines(planned.to_json())).split())
    assert f"{planned.in_weights:.2f} of the noise of independent rounds is left in the weights" in text
    assert plan(tiny(*told, CLIENTS)).in_weights is None


def test_a_causal_model_runs_as_planned(tiny, tiny_lm, tmp_path):
    scenario = tiny("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj, v_proj]")
    agrees(plan(scenario), simulate(scenario, out=tmp_path / "run"))


def test_parameters_by_hand(tiny):
    """Two layers, query and value, r = 4, width 32: B is 32 x 4, A 4 x 32; the head 2 x 32 and 2."""
    planned = plan(tiny())
    assert planned.parameters["adapter"] == 2 * 2 * 32 * 4 and planned.parameters["head"] == 2 * 32 + 2
    both = {a["strategy"]: a["adapter"] for a in planned.alternatives if "problem" not in a}
    assert both["fedavg_lora"] == 2 * both["ffa_lora"] == 2 * 2 * 2 * 32 * 4
    assert planned.parameters["base"] > 30522 * 32  # the embedding alone


def test_clients_are_grouped_by_their_examples(tiny):
    planned = plan(tiny(*SKEWED))
    sizes = [g["num_examples"] for g in planned.groups]
    assert sizes == sorted(set(sizes)) and sum(g["clients"] for g in planned.groups) == 4
    assert all(g["sample_rate"] == 8 / g["num_examples"] for g in planned.groups)
    noise = [g["noise_multiplier"] for g in planned.groups]
    assert noise == sorted(noise, reverse=True) and noise[0] > noise[-1]  # fewer examples, more noise


def test_nothing_is_trained_or_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan(tiny("rounds=50", "clients.lr=1.0e+9", private=False))
    assert list(tmp_path.iterdir()) == [] and len(planned.rounds) == 50


def test_what_does_not_fit_the_scenario_is_listed_with_its_reason(tiny):
    problems = {a["strategy"]: a.get("problem", "") for a in plan(tiny("model.adapter.kind=lora")).alternatives}
    assert "client_test_share" in problems["fedsa_lora"] and "no core" in problems["fed_sb"]
    assert [name for name, why in problems.items() if why] == ["dual_lora", "fed_sb", "fedsa_lora"]


def test_a_strategy_that_check_refuses_has_no_price_and_one_line_tells_of_all_that_one_reason_refuses(tiny):
    """Adam at the server steps along a mean, which those that merge or keep have not."""
    planned = plan(tiny("strategy.server={kind: adam}"))
    problems = {a["strategy"]: a["problem"] for a in planned.alternatives if "problem" in a}
    refused = {
        name for name, why in problems.items() if why.startswith("strategy.server: adam steps along a mean")
    }
    assert {"alone", "fedex_lora", "flora"} <= refused and "ffa_lora" not in problems
    told = plan_lines(planned.to_json())
    (line,) = [one for one in told if one.startswith(f"  {sorted(refused)[0]}, ")]
    text = " ".join(" ".join(told).split())
    assert line and text.count("adam steps along a mean") == 1
    assert f"{', '.join(sorted(refused))}: strategy.server: adam steps along a mean" in text
    assert "and what it makes is none: write strategy.server: null" in text


def test_the_strategies_that_go_with_a_kind_are_the_same_wherever_they_are_told(tiny):
    for server, more in (("null", "fedex_lora"), ("{kind: adam}", "")):
        planned = plan(tiny(f"strategy.server={server}"))
        (why,) = [k["problem"] for k in planned.kinds if k["kind"] == "householder"]
        with pytest.raises(SettingError) as raised:
            suitability.check(FFALoRA(), tiny(f"strategy.server={server}", "model.adapter.kind=householder"))
        assert why == str(raised.value) and ("fedex_lora" in why.rpartition(":")[2]) is bool(more)


def test_long_alternatives_are_estimated_from_their_first_rounds(tiny, monkeypatch):
    scenario = tiny("rounds=9", private=False)
    whole = {a["strategy"]: a for a in plan(scenario).alternatives}
    monkeypatch.setattr("fedlora.planning._LONG", 4)
    planned = plan(scenario)
    short = {a["strategy"]: a for a in planned.alternatives}
    assert whole["ffa_lora"]["exact"] and not short["ffa_lora"]["exact"]
    for name in ("ffa_lora", "fedavg_lora", "rolora", "flora"):
        for way in ("bytes_up_total", "bytes_down_total"):
            assert short[name][way] == pytest.approx(whole[name][way], rel=0.06)
    assert planned.bytes_up_total == whole["ffa_lora"]["bytes_up_total"]  # the plan itself stays exact


def test_where_there_are_many_rounds_epsilon_is_told_for_some(tiny, monkeypatch):
    monkeypatch.setattr("fedlora.planning._EPSILONS", 3)
    scenario = tiny("rounds=7", "data.partition={kind: label_shares, shares: [[0.5, 0.5]]}")  # all hold 48 or 47
    planned = plan(scenario)
    assert [line["round"] for line in planned.rounds if "epsilon" in line] == [1, 3, 6, 7]
    assert planned.rounds[-1]["epsilon"] == planned.epsilon


def warned(planned, words: str) -> bool:
    return any(words in text for text in planned.warnings)


def test_warnings_that_a_reviewer_would_raise(tiny):
    small = plan(tiny())
    assert warned(small, "4 clients hold fewer than 100 examples")
    drowned = "noise outweighs the signal"
    assert small.signal["run_ratio"] > 1 and not warned(small, drowned)
    loud = plan(tiny("privacy={noise_multiplier: 8, delta: 1.0e-3}"))
    assert loud.signal["run_ratio"] < 1 and warned(loud, drowned)
    assert warned(small, "of the median client takes 4 examples for each of 2 labels: noise hides what is")
    for enough in ("clients.batch_size=20", "clients.sample_rate=1.0"):  # ten of each, and all that there are
        assert not warned(plan(tiny(enough)), "for each of")
    assert not warned(small, "delta") and not warned(small, "head trains") and not warned(small, "share_metrics")
    loose = plan(tiny("privacy.delta=0.5", "privacy.epsilon=20", "privacy.share_metrics=true"))
    assert warned(loose, "not below 1/n for 4 clients") and warned(loose, "allows odds to change by a factor of")
    assert warned(loose, "share_metrics lets") and not warned(loose, "client_test_share")
    judged = plan(tiny("data.client_test_share=0.2", "rounds=5", "eval_every=2"))
    assert warned(judged, "figures of clients' own rows out, in 3 evaluations")
    assert warned(
        plan(tiny("model.adapter.r=1", "model.adapter.targets=[query]", private=False)), "The head trains"
    )
    assert warned(plan(tiny(private=False)), "There is no privacy section")
    whole = tiny(CLIENTS, "clients.use=sgd")
    masked = tiny(CLIENTS, "clients.use=sgd", "secure_aggregation={}")
    same_round = "Clients learn how many clients are in their round"
    assert warned(plan(masked), same_round) and not warned(plan(whole), same_round)


@pytest.mark.parametrize(
    "masks", ["secure_aggregation={survivors: 0.75}", "secure_aggregation={noise: shared, survivors: 0.75}"]
)
def test_keys_shares_and_masks_are_among_the_bytes(masks, tiny, tmp_path):
    """Names of a round are drawn, and a byte more or less of them is all that may differ."""
    scenario = tiny(masks, "rounds=1", "clients.local_steps=1")
    planned, run = plan(scenario), simulate(scenario, out=tmp_path / "run")
    bare = plan(tiny("rounds=1", "clients.local_steps=1"))
    for way in ("bytes_up_total", "bytes_down_total"):
        assert getattr(planned, way) == pytest.approx(run.summary[way], rel=2e-3)
        assert getattr(planned, way) > getattr(bare, way) + 4 * 300  # of each client two keys and shares, at least


def test_the_bytes_of_masks_grow_with_neighbours_until_there_are_as_many_as_may_be():
    sixteen = 19681.75, 26432.625  # of a round of sixteen clients, as carried out
    assert exchanged(16) == pytest.approx(sixteen, rel=5e-3)
    assert exchanged(1000) == exchanged(33) > exchanged(32)


def test_a_model_whose_weights_are_not_at_hand_is_planned_from_its_configuration(tiny, tiny_base, tmp_path):
    """As where only the small files of a Hub model are in the cache."""
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(tiny_base, cache / "snapshots" / "abc")
    (cache / "snapshots" / "abc" / "model.safetensors").unlink()
    here = plan(tiny())
    file = tmp_path / "far.yaml"
    file.write_text(tiny().to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "fedlora", "plan", str(file), "--set", "model.base=someone/tiny", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there["bytes_up_total"] == here.bytes_up_total and there["bytes_down_total"] == here.bytes_down_total
    assert there["parameters"] == here.parameters and there["epsilon"] == here.epsilon
    assert there["seconds"] is there["memory_bytes"] is None and here.seconds > 0
    assert any("not at hand" in line for line in plan_lines(there))


def test_memory_is_what_a_run_then_holds(tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)

    def peak(*arguments: str) -> tuple[int, str]:
        code = (
            "import resource, sys\nfrom fedlora.cli import main\n"
            f"main({[arguments[0], str(tmp_path / 'tiny.yaml'), *arguments[1:]]!r})\n"
            "print('\\n', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        told, _, held = done.stdout.rstrip().rpartition("\n")
        return int(held), told

    planned = json.loads(peak("plan", "--json")[1])["memory_bytes"]
    held, _ = peak("simulate", "--out", str(tmp_path / "run"))
    assert planned == pytest.approx(held, rel=0.25)


def test_the_command_says_it_in_words_and_in_json(tiny_yaml, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_yaml)
    assert main(["plan", str(file)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("tiny: 2 rounds of ffa_lora") and "warning: 4 clients" in told
    assert "zero-out: how many examples a client holds is public" in " ".join(told.split())
    assert "epsilon 7." in told and "estimate" in told and max(map(len, told.splitlines())) < 130
    assert main(["plan", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"bytes_up_total", "bytes_down_total", "epsilon", "noise_multiplier"} <= set(data)
    assert data["neighbours"] == "zero_out"


def test_a_wrong_setting_is_one_line(tiny, tmp_path):
    with pytest.raises(UserError, match=r"^--set clients.batch_size=100: clients.batch_size: "):
        plan(tiny("clients.batch_size=100"))
    assert main(["plan", str(Path(tmp_path) / "none.yaml")]) == 2


@pytest.mark.parametrize("epsilon, noise", [(6, 0.99), (3, 1.51), (1, 3.69)])
def test_the_noise_of_the_paper_comes_out_of_its_scenario_without_the_hub(tiny_base, tmp_path, epsilon, noise):
    """A third of SST-2's 67,349 examples each. RoBERTa and the sentences have no part in it: stand-ins do."""
    rows = [f"{'good' if i % 2 else 'bad'},{i % 2}" for i in range(67349)]
    for name, count in (("train", len(rows)), ("test", 20)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows[:count]]) + "\n")
    files = f"{{train: {tmp_path / 'train.csv'}, test: {tmp_path / 'test.csv'}}}"
    paper = scenario.load(
        "paper/sst2",
        [
            f"model.base={tiny_base}",
            f"data.files={files}",
            "data.partition.kind=iid",
            f"privacy.epsilon={epsilon}",
            "engine={kind: inline}",
        ],
    )
    ready = prepare(paper)
    assert [ready.data.num_examples(c) for c in range(3)] == [22450, 22450, 22449]
    found = calibrate(paper, ready.data)
    assert max(found.values()) == pytest.approx(noise, abs=0.005)
    assert (paper.rounds, paper.clients.local_steps, paper.clients.batch_size) == (1000, 10, 200)


def test_a_plan_of_the_papers_scenario_tells_its_noise(tiny_base, reviews):
    """All of plan, on few examples and rounds."""
    named = [f"model.base={tiny_base}", f"data.files={{train: {reviews}}}", "data.partition.kind=iid"]
    fewer = ["clients.batch_size=8", "rounds=2", "engine={kind: inline}", "data.max_length=64"]
    told = plan(scenario.load("paper/sst2", named + fewer))
    assert told.epsilon <= 6 and told.noise_multiplier > 0.5 and told.clients_total == 3


def test_a_plan_tells_the_bands_of_each_group_and_what_they_leave_of_the_noise(tiny):
    """Twelve steps of 8 rows: from the calibrations and the matrices."""
    planned = plan(tiny("privacy.bands=2", "rounds=6", "privacy.epsilon=3"))
    group, rate = planned.groups[0], 8 / planned.groups[0]["num_examples"]
    banded, plain = accounting.calibrate(3, 1e-3, 2 * rate, 6), accounting.calibrate(3, 1e-3, rate, 12)
    assert (group["bands"], group["noise_multiplier"]) == (2, banded)
    assert group["in_weights"] == pytest.approx(banded * error(2, 12) / (plain * math.sqrt(6.5)))
    spent = Event(noise_multiplier=banded, sample_rate=2 * rate, steps=12, clip_norm=1.0, bands=2)
    assert group["epsilon"] == accounting.epsilon([spent], 1e-3) <= planned.epsilon <= 3
    assert planned.signal["bands"] == 2
    lines = plan_lines(planned.to_json())
    assert sum("epsilon rises by turns, not by rounds" in line for line in lines) == 1
    assert "            banded noise, b = 2, by the examples that a client holds" in lines
    assert any(line.split()[-2:] == ["2", f"{group['in_weights']:.2f}"] for line in lines)
    assert not any("bands" in line for line in plan_lines(plan(tiny()).to_json()))


def test_bands_that_do_not_pay_are_not_taken(tiny):
    """Half of a client's rows in a step: there is no second group to take turns with that hides as much."""
    groups = plan(tiny("privacy.bands=auto", "clients.batch_size=30")).groups
    assert {(group["bands"], group["in_weights"]) for group in groups} == {(1, 1.0)}


@pytest.mark.parametrize(
    "bands, why",
    [
        ("7", r"has 45 examples, and a step would take 8 on average from one in 7 of them: name 5 at most"),
        ("5", r"5 bands are more than the run's 4 steps: name fewer, or auto"),
    ],
)
def test_bands_that_a_client_cannot_have_are_refused(tiny, bands, why):
    with pytest.raises(UserError, match=why):
        plan(tiny(f"privacy.bands={bands}", *(["rounds=9"] if bands == "7" else [])))


def test_each_kind_of_adapter_has_its_bytes_and_its_noise(tiny):
    """Four layers of 32 x 32 at r = 4 and s = 2, and a head of 66: by hand."""
    planned = plan(tiny())
    told = {k["kind"]: k for k in planned.kinds}
    assert "not linear in what it trains" in told.pop("householder")["problem"]
    numbers = {
        "lora": 512,
        "very_sparse": 512,
        "block": 512,
        "channel": 1024,
        "core": 64,
        "lora_xs": 64,
        "dual": 1024,
    }
    numbers |= {"tensor": 16, "singular": 16, "ldu": 16, "dct": 512, "sparse": 512 + 4 * 10, "peft": 512}
    assert {name: k["adapter"] for name, k in told.items()} == numbers
    assert all(k["head"] == 66 and k["bytes_up"] == 4 * (k["adapter"] + 66) for k in told.values())
    assert told["core"]["gain"] == told["lora_xs"]["gain"] == told["tensor"]["gain"] == 16.0  # s r sqrt(4 layers)
    assert told["ldu"]["gain"] == told["singular"]["gain"] == 8.0
    assert told["lora"]["gain"] == pytest.approx(4 * math.sqrt(32 * 4 / 3))
    assert told["core"]["noise"] == pytest.approx(16 * planned.signal["noise"])
    lines = plan_lines(planned.to_json())
    assert next(line for line in lines if line.split()[:1] == ["core"]).endswith(f"{told['core']['noise']:.3g}")
    refused = {k["kind"]: k.get("problem", "") for k in plan(tiny("strategy.use=flexlora", private=False)).kinds}
    assert "no A or B that can train" in refused["core"] and not refused["lora"]
    both = {k["kind"]: k for k in plan(tiny("strategy.use=fedavg_lora", private=False)).kinds}["householder"]
    assert (both["adapter"], both["gain"]) == (4 * 4 * 65, 8.0)
