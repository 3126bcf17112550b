"""The search of a learning rate, its runs in this process; on Ray Tune they run as those of a sweep."""

import gc
import json
import re

import pytest

from fedlora import scenario, tuning
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import accounting
from fedlora.reports.verdicts import Verdict
from fedlora.run import Run
from fedlora.simulation import simulate
from fedlora.tuning import Trial, rate_key, tune

WORDS = {"good": ("fine", "lovely", "great"), "bad": ("awful", "poor", "sad")}


def write(file, count=200, head="text,label", other="bad"):
    """Rows of the kind of the clients' own, none of which is theirs."""
    rows = [
        f"public {i} has {WORDS[('good', 'bad')[i % 2]][i % 3]} views,{('good', other)[i % 2]}"
        for i in range(count)
    ]
    file.write_text("\n".join([head, *rows]) + "\n")
    return file


@pytest.fixture
def here(tmp_path, tiny_yaml, monkeypatch):
    """A folder to work in, with a scenario and public rows; runs go one after another in this process."""
    (tmp_path / "mine.yaml").write_text(
        tiny_yaml.replace("lr: 0.5", "lr: 0.5  # a guess\n ").replace("rounds: 2", "rounds: 4")
    )
    write(tmp_path / "public.csv")
    monkeypatch.chdir(tmp_path)

    def explore(asked, folder, told):
        found = []
        for point in asked.points():
            made = asked.run(point)
            place = folder / "runs" / f"{made.name}-{made.hash}"
            if not place.exists():
                simulate(made, out=place)
            told(f"1  {point}: accuracy 0.5")
            found.append((place, None))
        return found

    monkeypatch.setattr(tuning, "explore", explore)
    return tmp_path


@pytest.fixture
def figures(monkeypatch):
    """Makes runs end with a value by the factor of their rate, from 60 rows of which half have a label."""

    def say(values):
        made = {}

        def trial(self, factor, place, failed):
            value = values.get(round(factor, 4))
            made[factor] = Trial(factor=factor, rate=tuning._times(self.base, factor), value=value, loss=0.5)
            return made[factor]

        monkeypatch.setattr(tuning._Search, "_trial", trial)
        monkeypatch.setattr(
            tuning, "explore", lambda asked, folder, told: [(folder, None) for _ in asked.points()]
        )
        return made

    return say


def test_on_public_rows_the_search_sees_no_private_row_and_has_the_noise_of_the_run(here, reviews):
    said = []
    made = tune("mine.yaml", public="public.csv", told=said.append)
    assert said[0] == "on public rows: no epsilon is spent" == made.costs[0] and made.epsilon_total == {}
    runs = [Run.open(file.parent) for file in made.folder.glob("runs/*/scenario.yaml")]
    assert len(runs) == len(made.trials) in (5, 7)
    ready = prepare(scenario.load("mine.yaml"))
    median = sorted(ready.data.num_examples(client) for client in range(4))[
        2
    ]  # the higher of the two in the middle
    noise = calibrate(ready.scenario, ready.data)[median]
    for run in runs:
        assert str(reviews) not in (run.folder / "scenario.yaml").read_text()
        assert run.scenario["data"]["files"]["train"] == "public.csv"
        assert run.scenario["privacy"]["noise_multiplier"] == noise and run.scenario["privacy"]["epsilon"] is None
        assert run.scenario["rounds"] == 1 and run.scenario["clients"]["batch_size"] == 8
        assert run.scenario["data"]["partition"] == {"kind": "sampled", "examples": median, "seed": None}
    assert [t.rate for t in made.trials if t.factor <= 9 and t.factor >= 0.1] == [0.0556, 0.167, 0.5, 1.5, 4.5]
    told = json.loads((made.folder / "tuning.json").read_text())
    assert told["key"] == "clients.lr" and [t["rate"] for t in told["trials"]] == [t.rate for t in made.trials]


def test_the_scenario_that_is_written_is_the_users_own_with_one_number_changed(here, figures, capsys):
    figures({0.1111: 0.5, 0.3333: 0.6, 1.0: 0.7, 3.0: 0.9, 9.0: 0.8})
    assert main(["tune", "mine.yaml", "--public", "public.csv"]) == 0
    before, after = (here / "mine.yaml").read_text(), (here / "mine.tuned.yaml").read_text()
    assert after == before.replace("lr: 0.5  # a guess", "lr: 1.5  # a guess")
    told = capsys.readouterr().out
    assert "best: clients.lr 1.5\nscenario: mine.tuned.yaml\n" in told and re.search(
        r"1\.5 +0\.9000 +0\.5000 +best", told
    )
    assert main(["tune", "mine.yaml", "--public", "public.csv"]) == 2
    assert capsys.readouterr().err == "mine.tuned.yaml: is there already; name another file with --out\n"


def test_other_rows_under_the_same_name_are_searched_anew(here, figures):
    figures({1.0: 0.5})
    first = tune("mine.yaml", public="public.csv", out="one.yaml").folder
    assert tune("mine.yaml", public="public.csv", out="two.yaml").folder == first
    lines = (here / "public.csv").read_text().splitlines()
    (here / "public.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert tune("mine.yaml", public="public.csv", out="three.yaml").folder != first


def test_with_overrides_all_of_the_scenario_is_written(here, figures):
    figures({1.0: 0.7, 3.0: 0.9, 9.0: 0.8})
    made = tune("mine.yaml", public="public.csv", overrides=["clients.batch_size=4"], out="other.yaml")
    found = scenario.load(made.file)
    assert (found.clients.lr, found.clients.batch_size, found.data.public) == (1.5, 4, None)
    assert found.hash == scenario.load("mine.yaml", ["clients.batch_size=4", "clients.lr=1.5"]).hash


@pytest.mark.parametrize(
    "values, tried, best",
    [
        ({1.0: 0.7, 3.0: 0.8, 9.0: 0.9, 27.0: 0.95, 81.0: 0.5}, 7, 13.5),
        ({0.1111: 0.9, 0.3333: 0.8, 0.037: 0.7, 0.0123: 0.6}, 7, 0.0556),
        ({0.3333: 0.9, 1.0: 0.9}, 5, 0.167),  # equals of equal loss: the first
    ],
)
def test_where_the_best_is_at_an_edge_the_search_goes_on_there_once(here, figures, values, tried, best):
    figures(values)
    made = tune("mine.yaml", public="public.csv")
    assert len(made.trials) == tried and made.best.rate == best
    assert [t.factor for t in made.trials] == sorted(t.factor for t in made.trials)


def test_rates_by_role_move_together_and_a_servers_rate_moves_things(here, tiny):
    assert rate_key(tiny()) == ("clients.lr", 0.5)
    assert tuning._times({"B": 0.1, "head": 0.02}, 3) == {"B": 0.3, "head": 0.06}
    key, rate = rate_key(tiny("strategy.server={kind: adam, lr: {B: 0.01, head: 0.02}}"))
    assert (key, rate) == ("strategy.server.lr", {"B": 0.01, "head": 0.02})
    assert tuning._times(0.1, 1 / 3) == 0.0333


def test_on_private_rows_all_that_it_costs_is_told_before_and_after(here, capsys):
    """What is foretold is what the ledgers then hold: every client is in every round."""
    shared = ["--set", "data.validation_share=0.5", "--set", "data.test_share=0.4"]
    assert main(["tune", "mine.yaml", "--private", *shared]) in (0, 1)
    told = capsys.readouterr()
    (folder,) = (here / "tunings").iterdir()
    kept = json.loads((folder / "tuning.json").read_text())
    runs = [Run.open(file.parent) for file in folder.glob("runs/*/scenario.yaml")]
    events = [
        [
            accounting.Event(
                noise_multiplier=line["noise_multiplier"], sample_rate=line["sample_rate"], steps=2, clip_norm=1
            )
        ]
        for line in map(json.loads, (runs[0].folder / "privacy.jsonl").read_text().splitlines())
    ]
    total = accounting.epsilon_of_runs([events] * len(runs), 1e-3)
    assert kept["epsilon_total"]["example"] == pytest.approx(total)
    foretold = re.search(r"5 runs will cost each example epsilon ([\d.]+) together, and ([\d.]+) if", told.err)
    assert float(foretold[1 if len(runs) == 5 else 2]) == pytest.approx(total, rel=0.01)
    assert f"{len(runs)} runs together give ({total:.3g}, 0.001)-differential privacy" in told.out
    assert "accuracy" not in told.err  # of rows that report
    whole = prepare(scenario.load("mine.yaml", shared[1::2]))
    noise = calibrate(whole.scenario, whole.data)
    assert max(e[0].noise_multiplier for e in events) == pytest.approx(max(noise.values()), rel=0.02)
    line = runs[0].rounds[-1]
    rates = [t["rate"] for t in kept["trials"]]
    found = kept["trials"][rates.index(runs[0].scenario["clients"]["lr"])]
    assert (found["value"], found["loss"]) == (line["validation_accuracy"], line["validation_loss"])


def test_under_clients_as_the_unit_the_server_has_the_noise_of_the_run(here, tiny):
    whole = "privacy={unit: client, epsilon: 8, delta: 1.0e-2}"
    overrides = [whole, "clients.use=sgd", "clients.per_round=2", "data.validation_share=0.5"]
    search = tuning._Search(scenario.load("mine.yaml", overrides), True, print)
    noise = accounting.calibrate(8, 1e-2, 0.5, 4)
    assert search.short.privacy.noise_multiplier == noise and search.short.privacy.epsilon is None
    event = accounting.Event(noise_multiplier=noise, sample_rate=0.5, steps=1, clip_norm=1.0)
    five = accounting.epsilon_of_runs([[[event]]] * 5, 1e-2)
    assert f"5 runs will cost each client epsilon {five:.3g} together" in search._foretold()[0]


def test_where_none_learns_nothing_is_written_and_a_setting_to_try_is_named(here, monkeypatch, capsys):
    def trial(self, factor, place, failed):
        wrong = [Verdict("majority", "no better than the commonest label", "a larger clients.batch_size (now 8)")]
        return Trial(factor=factor, rate=factor, value=0.5, loss=0.7, verdicts=wrong)

    monkeypatch.setattr(tuning._Search, "_trial", trial)
    assert main(["tune", "mine.yaml", "--public", "public.csv"]) == 1
    told = capsys.readouterr().out
    assert told.count("has not learnt") == 5 and told.endswith(
        "none has learnt, and no scenario is written: no better than the commonest label; try a larger "
        "clients.batch_size (now 8)\n"
    )
    assert not (here / "mine.tuned.yaml").exists()


def test_a_run_that_has_not_learnt_or_failed_is_never_chosen(here):
    search = tuning._Search(scenario.load("mine.yaml", ["data.public={files: {train: public.csv}}"]), False, print)
    stuck = Trial(factor=1.0, rate=0.5, value=0.9, loss=0.1, verdicts=[Verdict("majority", "no better", "x")])
    failed = Trial(factor=3.0, rate=1.5, failed="gone")
    worse = Trial(factor=9.0, rate=4.5, value=0.6, loss=0.4, verdicts=[Verdict("rising", "rose", "y")])
    better = Trial(factor=27.0, rate=13.5, value=0.6, loss=0.3)
    assert search._best([stuck, failed, worse]) is worse and search._best([worse, better]) is better
    assert search._best([stuck, failed]) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's processes outlive the objects that stand for them
def test_on_ray_tune_it_goes_on_where_it_was(tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(tiny_yaml)
    write(tmp_path / "public.csv")
    said = []
    made = tune("mine.yaml", public="public.csv", out="one.yaml", told=said.append)
    assert len(said) == 1 + len(made.trials) and all("accuracy 0." in line for line in said[1:])
    before = {file: file.stat().st_mtime_ns for file in made.folder.glob("runs/*/summary.json")}
    again = tune("mine.yaml", public="public.csv", out="two.yaml")
    assert {file: file.stat().st_mtime_ns for file in made.folder.glob("runs/*/summary.json")} == before
    assert (again.trials, again.best) == (made.trials, made.best) and len(before) == len(made.trials)
    gc.collect()  # while its warnings are still let pass


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            [],
            "mine.yaml: tune needs rows to search on: name public ones, by  data: {public: {files: {train: ",
        ),
        (["--private"], "data: what chooses must not be what reports: set data.validation_share"),
        (["--public", "tweet"], "--public tweet: no such file, and no dataset of that name: did you mean"),
        (["--public", "none.csv"], "--public none.csv: no such file, and no dataset of that name: "),
        (["--public", "others.csv"], "data.public.files.text: others.csv has no column 'text': "),
        (
            ["--public", "strange.csv"],
            "data.public: its rows have labels beside the clients' own ['bad', 'good']: ['ugly']",
        ),
        (["--public", "few.csv"], "data.public: 5 rows to train on, and a step takes 8 on average: name more"),
        (["--public", "REVIEWS"], "data.public: these are the clients' own rows"),
        (
            ["--public", "public.csv", "--set", "data.files.test=public.csv"],
            "data.public: what chooses must not be",
        ),
        (["--public", "public.csv", "--out", "gone/x.yaml"], "gone/x.yaml: its folder does not exist"),
    ],
)
def test_slips_are_one_line_before_anything_is_written(here, reviews, arguments, line, capsys):
    write(here / "others.csv", head="sentence,label")
    write(here / "strange.csv", other="ugly")
    write(here / "few.csv", count=6)
    before = sorted(here.iterdir())
    assert main(["tune", "mine.yaml", *(a.replace("REVIEWS", str(reviews)) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert line in told and len(told.splitlines()) == 1
    assert sorted(here.iterdir()) == before


def test_private_rows_and_a_model_for_each_client_are_refused(here):
    personal = ["strategy.use=fedsa_lora", "data.client_test_share=0.2"]
    with pytest.raises(UserError, match="a model for each client, which no validation row judges"):
        tune("mine.yaml", private=True, overrides=personal)


def test_a_model_for_each_client_is_searched_on_public_rows_that_each_holds_out(here):
    personal = ["strategy.use=fedsa_lora", "data.client_test_share=0.2", "rounds=1", "clients.batch_size=4"]
    made = tune("mine.yaml", public="public.csv", overrides=personal)
    (run, *_) = [Run.open(file.parent) for file in made.folder.glob("runs/*/scenario.yaml")]
    data = prepare(scenario.load("mine.yaml", personal)).data
    sizes = sorted(data.num_examples(client) for client in range(4))
    assert run.scenario["data"]["partition"]["examples"] == round(sizes[2] / 0.8)
    assert all(trial.failed is None and trial.value is not None for trial in made.trials)


def test_a_share_of_the_examples_is_the_median_clients_batch_on_public_rows(here):
    named = ["data.public={files: {train: public.csv}}", "clients.sample_rate=0.25"]
    short = tuning._Search(scenario.load("mine.yaml", named), False, print).short
    held = short.data.partition.examples
    assert (short.clients.batch_size, short.clients.sample_rate) == (round(held / 4), None)


def test_check_reads_public_rows_too(here, capsys):
    write(here / "others.csv", head="sentence,label")
    assert main(["check", "mine.yaml", "--set", "data.public={files: {train: others.csv}}"]) == 2
    assert "data.public.files.text: others.csv has no column 'text'" in capsys.readouterr().err
    assert main(["check", "mine.yaml", "--set", "data.public={files: {train: public.csv}}"]) == 0


def test_a_public_source_has_the_columns_of_the_clients_own_where_it_names_none(tiny):
    named = "data.files={train: a.csv, text: question, label: kind, columns: [question, kind]}"
    made = tiny(named, "data.public={files: {train: b.csv, label: sort}}").data.public.files
    assert (made.text, made.label, made.columns) == ("question", "sort", ("question", "kind"))


@pytest.mark.parametrize(
    "text, path, value, after",
    [
        ("a:\n  b: 1 # x\nc: 2\n", "a.b", 3.0, "a:\n  b: 3.0 # x\nc: 2\n"),
        ("a: {b: 1, c: 2} # x\n", "a.b", 1e-05, "a: {b: 1.0e-05, c: 2} # x\n"),
        ("a:\n  c: 2 # x\n", "a.b", 0.5, "a:\n  b: 0.5\n  c: 2 # x\n"),
        ("a: {c: 2}\n", "a.b", 0.5, "a: {b: 0.5, c: 2}\n"),
        ("a: {b: {x: 1, y: 2}}\n", "a.b", {"x": 0.1}, "a: {b: {x: 0.1}}\n"),
    ],
)
def test_one_key_of_yaml_is_edited_and_all_else_stays(text, path, value, after):
    assert scenario.edited(text, path.split("."), value) == after


@pytest.mark.parametrize("name", scenario.shipped())
def test_a_shipped_scenario_keeps_its_comments_and_is_written_here(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key, rate = rate_key(scenario.load(name))
    text = scenario.find(name).read_text()
    file = tuning._write(tuning._beside(name), name, [], key, tuning._times(rate, 3))
    assert file.resolve().parent == tmp_path and rate_key(scenario.load(file)) == (key, tuning._times(rate, 3))
    before, after = text.splitlines(), file.read_text().splitlines()
    assert len(set(after) - set(before)) == 1 and file.read_text().count("#") == text.count("#")


@pytest.mark.parametrize("text", ["a: 1\n", "c: {b: 1}\n", "a:\n  b:\n    x: 1\n  c: 2\n"])
def test_what_cannot_be_edited_in_place_is_said(text):
    with pytest.raises(LookupError):
        scenario.edited(text, ["a", "b"], 1)


def test_what_is_proposed_where_rows_are_missing_can_be_read(tiny_yaml, tmp_path):
    import re

    import yaml

    (file := tmp_path / "s.yaml").write_text(tiny_yaml)
    with pytest.raises(UserError) as raised:
        tune(file)
    (proposed,) = re.findall(r"by  (data: .*?)  or", str(raised.value))
    assert yaml.safe_load(proposed) == {"data": {"public": {"files": {"train": "rows.csv"}}}}
