"""The report of a run, as text; `test_browser` looks at it as a person does."""

import json
import re

import pytest

from fedlora.cli import main
from fedlora.reports import single
from fedlora.reports.figures import figures
from fedlora.run import Run


def rows(figure):
    spec = figure.chart.to_dict()
    return spec["datasets"][spec["data"]["name"]]


def all_figures(run):
    return {f.title: f for part in figures(run).values() for f in part}


def test_every_chart_of_a_full_run_is_there_with_the_figures_of_the_folder(ten):
    found = all_figures(ten)
    assert set(found) == {
        "Accuracy by round",
        "Accuracy by megabyte",
        "Confusion of labels",
        "Loss by round",
        "Aggregation error by round",
        "Epsilon by round",
        "Epsilon of each client",
        "Labels of each client",
        "Train loss of each client",
        "Megabytes by round",
        "Time by round",
    }
    total = (ten.summary["bytes_up_total"] + ten.summary["bytes_down_total"]) / 1e6
    assert rows(found["Accuracy by megabyte"])[-1]["megabytes"] == pytest.approx(total)
    share = ten.summary["majority"]
    assert (
        ten.majority == share
        and f"the commonest label, which is {share:.4f} of the test set" in found["Accuracy by round"].note
    )
    for chart in ("Accuracy by round", "Accuracy by megabyte"):
        assert {r["commonest label"] for r in rows(found[chart])} == {share}
        assert [layer["mark"]["type"] for layer in found[chart].chart.to_dict()["layer"]].count("rule") == 1
    epsilon = [r for r in rows(found["Epsilon by round"]) if r["of"] == "largest"]
    assert [r["epsilon"] for r in epsilon] == [line["epsilon"] for line in ten.rounds]
    labels = rows(found["Labels of each client"])
    assert len(labels) == 20 and sum(r["examples"] for r in labels) == sum(
        c["num_examples"] for c in ten.partitions["clients"]
    )
    assert len(rows(found["Train loss of each client"])) == 30
    times = rows(found["Time by round"])
    assert {r["phase"] for r in times} == {"train", "evaluate", "aggregate", "diagnose", "account"}
    for line in ten.rounds:
        spent = sum(r["seconds"] for r in times if r["round"] == line["round"])
        assert spent == pytest.approx(line["seconds"], abs=1e-3)


def test_no_level_is_drawn_where_the_metric_is_no_share_of_right_answers(copy):
    file = copy().folder / "summary.json"
    told = json.loads(file.read_text())
    for said in ({"majority": None}, {"metric": "loss", "majority": 0.5}):
        file.write_text(json.dumps(told | said))
        figure = figures(copy())["learning"][0]
        assert copy().majority is None and "commonest" not in figure.note
        assert all("commonest label" not in row for row in rows(figure))
        assert all(layer["mark"]["type"] != "rule" for layer in figure.chart.to_dict()["layer"])


def test_epsilon_of_a_client_that_rests_stays_what_it_was(copy):
    folder = copy().folder
    lines = [
        {"round": 1, "client": 0, "epsilon": 1.0},
        {"round": 1, "client": 1, "epsilon": 2.0},
        {"round": 2, "client": 0, "epsilon": 1.5},
    ]
    (folder / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_round, each = figures(copy())["privacy"]
    assert [(r["of"], r["epsilon"]) for r in rows(by_round)] == [
        ("largest", 2.0),
        ("median", 1.5),
        ("largest", 2.0),
        ("median", 1.75),
    ]
    assert {(r["client"], r["round"]): r["epsilon"] for r in rows(each)}[1, 2] == 2.0


def test_where_clients_are_protected_whole_epsilon_is_the_rounds(copy):
    folder = copy().folder
    text = (folder / "scenario.yaml").read_text()
    assert "unit: example" in text
    (folder / "scenario.yaml").write_text(text.replace("unit: example", "unit: client"))
    (folder / "clients.jsonl").write_text('{"round": 1, "client": 0, "epsilon": null}\n')
    (figure,) = figures(copy())["privacy"]
    told = [(r["of"], r["epsilon"]) for r in rows(figure)]
    assert told == [("each client", line["epsilon"]) for line in copy().rounds]


def test_the_first_figures_say_whose_epsilon_it_is(copy):
    """Of a whole client it is the same for all, and the server's view has one of its own."""
    told = {name: (value, words) for name, value, words in single._key_figures(copy())}
    assert told["Epsilon"][1] == "at delta 0.001, for each example, the largest over clients"
    assert "Epsilon from the server" not in told
    folder = copy().folder
    text = (folder / "scenario.yaml").read_text().replace("unit: example", "unit: client")
    (folder / "scenario.yaml").write_text(text)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"server_epsilon": 12.5}))
    told = {name: (value, words) for name, value, words in single._key_figures(copy())}
    assert told["Epsilon"][1] == "at delta 0.001, for each client"
    assert told["Epsilon from the server"][0] == "12.50"


def test_of_many_clients_some_are_drawn_and_it_is_said(copy):
    folder = copy().folder
    holders = [{"client": c, "num_examples": 4, "labels": [1, 3]} for c in range(1000)]
    (folder / "partitions.json").write_text(json.dumps({"labels": ["a", "b"], "clients": holders}))
    figure = all_figures(copy())["Labels of each client"]
    shown = {r["client"] for r in rows(figure)}
    assert len(shown) == 59 and "Of 1000 clients 59 are drawn." in figure.note


def test_the_page_is_one_file_that_asks_for_nothing(ten):
    page = single.html(ten)
    marks = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # the library names addresses, and fetches none
    assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["'(]""", marks)
    assert page.count("<figure ") == 11 and page.startswith("<!doctype html>")
    for words in (
        "differential privacy for each example",
        "No client failed.",
        "share_metrics: true",
        "not covered",
    ):
        assert words in page
    assert str(ten.folder) not in page


def test_what_a_folder_holds_is_shown_as_text_and_runs_nowhere(copy):
    folder = copy().folder
    text = (folder / "scenario.yaml").read_text().replace("name: tiny", "name: </script><b>x")
    (folder / "scenario.yaml").write_text(text)
    lines = [json.dumps({"round": 1, "client": 0, "error": "</script><b>x", "epsilon": 1.0}) + "\n"]
    (folder / "clients.jsonl").write_text("".join(lines))
    holders = [{"client": 0, "num_examples": 4, "labels": [4]}]
    (folder / "partitions.json").write_text(json.dumps({"labels": ["</script><b>x"], "clients": holders}))
    assert "</script><b>x" not in single.html(copy())


@pytest.mark.parametrize("gone", ["summary.json", "metrics.jsonl", "clients.jsonl", "partitions.json"])
def test_what_is_missing_is_said_and_the_rest_is_shown(copy, gone):
    run = copy()
    (run.folder / gone).unlink()
    page = single.html(copy())
    assert 'class="notices"' in page or gone == "partitions.json"
    assert page.count("<figure ") >= 2


def test_a_run_that_has_only_begun_has_a_page(copy):
    run = copy()
    for file in run.folder.iterdir():
        if file.name != "scenario.yaml":
            file.rename(run.folder.parent / file.name)
    page = single.html(Run.open(run.folder))
    assert "0 of 3 rounds are recorded" in page and "<figure " not in page and "No round was measured yet" in page


def test_the_command_writes_into_the_folder_or_where_it_is_told(copy, tmp_path, capsys):
    folder = copy().folder
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_round_that_was_kept_is_ringed_and_its_figure_is_the_run_s(copy):
    folder = copy().folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, test, chosen in zip(lines, (0.5, 0.6, 0.7), (0.4, 0.9, 0.8), strict=True):
        line |= {"accuracy": test, "validation_accuracy": chosen, "validation_loss": 1 - chosen}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((folder / "summary.json").read_text()) | {"accuracy": 0.6, "best_round": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = copy()
    found = all_figures(run)["Accuracy by round"]
    told = [(r["set"], r["round"], r["accuracy"]) for r in rows(found)]
    assert told[:3] == [("test", 1, 0.5), ("test", 2, 0.6), ("test", 3, 0.7)]
    assert told[3:] == [("validation", 1, 0.4), ("validation", 2, 0.9), ("validation", 3, 0.8)]
    layers = found.chart.to_dict()["layer"]
    assert [{"filter": "datum.round == 2"}] in [layer.get("transform") for layer in layers]
    assert found.note.endswith("Round 2, ringed, is the one that was kept.")
    losses = [(r["round"], r["loss"]) for r in rows(all_figures(run)["Loss by round"]) if r["set"] == "validation"]
    assert losses == [(1, pytest.approx(0.6)), (2, pytest.approx(0.1)), (3, pytest.approx(0.2))]
    page = single.html(run)
    assert "0.6000" in page and "after round 2, which validation rows chose" in page and "0.7000" not in page


def test_groups_of_clients_are_a_table_of_the_last_round_that_has_them(copy):
    """0 and 3 were together in both rounds in which both were; 1 and 2 in one of two; 4 is alone."""
    run = copy()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for line, groups in zip(lines, [[[0, 3], [1], [2, 4]], [[0, 3], [1, 2], [4]], []], strict=False):
        line["groups"] = groups
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = single.html(copy())
    found = re.search(r"Groups by principal angles, in round 2.*?</table>(.*?)</p>", page, re.S)
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", found[0])
    assert cells[-6:] == ["0, 3", "2", "2 of 2", "1, 2", "2", "1 of 2"]
    assert "1 client of the round went with nobody" in found[0]
    from fedlora.reports.covered import Covered

    assert "principal angles" not in single.html(Covered.of(copy()))


def test_where_no_clients_go_together_there_is_no_table(ten, copy):
    assert "principal angles" not in single.html(ten)
    (run := copy()).folder.joinpath("metrics.jsonl").write_text(
        "".join(json.dumps({**line, "groups": [[0], [1], [2]]}) + "\n" for line in run.rounds)
    )
    assert "principal angles" not in single.html(copy())
