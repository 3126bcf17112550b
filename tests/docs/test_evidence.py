"""The page of evidence is what its data say."""

import csv
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from fedlora import scenario, sweep

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "docs" / "evidence").glob("*.csv"))
HEAD = "hash,baseline,strategy,kind,r,noise,lr,epsilon,seed,accuracy,loss,bytes_up\n"


@pytest.fixture(scope="module")
def evidence():
    made = spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    made.loader.exec_module(module := module_from_spec(made))
    return module


@pytest.fixture
def study(evidence, tmp_path, monkeypatch):
    """Two methods at two epsilons, two seeds each; of the second one run more, without privacy."""
    (tmp_path / "evidence").mkdir()
    told = {"ffa_lora": (0.80, 0.82, 0.70, 0.74), "fedavg_lora": (0.81, 0.84, 0.73, 0.78)}
    rows = [
        f"x,none,{use},auto,8,independent,0.03,{epsilon},{seed},{value},0.5,{size}\n"
        for (use, values), size in zip(told.items(), (1e6, 2e6), strict=True)
        for (epsilon, seed), value in zip(((6, 1), (6, 2), (1, 1), (1, 2)), values, strict=True)
    ]
    rows.append("x,none,fedavg_lora,auto,8,independent,0.03,none,1,0.9,0.25,2e6\n")
    (tmp_path / "evidence" / "small.csv").write_text(HEAD + "".join(rows))
    monkeypatch.setattr(evidence, "DOCS", tmp_path)
    return evidence


def test_a_table_has_a_row_for_each_method_and_a_column_for_each_epsilon(study):
    """Means 0.81 and 0.72; spreads 0.02 / sqrt 2 and 0.04 / sqrt 2."""
    assert study.table("small").markdown().splitlines() == [
        "| strategy | epsilon 6 | epsilon 1 | epsilon none | MB up | seeds |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| FFA-LoRA | 0.8100 ± 0.0141 (0.50) | 0.7200 ± 0.0283 (0.50) | - | 1.00 | 2 |",
        "| LoRA | 0.8250 ± 0.0212 (0.50) | 0.7550 ± 0.0354 (0.50) | 0.9000 (0.25) | 2.00 | 2 |",
    ]


def test_differences_are_paired_over_private_epsilons_and_seeds(study):
    """Of 0.01 to 0.04: s 0.01291, t = 0.025 / (s / 2) = 3.87, p = 0.0305; 3.18 s / 2 = 0.0205."""
    assert study.differences("small").rows == [
        ["LoRA", "FFA-LoRA", "+0.0250", "+0.0045 to +0.0455", "4 of 4", "0.03"],
    ]


def test_where_the_learning_rate_varies_the_columns_are_its_values(study, tmp_path):
    file = tmp_path / "evidence" / "small.csv"
    row = "x,none,ffa_lora,auto,8,independent,{},3,0,0.8,0.5,1e6\n"
    file.write_text(HEAD + row.format(0.1) + row.format(0.03))
    assert study.table("small").head == ["lr 0.03", "lr 0.1", "MB up", "seeds"]
    assert study.differences("small").rows == []


def test_noise_that_cancels_is_compared_with_the_same_method(evidence):
    keys = ["strategy", "noise"]
    assert evidence._reference(keys, ("rolora", "bands")) == ("rolora", "independent")
    assert evidence._reference(["kind", "r"], ("core", "9")) == ("lora", "8")
    keys = ["strategy", "r", "alpha", "local steps", "partition"]
    assert evidence._reference(keys, ("rolora", "2", "2", "4", "iid")) == ("rolora", "8", "8", "1", "label_shares")


def test_p_values_are_corrected_as_holm_does(evidence):
    """0.01 x 3, then 0.02 x 2, then 0.5; none below one before it, none above 1."""
    assert evidence.holm([0.5, 0.01, 0.02]) == [0.5, 0.03, 0.04]
    assert evidence.holm([0.03, 0.02]) == [0.04, 0.04] and evidence.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_front_is_what_nothing_beats_at_its_bytes(study):
    chart = study.figures("small")["small"].to_dict()
    points = {(p["name"], p["of"]): p["front"] for p in chart["data"]["values"]}
    assert points == {
        ("FFA-LoRA", "epsilon 6"): True,
        ("FFA-LoRA", "epsilon 1"): True,
        ("LoRA", "epsilon 6"): True,
        ("LoRA", "epsilon 1"): True,
        ("LoRA", "epsilon none"): True,
    }


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_the_page_has_what_the_data_make(evidence, file):
    assert evidence.made(file.stem) in (ROOT / "docs" / "evidence.md").read_text()
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert len({row["hash"] for row in rows}) == len(rows)


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_what_was_run_is_what_the_sweep_asks_for(evidence, file):
    """Every run of the data is a point of the sweep that ships."""
    asked = sweep.load(f"trained/{file.stem}")
    told = ("baseline", "strategy", "kind", "r", "noise", "lr", "epsilon", "seed")
    known = {tuple(evidence.asked(asked.run(point))[key] for key in told) for point in asked.points()}
    for row in csv.DictReader(file.read_text().splitlines()):
        assert tuple(row[key] for key in told) in known


def test_every_study_is_on_the_page():
    page = (ROOT / "docs" / "evidence.md").read_text()
    names = [n.removeprefix("trained/") for n in scenario.shipped(scenario.SWEEPS) if n.startswith("trained/")]
    assert len(names) > 3 and all(f"evidence.py {name}" in page for name in names)
