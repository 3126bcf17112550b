"""The page of how training begins is what its data say."""

import csv
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from fedlora import scenario, sweep

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "docs" / "beginnings").glob("*.csv"))


@pytest.fixture(scope="module")
def beginnings():
    made = spec_from_file_location("beginnings", ROOT / "benchmarks" / "beginnings.py")
    made.loader.exec_module(module := module_from_spec(made))
    return module


def cell(**rates):
    """Runs by learning rate, from the accuracy of each seed."""
    return {
        (float(rate[1:]),): {str(seed): {"accuracy": str(value)} for seed, value in enumerate(values)}
        for rate, values in rates.items()
    }


def test_a_rate_is_chosen_by_the_other_seeds_and_judged_on_this_one(beginnings):
    """Rate 1 has mean 0.7, rate 2 0.667. Without seed 0 rate 2 is better, without 1 or 2 rate 1 is."""
    runs = cell(r1=[0.9, 0.6, 0.6], r2=[0.5, 0.8, 0.7])
    assert beginnings.best(runs) == (1,) and beginnings.best(runs, but="0") == (2,)
    assert beginnings.blind(runs) == [0.5, 0.6, 0.6]
    assert beginnings.blind(cell(r1=[0.9])) == []  # one seed has no others


def test_of_equal_rates_the_lower_is_taken(beginnings):
    assert beginnings.best(cell(r4=[0.5], r2=[0.5])) == (2,)


def test_where_alpha_is_tuned_it_is_chosen_with_the_rate(beginnings, tmp_path, monkeypatch):
    """Alpha 2 at rate 4 has mean 0.75, the best. Seed 0 chooses alpha 8 at rate 2: seed 1 has 0.5."""
    (tmp_path / "beginnings").mkdir()
    rows = ["2,4,0,0.6", "2,4,1,0.9", "8,2,0,0.8", "8,2,1,0.5", "8,4,0,0.1", "8,4,1,0.1"]
    (tmp_path / "beginnings" / "tuned.csv").write_text(
        "hash,alpha,lr,seed,accuracy,strategy,loss,bytes_up\n"
        + "".join(f"x,{row},ffa_lora,0.5,1e6\n" for row in rows)
    )
    monkeypatch.setattr(beginnings, "DOCS", tmp_path)
    keys, cells = beginnings.read("tuned")
    (only,) = cells.values()
    assert keys == ["strategy"] and beginnings.best(only) == (4, 2) and beginnings.blind(only) == [0.6, 0.5]
    assert beginnings.table("tuned").markdown().splitlines()[0] == (
        "| strategy | best lr | best alpha | accuracy at it | blind | loss | MB up | seeds "
        "| lr 2, alpha 8 | lr 4, alpha 2 | lr 4, alpha 8 |"
    )


def test_what_follows_from_another_setting_is_no_column(beginnings, tmp_path, monkeypatch):
    (tmp_path / "beginnings").mkdir()
    (tmp_path / "beginnings" / "rank.csv").write_text(
        "hash,seed,r,alpha,strategy,lr,accuracy\na,0,2,2,ffa_lora,1,0.5\nb,0,8,8,ffa_lora,1,0.6\n"
    )
    monkeypatch.setattr(beginnings, "DOCS", tmp_path)
    keys, cells = beginnings.read("rank")
    assert keys == ["r", "strategy"] and list(cells) == [("2", "ffa_lora"), ("8", "ffa_lora")]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_the_page_has_the_table_that_the_data_make(beginnings, file):
    assert beginnings.table(file.stem).markdown() in (ROOT / "docs" / "beginnings.md").read_text()
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert all(float(row["accuracy"]) <= 1 and row["hash"] for row in rows)
    assert len({row["hash"] for row in rows}) == len(rows)


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_what_was_run_is_what_the_sweep_asks_for(file):
    """Every run of the data is a point of the sweep that ships."""
    asked = sweep.load(f"paper/{file.stem}")
    points = [sweep.spread_out(point) for point in asked.points()]
    known = {(p["seed"], p["clients.lr"], p["strategy.use"]) for p in points}
    for row in csv.DictReader(file.read_text().splitlines()):
        assert (int(row["seed"]), float(row["lr"]), row["strategy"]) in known


def test_every_sweep_of_the_paper_is_on_the_page():
    page = (ROOT / "docs" / "beginnings.md").read_text()
    names = [n.removeprefix("paper/") for n in scenario.shipped(scenario.SWEEPS) if n.startswith("paper/")]
    assert len(names) > 5 and all(f"`{name}`" in page or f"beginnings.py {name}" in page for name in names)
