"""Verdicts on made curves, with numbers that a reader can check by hand."""

import json
from math import log

import pytest

from fedlora.cli import main
from fedlora.reports.console import summary_lines
from fedlora.reports.verdicts import verdicts
from fedlora.run import Run

PRIVATE = {
    "clients": {"use": "dp_sgd", "lr": 0.5, "batch_size": 64},
    "privacy": {"unit": "example", "epsilon": 6, "noise_multiplier": None},
    "strategy": {"use": "ffa_lora", "server": None},
    "rounds": 10,
}
PLAIN = {**PRIVATE, "privacy": None, "clients": {"use": "sgd", "lr": 0.5}}


def curve(*values, losses=None, metric="accuracy"):
    losses = losses or [0.1] * len(values)
    return [
        {"round": i, metric: value, "loss": loss}
        for i, (value, loss) in enumerate(zip(values, losses, strict=True), 1)
    ]


def judged(rounds, scenario=PLAIN, clients=(), labels=2, **summary):
    told = {"metric": "accuracy", "higher_is_better": True, "test_examples": 400, "majority": 0.5, **summary}
    return {v.code: v for v in verdicts(rounds, clients, scenario, told, labels)}


@pytest.mark.parametrize(
    "value, words",
    [
        (0.5, "no better than always saying the commonest label (0.50 of 400 test rows)"),
        (
            0.55,
            "its accuracy of 0.550 may be no better than always saying the commonest label",
        ),  # 0.5 + 2 * 0.025
        (0.56, None),
    ],
)
def test_two_standard_errors_above_the_commonest_label_is_learning(value, words):
    found = judged(curve(value))
    assert found["majority"].says.startswith(words) if words else found == {}


def test_an_f1_of_nothing_is_that_of_always_saying_that_there_is_nothing():
    (found,) = judged(curve(0.2, 0.0, losses=[0.3, 0.3], metric="f1"), metric="f1", majority=0.9).values()
    assert found.code == "majority" and found.says.startswith("not one entity is found")
    assert judged(curve(0.01, metric="f1"), metric="f1", majority=0.9) == {}


def test_a_correlation_within_two_standard_errors_of_none_is_not_learning():
    """Of 400 rows: 2 / sqrt(400) = 0.1."""
    (found,) = judged(curve(0.09, metric="pearson"), metric="pearson", majority=None).values()
    assert found.says == "no better than one score for all rows (pearson 0.09 on 400 test rows)"
    assert judged(curve(0.11, metric="pearson"), metric="pearson", majority=None) == {}


def test_where_no_score_can_tell_it_is_the_test_set_that_is_to_change():
    (found,) = judged(curve(1.0), majority=0.98, test_examples=100).values()  # 0.98 + 2 * 0.014 > 1
    assert found.code == "majority" and found.setting == "more test rows, of more labels"


def test_guessing_at_labels_by_their_shares_has_their_entropy_for_loss():
    least = log(2) + 2 / 20  # two labels, half of the rows each; 400 rows
    assert "guessing" not in judged(curve(0.9, losses=[least - 1e-9]))
    assert judged(curve(0.9, losses=[least + 1e-9]))["guessing"].says == (
        "its loss of 0.793 is above the 0.693 of guessing labels by their shares"
    )
    four = -0.4 * log(0.4) - 0.6 * log(0.2)  # four labels, 0.4 and three of 0.2
    found = judged(curve(0.9, losses=[four + 0.11]), labels=4, majority=0.4)
    assert f"the {four:.3f} of guessing" in found["guessing"].says
    assert judged(curve(0.9, losses=[0.05]), labels=2, majority=1.0).keys() == {"majority"}


def test_what_still_rises_at_the_end():
    found = judged(curve(0.60, 0.64, 0.68, 0.72))  # e(0.66) = 0.0237
    assert found["rising"].says == "accuracy was still rising at the end: by 0.120 from round 1 on"
    assert judged(curve(0.60, 0.61, 0.62, 0.63)) == {}  # 0.03 is within the noise of 400 rows
    assert judged(curve(0.60, 0.61, 0.62, 0.63), test_examples=40_000).keys() == {"rising"}
    assert judged(curve(0.55, 0.75, 0.58, 0.76)) == {}  # it jumps more than it rises
    assert judged(curve(0.60, 0.66, 0.72)) == {}  # too few to say
    assert judged(curve(0.40, 0.70, 0.71, 0.71)) == {}  # it has levelled
    assert judged(curve(*[0.1 * i for i in range(8)], 0.8, 0.8, 0.8, 0.8)) == {}  # the last third alone counts


def test_what_collapsed_after_its_best_round():
    found = judged(curve(0.6, 0.8, 0.7, losses=[0.6, 0.4, 0.5]))  # 3 * sqrt(0.02² + 0.0229²) = 0.091
    assert found["collapsed"].says == "it collapsed: accuracy was 0.8000 after round 2 and is 0.7000"
    assert judged(curve(0.6, 0.8, 0.71, losses=[0.6, 0.4, 0.5])) == {}
    assert judged(curve(0.6, 0.8, 0.7, losses=[0.6, 0.4, 0.4])) == {}  # the loss does not say so
    assert judged([{"round": 1, "accuracy": None, "loss": None}]) == {}


def test_a_metric_that_is_no_accuracy_is_judged_by_its_curve_alone():
    told = {"metric": "perplexity", "higher_is_better": False, "majority": None, "labels": 0}
    falls = curve(9.0, 8.0, 7.0, 6.0, losses=[2.2, 2.08, 1.95, 1.79], metric="perplexity")
    (found,) = judged(falls, **told).values()
    assert found.says == "perplexity was still falling at the end: by 3.000 from round 1 on"
    up = curve(9.0, 6.0, 6.7, losses=[2.2, 1.79, 1.90], metric="perplexity")
    assert judged(up, **told).keys() == {"collapsed"}
    assert judged(curve(9.0, 6.0, 6.5, losses=[2.2, 1.79, 1.87], metric="perplexity"), **told) == {}


def test_where_each_client_has_its_own_model_the_test_set_says_nothing():
    own = [{"round": 1, "accuracy": 0.3, "local_accuracy": 0.3, "loss": 3.0, "local_loss": 3.0}]
    assert judged(own) == {}
    assert judged([{**own[0], "local_accuracy": 0.4}]).keys() == {"majority", "guessing"}


def lines(*losses, rounds=3):
    return [
        {"round": r, "client": c, "error": None, "train_loss": loss + 0.1 * (r % 2)}
        for r in range(1, rounds + 1)
        for c, loss in enumerate(losses)
    ]


def test_one_client_far_behind():
    rounds = curve(0.8)
    odd = lines(0.50, 0.52, 0.54, 0.56, 2.0)
    assert judged(rounds, clients=odd)["client"].says == (
        "client 4 is far behind: its training loss is 2.067 where that of the others is 0.597"
    )
    assert judged(rounds, clients=lines(0.5, 0.8, 1.1, 1.4, 1.7)) == {}  # all differ
    assert judged(rounds, clients=lines(0.50, 0.50, 0.50, 0.50, 0.60)) == {}  # sure, and too little to matter
    assert judged(rounds, clients=lines(0.5, 0.5, 2.0)) == {}  # two others say nothing of spread
    assert judged(rounds, clients=odd[:10]) == {}  # two rounds
    assert judged(rounds, clients=[{**line, "error": "gone"} for line in odd]) == {}
    assert judged(rounds, clients=[{k: v for k, v in line.items() if k != "train_loss"} for line in odd]) == {}


def test_where_clients_are_protected_whole_none_is_named():
    whole = {**PRIVATE, "privacy": {**PRIVATE["privacy"], "unit": "client"}}
    odd = lines(0.50, 0.52, 0.54, 0.56, 2.0)
    assert judged(curve(0.8), PRIVATE, odd).keys() == {"client"} and judged(curve(0.8), whole, odd) == {}


def test_settings_to_try_are_those_that_the_scenario_has_left():
    chance, bad, rising = curve(0.5), curve(0.5, losses=[9.0]), curve(0.6, 0.7, 0.8, 0.9)
    fell = curve(0.9, 0.6, losses=[0.1, 0.4])
    adam = {**PRIVATE, "strategy": {"use": "ffa_lora", "server": {"kind": "adam", "lr": 0.02}}}
    assert judged(chance, PRIVATE)["majority"].setting == (
        "strategy.server: {kind: adam, lr: 0.02}, a larger clients.batch_size (now 64), "
        "another clients.lr (now 0.5), as fedlora tune finds it"
    )
    assert judged(chance, adam)["majority"].setting == (
        "a larger clients.batch_size (now 64), another strategy.server.lr (now 0.02), as fedlora tune finds it"
    )
    texts = {**adam, "task": "classification", "model": {"base": "bert", "pooling": None}}
    assert "a larger clients.batch_size (now 64), model.pooling: mean, of an encoder, another" in (
        judged(chance, texts)["majority"].setting
    )
    assert "pooling" not in judged(chance, {**texts, "task": "causal_lm"})["majority"].setting
    for use in ("flora", "fedask", "mine:Own"):  # no mean, or nobody knows
        assert judged(chance, {**PLAIN, "strategy": {"use": use}})["majority"].setting == (
            "another clients.lr (now 0.5), as fedlora tune finds it"
        )
    whole = {**adam, "privacy": {"unit": "client"}, "clients": {"per_round": 10}}
    assert judged(chance, whole)["majority"].setting.startswith("a larger clients.per_round (now 10), ")
    found = judged(bad, PRIVATE)  # what diverges needs no larger steps
    assert {found["majority"].setting, found["guessing"].setting} == {"a lower clients.lr (now 0.5)"}
    assert judged(fell)["collapsed"].setting == "clients.schedule: {kind: cosine}, or a lower clients.lr (now 0.5)"
    assert judged(fell, adam)["collapsed"].setting.startswith(
        "strategy.server.schedule: {kind: linear}, or a lower"
    )
    paced = {**PLAIN, "clients": {**PLAIN["clients"], "schedule": {"kind": "linear"}}}
    assert judged(fell, paced)["collapsed"].setting == "a lower clients.lr (now 0.5)"
    assert judged(rising)["rising"].setting == "rounds: 20, with --resume"
    assert judged(rising, paced)["rising"].setting == "rounds: 20 in a new run, for its schedule"
    assert judged(rising, PRIVATE)["rising"].setting == (
        "rounds: 20 in a new run: at the same epsilon each then has more noise, "
        "or a larger clients.batch_size (now 64)"
    )
    for rate, more in ((0.05, ", or a larger clients.sample_rate (now 0.05), up to 1.0"), (1.0, "")):
        shared = {**PRIVATE, "clients": {**PRIVATE["clients"], "sample_rate": rate}}
        assert judged(rising, shared)["rising"].setting.endswith(f"each then has more noise{more}")
        assert ("sample_rate" in judged(chance, shared)["majority"].setting) == (rate < 1)
    fixed = {**PRIVATE, "privacy": {"unit": "example", "noise_multiplier": 1.0}}
    assert judged(rising, fixed)["rising"].setting == "rounds: 20, which costs more epsilon"
    spent = judged(rising, PRIVATE, stopped="after round 4: another would pass every client's epsilon")
    assert spent["rising"].setting == "a larger privacy.epsilon or noise_multiplier: no client had epsilon left"
    personal = {**PLAIN, "strategy": {"use": "fedsa_lora"}}
    assert (
        judged(curve(0.8), personal, lines(0.5, 0.52, 0.54, 0.56, 2.0))["client"].setting == "a look at its rows"
    )


def test_a_scenario_of_another_version_is_judged_all_the_same():
    assert "clients.lr (now ?)" in judged(curve(0.5), {"key_of_old": 1})["majority"].setting


@pytest.fixture
def stuck(copy):
    """A run that ended at the share of its commonest label, which half of its test rows have."""
    folder = copy().folder
    told = [json.loads(line) | {"accuracy": 0.5} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    summary = json.loads((folder / "summary.json").read_text()) | {"majority": 0.5, "accuracy": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    return copy()


def test_a_run_that_does_not_learn_says_so_wherever_it_is_shown(stuck, capsys):
    words = "no better than always saying the commonest label (0.50 of 60 test rows); try strategy.server: "
    assert not stuck.learnt
    assert f"  verdict  {words}" in "\n".join(summary_lines(stuck))
    assert any(said.startswith(words[1:], 1) and said.endswith(".") for said in stuck.remarks())
    assert main(["report", str(stuck.folder)]) == 0 and main(["compare", str(stuck.folder)]) == 0
    assert words[1:] in (stuck.folder / "report.html").read_text() and words[1:] in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_judged(stuck):
    (stuck.folder / "summary.json").unlink()
    assert Run.open(stuck.folder).verdicts() == []


def test_the_summary_holds_them(ten):
    told = [(verdict.code, verdict.says, verdict.setting) for verdict in ten.verdicts()]
    assert [(v["code"], v["says"], v["setting"]) for v in ten.summary["verdicts"]] == told
