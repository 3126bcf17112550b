"""The page for others: what epsilon means, in numbers to check by hand, and nothing that it does not cover."""

import json
import math
import re

import pytest

from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.reports import meaning, single
from fedlora.reports.covered import Covered


@pytest.fixture
def told(copy):
    """A private run in which each fact that epsilon does not cover can be found again in a page."""
    folder = copy().folder
    text = (folder / "scenario.yaml").read_text()
    (folder / "scenario.yaml").write_text(re.sub(r"^seed: .*", "seed: 918273", text, flags=re.M))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"failures": 70707, "seed": 918273, "bytes_up_total": 80808}
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("metrics.jsonl", "clients.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            line |= {"train_loss": 60606.5, "bytes_up": 50505, "seconds": 40404.5, "local_accuracy": 0.30303}
            line |= {"failures": 20202} if name == "metrics.jsonl" else {"num_examples": 10101, "error": "E90909"}
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    holders = [{"client": 0, "name": "N12121", "num_examples": 13131, "labels": [14141, 15151]}]
    (folder / "partitions.json").write_text(json.dumps({"labels": ["L16161", "L17171"], "clients": holders}))
    return copy


SECRET = "918273|70707|80808|60606|50505|40404|30303|20202|10101|90909|12121|13131|14141|15151|16161|17171"


def charts(page):
    return json.loads(
        re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S).group(1)
    )


def test_what_epsilon_does_not_cover_is_in_the_whole_page_and_not_in_the_one_to_share(told):
    whole, shared = (
        re.sub(r"<script>.*?</script>|(?<=\d),(?=\d{3})", "", single.html(r), flags=re.S)
        for r in (told(), Covered.of(told()))
    )
    assert len(set(re.findall(SECRET, whole))) >= 10 and not re.findall(SECRET, shared)
    assert "reviews.csv" in whole and "reviews.csv" not in shared and "seed:" not in shared
    assert {chart["title"] for chart in charts(shared).values()} == {
        "Accuracy by round",
        "Loss by round",
        "Epsilon by round",
    }
    assert "left out of this page" in shared and "--share writes" in whole
    assert "fedlora report --share leaves it out" in whole and "Who took part" not in shared


def test_every_column_of_a_shared_chart_is_of_test_rows_or_of_epsilon(told):
    columns = set()
    for chart in charts(single.html(Covered.of(told()))).values():
        for rows in chart["spec"]["datasets"].values():
            columns |= {key for row in rows for key in row}
    assert columns == {"round", "accuracy", "loss", "set", "commonest label", "epsilon", "of"}


def test_where_clients_judge_themselves_no_figure_is_shown(copy):
    folder = copy().folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"local_accuracy": line["accuracy"], "accuracy": line["accuracy"]} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Covered.of(copy())
    assert [set(line) for line in found.rounds] == [{"round", "epsilon"}] * 3
    assert found.measured("accuracy") is None and "accuracy" not in found.summary
    assert "No round was measured yet" in single.html(found)


def test_the_command_writes_it_and_refuses_a_run_without_privacy(copy, tmp_path, capsys):
    folder = copy().folder
    assert main(["report", str(folder), "--share"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "share.html")
    text = (folder / "scenario.yaml").read_text()
    (folder / "scenario.yaml").write_text(re.sub(r"^privacy:\n(  .*\n)+", "privacy: null\n", text, flags=re.M))
    assert main(["report", str(folder), "--share", "--out", str(tmp_path / "x.html")]) == 2
    assert "has no privacy, so epsilon covers nothing of it" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(UserError, match="leave --share out"):
        copy().report(share=True)


@pytest.mark.parametrize(
    "epsilon, said", [(0.0, "1"), (1.0, "2.7"), (math.log(55), "55"), (8.0, "2,981"), (20.0, "10^8.7")]
)
def test_a_factor_is_exp_of_epsilon(epsilon, said):
    assert meaning.factor(epsilon) == said


def test_the_words_are_of_the_unit(copy):
    page = single.html(copy())
    epsilon = copy().summary["epsilon"]
    assert (
        f"at odds at most exp({epsilon:.2f}) = {math.exp(epsilon):,.0f} times" in page and "delta = 0.001" in page
    )
    assert "knows all other rows" in page and "that number is public" in page and "privacy.share_metrics" in page
    folder = copy().folder
    text = (folder / "scenario.yaml").read_text().replace("unit: example", "unit: client")
    (folder / "scenario.yaml").write_text(text)
    page = single.html(copy())
    assert "against everyone but the server;" in page and "that number is public" not in page


def test_without_a_bound_no_number_is_named(copy):
    folder = copy().folder
    lines = [json.loads(line) | {"epsilon": None} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((folder / "summary.json").read_text()) | {"epsilon": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    said = " ".join(meaning.explained(copy()))
    assert "No epsilon holds: nothing bounds how surely what was sent can tell" in said and "exp(" not in said


def test_advice_to_run_again_says_that_it_spends_again(copy):
    folder = copy().folder
    summary = json.loads((folder / "summary.json").read_text()) | {"majority": 0.9999}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert copy().remarks()[-1] == (
        "Another run on the same private rows spends its epsilon too, and the two add up."
    )
    text = (folder / "scenario.yaml").read_text()
    (folder / "scenario.yaml").write_text(re.sub(r"^privacy:\n(  .*\n)+", "privacy: null\n", text, flags=re.M))
    assert copy().verdicts() and "spends" not in " ".join(copy().remarks())
