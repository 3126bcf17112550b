"""Diagnostics of a round: by hand, and in a run's record, report and comparison."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from fedlora.adapter import Slot
from fedlora.engine.representations import matrix_nuclear_norm
from fedlora.kinds.lora import Lora
from fedlora.reports.comparison import Comparison
from fedlora.reports.figures import figures
from fedlora.rounds.diagnostics import Diagnostics, effective_rank
from fedlora.simulation import simulate

LAYOUT = {
    s.name: s for s in (Slot("A", (2, 2), "A", "q"), Slot("B", (2, 2), "B", "q"), Slot("h", (2,), "head", "h"))
}


@pytest.mark.parametrize(
    "s, said", [([3, 3], 2), ([5, 0], 1), ([0, 0], 0), ([1, 1, 2], 2**1.5)]
)  # entropy of (1/4, 1/4, 1/2): 3/2 log 2
def test_the_effective_rank_by_hand(s, said):
    assert effective_rank(np.array(s, float)) == pytest.approx(said)


def test_a_round_by_hand():
    """B moves by 3 and 4 under noise of 1 on four numbers: 2 / 5; the head by 6 and 8 under 5: sqrt(50) / 10.

    The change is of one direction, and with what was merged of two alike.
    """
    before = {"B": np.zeros((2, 2), np.float32), "h": np.ones(2, np.float32)}
    mean = {"B": np.array([[3, 0], [4, 0]], np.float32), "h": np.array([7, 9], np.float32)}
    adapter = {**mean, "B": np.array([[1, 0], [0, 0]], np.float32), "A": np.eye(2, dtype=np.float32)}
    made, noise = Diagnostics(layout=LAYOUT, kind=Lora(2, 4.0, ())), {"B": 1.0, "h": 5.0}
    told = made.of(before, mean, adapter, noise)
    assert told["layers"]["q"] == {"effective_rank": pytest.approx(1), "noise_to_signal": pytest.approx(0.4)}
    assert told["layers"]["h"] == {"noise_to_signal": pytest.approx(0.5**0.5)}
    assert told["noise_to_signal"] == pytest.approx((54 / 125) ** 0.5) and told["effective_rank"] == pytest.approx(
        1
    )
    merged = {"q": (np.array([[0.0], [2.0]]), np.array([[0.0, 1.0]]))}  # scaling is 4 / 2
    assert made.of(before, mean, adapter, {}, merged)["effective_rank"] == pytest.approx(2)
    unknown = made.of(before, mean, adapter, {})
    assert unknown["noise_to_signal"] is None and unknown["layers"]["q"].keys() == {"effective_rank"}
    assert made.of(before, before, {**adapter, **before}, noise)["noise_to_signal"] is None


def test_the_nuclear_norm_by_hand():
    """Four tokens along one axis: one column of length 2. Along two axes: two columns of sqrt(2)."""
    one, two = [[1, 0], [-3, 0], [3, 0], [-1, 0]], [[1, 0], [-1, 0], [0, 2], [0, -2]]
    assert matrix_nuclear_norm(np.array(one, np.float32)) == pytest.approx(2 / 4)
    assert matrix_nuclear_norm(np.array(two, np.float32)) == pytest.approx(2 * 2**0.5 / 4)
    assert matrix_nuclear_norm(np.ones((4, 3), np.float32)) == 0


def entropy(states):
    """Of the eigenvalues of the products of unit rows, which is what the nuclear norm stands in for."""
    away = states - states.mean(0)
    rows = away / np.linalg.norm(away, axis=1, keepdims=True)
    shares = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    shares = shares[shares > 1e-12]
    return -(shares * np.log(shares)).sum()


def test_it_ranks_random_matrices_as_their_entropy_does():
    """300 tokens of width 40 whose axes fade by a power, from evenly to all but one."""
    rng, found = np.random.default_rng(0), []
    for power in np.linspace(0, 3, 30):
        states = rng.normal(size=(300, 40)) * np.arange(1, 41) ** -power
        found.append((matrix_nuclear_norm(states), entropy(states)))
    assert spearmanr(*zip(*found, strict=True)).statistic > 0.99


def test_a_run_has_them_in_its_record_report_and_comparison(tiny, tmp_path):
    run = simulate(tiny("diagnostics=true", "rounds=3", "eval_every=3"), out=tmp_path / "run")
    plain = simulate(tiny("rounds=3", "eval_every=3"), out=tmp_path / "plain")
    assert run.summary["loss"] == plain.summary["loss"] and run.summary["epsilon"] == plain.summary["epsilon"]
    for line in run.rounds:
        assert 1 <= line["effective_rank"] <= 4 and 0 < line["noise_to_signal"] < 1.5
        assert len(line["layers"]) == 5 and all(t["noise_to_signal"] > 0 for t in line["layers"].values())
    assert 0 < run.rounds[-1]["nuclear_norm"] <= 32**0.5 and "nuclear_norm" not in run.rounds[0]
    assert "layers" not in plain.rounds[0] and "nuclear_norm" not in plain.rounds[-1]
    drawn = {figure.title for figure in figures(run)["learning"]}
    assert {"Effective rank by layer", "Noise to signal by layer"} < drawn
    columns = ("effective_rank", "noise_to_signal", "nuclear_norm")
    assert Comparison([run]).table().head[-3:] == columns
    both = Comparison([plain, run])
    assert not {*columns} & {*both.table().head} and len(both.groups) == 1  # no other configuration


def test_where_the_noise_is_not_known_it_is_null_and_a_line_says_why(tiny, tmp_path, caplog):
    told = ("diagnostics=true", "clients.optimizer=adamw", "clients.lr=0.01", "rounds=1")
    run = simulate(tiny(*told), out=tmp_path / "run")
    assert run.rounds[0]["noise_to_signal"] is None and run.rounds[0]["effective_rank"] >= 1
    assert "noise_to_signal is null: clients.optimizer" in caplog.text
