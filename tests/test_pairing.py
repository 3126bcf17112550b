"""The best of many texts for each of many others, from a few scores."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import predict, simulate
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.pairing import all_pairs, asked_for, search


def scored(matrix):
    asked = []

    def score(rows, columns):
        asked.extend(zip(rows.tolist(), columns.tolist(), strict=True))
        return matrix[rows, columns]

    return score, asked


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_matrix_of_low_rank_is_searched_without_loss(seed, rank, top):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 80))
    score, asked = scored(matrix)
    found = search(score, matrix.shape, top, 8, 5, seed)
    true = np.sort(matrix, axis=1)[:, ::-1][:, :top]
    assert found.scores == pytest.approx(true) and found.recall == 1 and found.checked == 5
    assert found.scored == len(asked) == asked_for(matrix.shape, top, 8, 5) < found.pairs == 4800
    assert (np.take_along_axis(matrix, found.best, 1) == found.scores).all()


def test_what_is_as_dear_as_all_is_all():
    matrix = np.random.default_rng(0).normal(size=(6, 7))
    score, asked = scored(matrix)
    found = search(score, matrix.shape, 3, 50, 10, 0)
    assert len(asked) == found.scored == asked_for((6, 7), 3, 50, 10) == 42 and found.recall is None
    assert (found.best == np.argsort(-matrix, axis=1)[:, :3]).all()


def test_noise_costs_recall_and_is_said_so():
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 300)) + 2.0 * rng.normal(size=(200, 300))
    found = search(scored(matrix)[0], matrix.shape, 10, 10, 50, 0)
    true = [set(np.argsort(-row)[:10]) for row in matrix]
    all_of_it = np.mean([len(t & set(b)) / 10 for t, b in zip(true, found.best, strict=True)])
    assert 0.05 < found.recall < 0.95 and found.recall == pytest.approx(all_of_it, abs=0.1)


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    """A run that judges pairs, and files of 30 left and 40 right texts."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [[f"note {i % 9}", f"film {i % 7} was great", "yes" if i % 9 == i % 7 else "no"] for i in range(60)]
    with (folder / "x.csv").open("w") as stream:
        csv.writer(stream).writerows([["one", "other", "same"], *rows])
    told = f"data.files={{train: {folder / 'x.csv'}, text: [one, other], label: same}}"
    (folder / "left.txt").write_text("\n".join(f"note {i}" for i in range(30)))
    (folder / "right.csv").write_text("\n".join(["other", *(f"film {i} was great" for i in range(40))]))
    return simulate(tiny(told, "rounds=1", private=False), out=folder / "run"), folder


def test_scores_are_those_of_predict(pairs):
    run, _ = pairs
    left, right = [f"note {i}" for i in range(30)], [f"film {i} was great" for i in range(40)]
    found = all_pairs(run, left, right, top=2, anchors=4, check=3, label="yes")
    assert found.best.shape == (30, 2) and found.scored < 1200 and found.checked == 3
    asked = [f"{left[i]}\t{right[found.best[i, 0]]}" for i in range(5)]
    for answer, score in zip(predict(run, asked), found.scores[:, 0], strict=False):
        share = answer.probability if answer.answer == "yes" else 1 - answer.probability
        assert share == pytest.approx(score, abs=1e-5)
    other = all_pairs(run, left, right, top=2, anchors=4, check=3, label="yes")
    assert (other.best == found.best).all() and other.recall == found.recall


def test_the_command_writes_pairs(pairs, tmp_path, capsys):
    run, folder = pairs
    told = [
        "predict",
        str(run.folder),
        "--data",
        str(folder / "left.txt"),
        "--all-pairs",
        str(folder / "right.csv"),
    ]
    assert main([*told, "--top", "1", "--anchors", "3", "--out", str(tmp_path / "found.csv")]) == 0
    out, error = capsys.readouterr()
    assert out == f"{tmp_path / 'found.csv'}: 30 pairs\n"
    assert "of 1,200 pairs" in error and "of the true best of 10 texts" in error
    made = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert [row["left"] for row in made] == [f"note {i}" for i in range(30)] and 0 < float(made[0]["score"]) < 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label": "maybe"}, "--label maybe: .*yes"),
        ({"top": 0}, "--top: should be 1 or more"),
        ({"anchors": 0}, "--anchors: should be 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(pairs, more, words):
    with pytest.raises(UserError, match=words):
        all_pairs(pairs[0], ["a"], ["b"], **more)


def test_a_model_of_single_texts_is_refused(tiny, tmp_path, capsys):
    run = simulate(tiny("rounds=1", private=False), out=tmp_path / "run")
    (tmp_path / "x.txt").write_text("a\n")
    told = ["predict", str(run.folder), "--data", str(tmp_path / "x.txt"), "--all-pairs", str(tmp_path / "x.txt")]
    assert main(told) == 2
    assert "its model judges single texts: --all-pairs is for models of pairs" in capsys.readouterr().err
    assert main(["predict", str(run.folder), "a", "--all-pairs", str(tmp_path / "x.txt")]) == 2
