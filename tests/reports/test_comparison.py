"""Comparisons, with figures that can be checked by hand."""

import json

import pytest
import yaml
from scipy import stats

from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.record import Record
from fedlora.reports import single
from fedlora.reports.comparison import Comparison
from fedlora.reports.verdicts import Verdict
from fedlora.run import Run


@pytest.fixture
def folder(tmp_path):
    """Writes a run folder: two rounds, the metric measured after each, 1 MB up and 2 MB down in each."""

    def write(
        name,
        accuracy,
        *,
        use="ffa_lora",
        seed=0,
        mb=1.0,
        epsilon=None,
        metric="accuracy",
        ended=True,
        clock=None,
        majority=None,
        **more,
    ):
        made = tmp_path / name
        made.mkdir()
        scenario = {"name": name, "seed": seed, "rounds": 2, "task": "classification", "strategy": {"use": use}}
        scenario |= {"data": {"dataset": "tweets"}, "clients": {"lr": 1.0}, **more}
        (made / "scenario.yaml").write_text(yaml.safe_dump(scenario))
        lines = [
            {"round": r, metric: value, "bytes_up": mb * 1e6, "bytes_down": 2e6, "epsilon": epsilon, "seconds": 30}
            for r, value in ((1, accuracy - 0.1), (2, accuracy))
        ]
        if clock is not None:
            lines = [line | {"virtual_seconds": clock * line["round"], "late": 1} for line in lines]
        (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (made / "clients.jsonl").touch()
        if ended:
            from importlib.metadata import version

            summary = {
                "rounds": 2,
                metric: accuracy,
                "majority": majority,
                "versions": {"fedlora": version("fedlora")},
            }
            (made / "summary.json").write_text(json.dumps(summary))
        return Run.open(made)

    return write


def cells(made, label):
    table = made.table()
    (row,) = [row for row in table.rows if row[0] == label]
    return dict(zip(table.head, row, strict=True))


def test_the_commonest_label_is_a_level_in_the_curves(folder):
    curves = Comparison([folder("a", 0.7, majority=0.4375), folder("b", 0.6, use="rolora")]).figures()[:2]
    for figure in curves:
        spec = figure.chart.to_dict()
        rows = spec["datasets"][spec["data"]["name"]]
        assert {row["run"]: row.get("commonest label") for row in rows} == {"ffa_lora": 0.4375, "rolora": None}
        assert "Dashed: the commonest label." in figure.note
    assert "Dashed" not in Comparison([folder("c", 0.7)]).figures()[0].note


def test_runs_without_privacy_are_named_so_and_the_others_by_their_epsilon(folder):
    private = [
        folder(f"e{e}", 0.6, privacy={"epsilon": e, "delta": 1e-5, "unit": "example"}, epsilon=e)
        for e in (3.0, 6.0)
    ]
    labels = [g.label for g in Comparison([folder("none", 0.7, privacy=None), *private]).groups]
    assert labels == ["no privacy", "epsilon 3", "epsilon 6"]
    (none, one) = Comparison([folder("free", 0.7, privacy=None), private[0]]).groups
    assert (none.label, one.label) == ("no privacy", "ffa_lora")


def test_a_run_that_cut_its_base_is_named_so(folder):
    whole, lord = folder("whole", 0.7, compress=None), folder("lord", 0.6, compress={"use": "lord", "keep": 0.5})
    assert [g.label for g in Comparison([whole, lord]).groups] == ["no compress", "compress lord"]
    afm = folder("afm", 0.6, compress={"use": "afm", "keep": 0.5})
    assert [g.label for g in Comparison([whole, lord, afm]).groups] == ["no compress", "lord", "afm"]


def test_epsilons_of_examples_and_of_clients_are_said_to_be_of_two_kinds(folder):
    units = ("example", "client", "example")
    runs = [
        folder(f"r{i}", 0.6, privacy={"epsilon": 3.0, "delta": 1e-5, "unit": unit}, epsilon=3.0)
        for i, unit in enumerate(units)
    ]
    said = "epsilon is for each client in some runs and for each example in others: do not compare the two."
    assert said in Comparison(runs).notes
    assert said not in Comparison([runs[0], runs[2], folder("free", 0.7, privacy=None)]).notes


def test_each_unit_has_a_pareto_front_of_its_own(folder):
    def run(name, accuracy, epsilon, **asked):
        return folder(name, accuracy, privacy={"epsilon": epsilon, "delta": 1e-5, **asked}, epsilon=epsilon)

    rows, worse = run("rows", 0.7, 1.0, unit="example"), run("worse", 0.6, 2.0, unit="example")
    person = run("person", 0.5, 4.0, unit="example", person="patient_id")
    made = Comparison(
        [rows, worse, person, folder("free", 0.7, privacy=None)], ["rows", "worse", "person", "free"]
    )
    assert made.front == {"rows", "person"}  # what has no privacy is beaten by what has as good a metric with it
    assert [cells(made, name)["unit"] for name in ("rows", "person", "free")] == ["example", "person", "-"]
    titles = [figure.title for figure in made.figures()]
    assert titles[-1] == "Accuracy against epsilon for each example"  # one person's point is no chart
    assert any("the Pareto front of each unit" in said for said in made.legend())
    alike = Comparison([rows, worse])
    assert "unit" not in alike.table().head and alike.front == {alike.groups[0].label}
    assert alike.figures()[-1].title == "Accuracy against epsilon"


def test_names_stand_before_remarks_too_and_the_cost_of_another_run_once(folder, monkeypatch):
    verdict = Verdict("rising", "it rises", "rounds: 8")
    monkeypatch.setattr(Record, "verdicts", lambda self: [verdict])
    asked = {"epsilon": 3.0, "delta": 1e-5, "unit": "example"}
    seeds = [folder(f"a{seed}", 0.6, seed=seed, privacy=asked) for seed in (0, 1)]
    runs = [*seeds, folder("b", 0.6, use="rolora", privacy=asked)]
    assert Comparison(runs, ["ours", "theirs"]).notes == [
        "ours, seed 0: It rises; try rounds: 8.",
        "ours, seed 1: It rises; try rounds: 8.",
        "theirs: It rises; try rounds: 8.",
        "Another run on the same private rows spends its epsilon too, and the two add up.",
    ]
    assert Comparison(runs).notes[0] == "a0: It rises; try rounds: 8."


def test_seeds_are_averaged_and_configurations_named_by_what_differs(folder):
    made = Comparison(
        [
            folder("a0", 0.60, seed=0, epsilon=6.0),
            folder("a1", 0.62, seed=1, epsilon=5.9),
            folder("b0", 0.50, use="fedavg_lora", mb=2.0, clients={"lr": 0.5}),
        ]
    )
    assert [g.label for g in made.groups] == ["ffa_lora, lr 1", "fedavg_lora, lr 0.5"]
    one, other = cells(made, "ffa_lora, lr 1"), cells(made, "fedavg_lora, lr 0.5")
    assert one["accuracy"] == "0.6100 ± 0.0141" and one["seeds"] == "2" and one["MB up"] == "2.00"
    assert one["epsilon"] == "6.00" and other["epsilon"] == "none" and one["minutes"] == "1.0"
    assert other["accuracy"] == "0.5000" and other["difference"] == "-0.1100" and other["p"] == "-"
    assert other["MB up"] == "4.00" and other["MB down"] == "4.00"
    assert made.notes == [] and any("not tested: ffa_lora, lr 1, fedavg" in said for said in made.legend())


def test_shared_seeds_are_tested_in_pairs_with_holms_correction(folder):
    base, b, c = (0.50, 0.52, 0.54), (0.60, 0.63, 0.64), (0.51, 0.50, 0.56)
    runs = [
        folder(f"{use}{seed}", values[seed], use=use, seed=seed)
        for use, values in (("ffa_lora", base), ("rolora", b), ("fedsvd", c))
        for seed in range(3)
    ]
    made = Comparison(runs)
    raw = {"rolora": stats.ttest_rel(base, b).pvalue, "fedsvd": stats.ttest_rel(base, c).pvalue}
    assert raw["rolora"] < raw["fedsvd"] and made.tests["rolora"].paired
    assert made.tests["rolora"].p == pytest.approx(2 * raw["rolora"])
    assert made.tests["fedsvd"].p == pytest.approx(max(raw["fedsvd"], 2 * raw["rolora"]))
    assert made.tests["rolora"].difference == pytest.approx(0.31 / 3)


def test_other_seeds_are_tested_by_welch_and_equal_values_not_at_all(folder):
    base, other = (0.50, 0.52, 0.54), (0.60, 0.63, 0.64)
    runs = [folder(f"a{i}", v, seed=i) for i, v in enumerate(base)]
    runs += [folder(f"b{i}", v, use="rolora", seed=10 + i) for i, v in enumerate(other)]
    runs += [folder(f"c{i}", v, use="flora", seed=i) for i, v in enumerate(base)]
    tests = Comparison(runs).tests
    assert not tests["rolora"].paired
    assert tests["rolora"].p == pytest.approx(stats.ttest_ind(base, other, equal_var=False).pvalue)
    assert tests["flora"].difference == 0 and tests["flora"].p is None


def test_the_front_holds_what_nobody_beats(folder):
    made = Comparison(
        [
            folder("cheap", 0.5, use="ffa_lora", mb=1.0, epsilon=3.0),
            folder("good", 0.6, use="rolora", mb=2.0, epsilon=3.0),
            folder("beaten", 0.5, use="flora", mb=2.0, epsilon=3.0),
            folder("private", 0.4, use="fedsvd", mb=2.0, epsilon=1.0),
        ]
    )
    assert made.front == {"ffa_lora", "rolora", "fedsvd"}
    assert [cells(made, g.label)["Pareto front"] for g in made.groups] == ["yes", "yes", "", "yes"]


def test_a_run_below_the_commonest_label_is_not_on_the_front(folder):
    """It sends the fewest bytes, and learnt nothing."""
    low, high = folder("low", 0.4, use="rolora", mb=0.1, majority=0.5), folder("high", 0.7, mb=1.0, majority=0.5)
    made = Comparison([low, high], ["low", "high"])
    assert made.front == {"high"} and cells(made, "low")["Pareto front"] == ""


def test_epsilons_that_differ_by_rounding_are_equal_on_the_front(folder):
    """0.6 at 6.00 is no trade for 0.7 at 6.02; at 6.10 it is. The chart has each epsilon as it is."""
    for better, front in ((6.02, {"rolora"}), (6.10, {"rolora", "ffa_lora"})):
        runs = [folder(f"a{better}", 0.6, epsilon=6.0), folder(f"b{better}", 0.7, use="rolora", epsilon=better)]
        made = Comparison(runs)
        assert made.front == front
        spec = made.figures()[-1].chart.to_dict()
        rows = spec["datasets"][spec["data"]["name"]]
        assert [row["epsilon"] for row in rows] == [6.0, better]
        assert {row["run"] for row in rows if row["Pareto front"]} == front


def test_what_cannot_change_a_result_is_in_no_name(folder):
    often = folder("often", 0.6, eval_every=1, seed=1)
    made = Comparison([folder("a", 0.6, eval_every=5), often, folder("b", 0.5, use="rolora", eval_every=2)])
    assert [(g.label, len(g.runs)) for g in made.groups] == [("ffa_lora", 2), ("rolora", 1)]
    chosen = [folder(f"k{n}", 0.6, eval_every=n, keep="best") for n in (1, 5)]
    assert [g.label for g in Comparison(chosen).groups] == ["eval every 1", "eval every 5"]


def test_settings_of_one_strategy_name_no_run_of_another(folder):
    runs = [folder("a", 0.6, strategy={"use": "ffa_lora"})]
    runs += [
        folder(f"b{error}", 0.5, strategy={"use": "fedavg_lora", "measure_error": error})
        for error in (True, False)
    ]
    assert [g.label for g in Comparison(runs[:2]).groups] == ["ffa_lora", "fedavg_lora"]
    labels = [g.label for g in Comparison(runs).groups]
    assert labels == ["ffa_lora", "fedavg_lora, measure error true", "fedavg_lora, measure error false"]


def test_one_seed_of_the_same_settings_counts_once(folder):
    made = Comparison([folder("a", 0.60), folder("again", 0.60, eval_every=9), folder("b", 0.64, seed=1)])
    assert cells(made, "ffa_lora")["seeds"] == "2" and cells(made, "ffa_lora")["accuracy"] == "0.6200 ± 0.0283"
    assert made.notes == ["again: its seed and settings are those of a; not counted again."]


def test_rows_have_the_names_that_are_given(folder, tmp_path, capsys):
    runs = [str(folder("a", 0.6).folder), str(folder("a1", 0.7, seed=1).folder)]
    runs += [str(folder("b", 0.5, use="rolora").folder)]
    page = str(tmp_path / "c.html")
    assert main(["compare", *runs, "--names", "B only, A or B", "--out", page]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("B only ") and lines[2].startswith("A or B ")
    for names, said in (("one", "1 name for 2 configurations; name these in this order: ffa_lora; rolora"),):
        assert main(["compare", *runs, "--names", names, "--out", page]) == 2
        assert capsys.readouterr().err == f"--names: {said}\n"
    for names in ("one,one", "one,"):
        assert main(["compare", *runs, "--names", names, "--out", page]) == 2
        assert "each configuration needs a name of its own" in capsys.readouterr().err


def test_a_band_says_of_how_many_seeds_it_is(folder):
    made = Comparison([folder("a0", 0.60), folder("a1", 0.64, seed=1), folder("b", 0.5, use="rolora")])
    for figure in made.figures():
        spec = figure.chart.to_dict()
        rows = spec["datasets"][spec["data"]["name"]]
        assert {row["run"] for row in rows} == {"ffa_lora, n = 2", "rolora, n = 1"}


def test_of_perplexity_less_is_better(folder):
    made = Comparison(
        [
            folder("a", 9.0, use="ffa_lora", metric="perplexity"),
            folder("b", 7.0, use="rolora", metric="perplexity"),
        ]
    )
    assert made.front == {"rolora"} and "less is better" in made.legend()[0]


def test_what_cannot_be_compared_is_said_and_shown(folder):
    made = Comparison(
        [
            folder("a", 0.6),
            folder("b", 0.5, use="rolora", data={"dataset": "sst2"}),
            folder("c", 8.0, use="flora", metric="perplexity"),
            folder("d", 0.9, use="fedsvd", ended=False),
        ]
    )
    assert [g.label for g in made.groups] == ["ffa_lora, dataset tweets"] and len(made.apart) == 3
    assert len(made.notes) == 3 and made.notes[0].startswith("b: measured on other data")
    assert "d: This run has not ended" in made.notes[2]
    assert cells(made, "(rolora, dataset sst2)")["accuracy"] == "0.5000"
    page = made.html()
    assert "not compared" in page and "(fedsvd, dataset tweets)" in page


def test_curves_have_a_band_where_there_are_seeds(folder):
    made = Comparison([folder("a0", 0.60), folder("a1", 0.64, seed=1)])
    spec = made.figures()[0].chart.to_dict()
    rows = spec["datasets"][spec["data"]["name"]]
    assert [r["round"] for r in rows] == [1, 2] and rows[1]["accuracy"] == pytest.approx(0.62)
    assert rows[1]["high"] - rows[1]["accuracy"] == pytest.approx(0.04 / 2**0.5)
    assert rows[1]["megabytes"] == pytest.approx(6.0)


def test_points_have_a_bar_where_there_are_seeds(folder):
    made = Comparison([folder("a0", 0.60), folder("a1", 0.64, seed=1), folder("b", 0.5, use="rolora")])
    spec = made.figures()[-1].chart.to_dict()
    rows = spec["datasets"][spec["data"]["name"]]
    edges = [(row["low"], row["high"]) for row in rows]  # 0.62 less and more 0.04 / sqrt 2
    assert edges == [pytest.approx((0.5917, 0.6483), abs=1e-4), (0.5, 0.5)]


def test_where_figures_are_sent_sets_no_run_apart(folder):
    made = Comparison([folder("a", 0.6), folder("b", 0.7, seed=1, trackers=["tensorboard"])])
    assert [(g.label, len(g.runs)) for g in made.groups] == [("ffa_lora", 2)]


def test_one_folder_named_twice_counts_once(folder):
    run = folder("a", 0.6)
    assert len(Comparison([run, run]).groups[0].runs) == 1


def test_nothing_or_nothing_measured_is_no_crash(folder, tmp_path):
    with pytest.raises(UserError, match="one run folder or more"):
        Comparison([])
    run = folder("a", 0.6)
    (run.folder / "metrics.jsonl").write_text("")
    made = Comparison([Run.open(run.folder), folder("b", 0.5, use="rolora")])
    assert "Nothing was measured yet" in Comparison([Run.open(run.folder)]).html() and made.html()


@pytest.mark.parametrize(
    "form, first", [("text", "configuration"), ("markdown", "| config"), ("latex", "\\begin")]
)
def test_the_command_prints_a_table_and_writes_a_page(folder, tmp_path, capsys, form, first):
    runs = [str(folder("a", 0.6).folder), str(folder("b", 0.5, use="rolora").folder)]
    assert main(["compare", *runs, "--form", form, "--out", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out.startswith(first) and "<figure " in (tmp_path / "c.html").read_text()
    assert main(["compare", runs[0], str(tmp_path / "none"), "--out", str(tmp_path / "d.html")]) == 2
    assert not (tmp_path / "d.html").exists()


def test_where_devices_have_a_clock_the_metric_stands_by_virtual_hours(folder):
    runs = [folder("a", 0.6, clock=3600.0), folder("b", 0.7, use="fedavg_lora", clock=1800.0)]
    made = Comparison(runs)
    assert (
        cells(made, "ffa_lora")["virtual hours"] == "2.00"
        and cells(made, "fedavg_lora")["virtual hours"] == "1.00"
    )
    assert "Accuracy by hour" in [figure.title for figure in made.figures()]
    plain = Comparison([*runs, folder("c", 0.5, use="flora")])
    assert cells(plain, "flora")["virtual hours"] == "-"
    assert "Accuracy by hour" not in [figure.title for figure in plain.figures()]
    page = single.html(runs[0])
    assert "Accuracy by virtual hour" in page and "2.00 h" in page and "2 were late or vanished" in page
