"""What baselines say, in figures that can be checked by hand; and where it is shown."""

import json

import pytest
import yaml

from fedlora.cli import main
from fedlora.reports import single
from fedlora.reports.baselines import Measured, sentences
from fedlora.reports.comparison import Comparison
from fedlora.run import Run
from fedlora.scenario.baseline import configuration

PRIVATE = {"epsilon": 6.0, "delta": 1e-5, "unit": "example"}


@pytest.fixture
def write(tmp_path):
    """Writes the folder of a run that has ended, or of a baseline of such a run."""

    def made(name, accuracy, *, kind=None, seed=0, metric="accuracy", private=True, lr=1.0, rate=1.0, **more):
        whole = {
            "name": name,
            "seed": seed,
            "task": "classification",
            "strategy": {"use": "ffa_lora"},
            "rounds": 2,
        }
        whole |= {"data": {"dataset": "tweets"}, "clients": {"total": 10, "lr": lr}, "baseline": None}
        whole |= {"privacy": PRIVATE if private else None}
        scenario = dict(whole)
        if kind is not None:
            scenario |= {
                "baseline": {"kind": kind, "of": configuration(whole)},
                "clients": {"total": 1, "lr": rate},
            }
            scenario |= {"privacy": None if kind == "pooled" else whole["privacy"]}
        (folder := tmp_path / name).mkdir()
        (folder / "scenario.yaml").write_text(yaml.safe_dump(scenario, sort_keys=False))
        epsilon = 5.98 if scenario["privacy"] else None
        line = {"round": 1, metric: accuracy, "bytes_up": 1e6, "bytes_down": 1e6, "epsilon": epsilon, "seconds": 1}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "clients.jsonl").touch()
        from importlib.metadata import version

        summary = {"rounds": 1, "metric": metric, "higher_is_better": metric == "accuracy", metric: accuracy}
        summary |= {"versions": {"fedlora": version("fedlora")}, **more}
        (folder / "summary.json").write_text(json.dumps(summary))
        return Run.open(folder)

    return made


def test_one_seed_of_each(write):
    runs = [
        write("run", 0.70),
        write("pooled", 0.78, kind="pooled"),
        write("central", 0.73, kind="pooled_private"),
        write("alone", 0.48, kind="alone", accuracy_least=0.31, accuracy_most=0.55),
    ]
    made = Comparison(runs)
    assert made.sentences == [
        "Privacy at epsilon 5.98 costs 0.0800 in accuracy: pooled has 0.7800, and ffa_lora 0.7000.",
        "Trusting no single place with the rows costs 0.0300 in accuracy: pooled_private has 0.7300, and ffa_lora "
        "0.7000.",
        "Federating gains 0.2200 in accuracy over training alone: ffa_lora has 0.7000, and alone 0.4800 on "
        "average, from 0.3100 to 0.5500 by client.",
    ]
    assert [row[0] for row in made.table().rows] == ["ffa_lora", "pooled", "pooled_private", "alone"]
    assert made.front == {"ffa_lora"} and any("stay out of the Pareto front" in said for said in made.legend())
    page = made.html()
    assert all(f"<p>{said}</p>" in page for said in made.sentences)


def test_over_seeds_differences_are_taken_by_seed(write):
    """0.78 - 0.70 and 0.80 - 0.70: mean 0.09, deviation 0.01 * sqrt 2; a seed that one lacks is left out."""
    runs = [write(f"run{seed}", 0.70, seed=seed) for seed in (1, 2, 3)]
    runs += [write(f"pooled{seed}", value, kind="pooled", seed=seed) for seed, value in ((2, 0.80), (1, 0.78))]
    runs += [write("alone9", 0.4, kind="alone", seed=9)]
    assert Comparison(runs).sentences == [
        "alone and ffa_lora share no seed, so they are not compared.",
        "Privacy at epsilon 5.98 costs 0.0900 ± 0.0141 in accuracy over 2 seeds: pooled has 0.7900, and ffa_lora "
        "0.7000.",
    ]


def test_without_privacy_what_is_between_is_the_price_of_federating(write):
    made = Comparison([write("run", 0.77, private=False), write("pooled", 0.78, kind="pooled", private=False)])
    assert made.sentences == ["Federating costs 0.0100 in accuracy: pooled has 0.7800, and ffa_lora 0.7700."]


def test_where_less_is_better_a_price_is_still_positive(write):
    runs = [write("run", 30.0, metric="perplexity"), write("pooled", 20.0, kind="pooled", metric="perplexity")]
    runs += [write("alone", 45.0, kind="alone", metric="perplexity")]
    price, gain = Comparison(runs).sentences
    assert price.startswith("Privacy at epsilon 5.98 costs 10.0000 in perplexity: pooled has 20.0000")
    assert gain == (
        "Federating gains 15.0000 in perplexity over training alone: ffa_lora has 30.0000, and alone 45.0000 on "
        "average."
    )


def test_each_run_is_held_to_its_own_baselines(write):
    runs = [write("a", 0.70, lr=1.0), write("b", 0.60, lr=2.0)]
    runs += [write("pa", 0.78, kind="pooled", lr=1.0), write("pb", 0.75, kind="pooled", lr=2.0)]
    made = Comparison(runs)
    assert [g.label for g in made.groups] == ["lr 1", "lr 2", "pooled of lr 1", "pooled of lr 2"]
    assert [said.partition(":")[0] for said in made.sentences] == ["lr 1", "lr 2"]
    assert "costs 0.0800" in made.sentences[0] and "costs 0.1500" in made.sentences[1]


def test_of_a_baseline_that_was_tuned_the_best_counts(write):
    runs = [write("run", 0.70)]
    runs += [write(f"p{rate}", value, kind="pooled", rate=rate) for rate, value in ((0.1, 0.72), (0.5, 0.79))]
    made = Comparison(runs)
    assert [g.label for g in made.groups] == ["ffa_lora", "pooled, lr 0.1", "pooled, lr 0.5"]
    assert len(made.sentences) == 1 and "pooled, lr 0.5 has 0.7900" in made.sentences[0]


def test_baselines_alone_say_nothing_of_a_run_that_is_not_there(write):
    made = Comparison([write("p", 0.7, kind="pooled"), write("a", 0.5, kind="alone"), write("o", 0.6, lr=3.0)])
    assert made.sentences == [] and made.groups[0].label.startswith("pooled of ")


def test_a_report_names_the_baselines_in_the_same_folder(write):
    run, other = write("run", 0.70), write("other", 0.9, seed=1)
    write("pooled", 0.78, kind="pooled")
    write("alone", 0.48, kind="alone", seed=1)
    (write("damaged", 0.9, kind="pooled").folder / "summary.json").write_text("{")
    (write("no-text", 0.9).folder / "scenario.yaml").write_bytes(b"\xff")
    assert "Privacy at epsilon 5.98 costs 0.0800 in accuracy" in (page := single.html(run))
    assert "Federating gains" not in page and "Federating gains 0.4200" in single.html(other)
    assert "costs" not in single.html(Run.open(run.folder.parent / "pooled")).partition("<script")[0]


def test_the_sentences_are_printed(write, tmp_path, capsys):
    folders = [str(r.folder) for r in (write("run", 0.70), write("pooled", 0.78, kind="pooled"))]
    assert main(["compare", *folders, "--out", str(tmp_path / "page.html")]) == 0
    assert "Privacy at epsilon 5.98 costs 0.0800 in accuracy: pooled has 0.7800" in capsys.readouterr().out


def test_nothing_measured_says_nothing():
    measured = [Measured("run", None, "a", {0: 0.7}), Measured("pooled", "pooled", "a", {})]
    assert sentences(measured, "accuracy", True) == []
