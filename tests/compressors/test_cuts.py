import numpy as np
import pytest

from fedlora.compressors.contract import Spectrum, Statistic, compress, load

DIAGONAL = np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)  # 16 numbers; a rank costs 8 of them
SLOW = np.diag([4.0, 3.9, 3.8, 3.7]).astype(np.float32)


def test_the_plain_svd_keeps_the_largest_and_its_error_is_the_tail():
    cut = compress(load("lord", {"keep": 0.5}), {"a": DIAGONAL}, {})["a"]
    assert (cut.rank, cut.numbers) == (1, 8)
    assert np.allclose(cut.left @ cut.right, np.diag([4.0, 0, 0, 0]))
    assert cut.error == pytest.approx(np.sqrt((9 + 4 + 1) / 30)) == cut.weighted


def test_a_statistic_turns_what_is_kept():
    counts = Statistic("mean", np.array([0.0, 0.0, 0.0, 1.0]))
    cut = compress(load("fwsvd", {"keep": 0.5}), {"a": DIAGONAL}, {"a": counts})["a"]
    assert np.allclose(cut.left @ cut.right, np.diag([0, 0, 0, 1.0]))
    assert cut.weighted == pytest.approx(0, abs=1e-5) and cut.error == pytest.approx(np.sqrt(29 / 30))


def test_a_gram_and_its_diagonal_agree_where_inputs_do_not_go_together():
    counts = np.array([1.0, 2.0, 30.0, 4.0])
    cuts = [
        compress(load("lord", {"keep": 0.5}), {"a": DIAGONAL}, {"a": statistic})["a"]
        for statistic in (Statistic("mean", counts), Statistic("gram", np.diag(counts)))
    ]
    assert np.allclose(cuts[0].left @ cuts[0].right, cuts[1].left @ cuts[1].right)
    assert np.allclose(cuts[0].left @ cuts[0].right, np.diag([0, 0, 2.0, 0]))  # 4 x 30 > 9 x 2 > 16 > 4


def test_one_threshold_takes_from_the_layer_that_has_it_to_give():
    wide = {"fast": np.diag(0.1 ** np.arange(8.0)).astype(np.float32), "slow": np.eye(8, dtype=np.float32)}
    cuts = compress(load("welore", {"keep": 0.75}), wide, {})
    assert cuts["slow"].rank is None and cuts["fast"].rank == 2  # 64 and 2 x 16 of 128: three quarters
    assert compress(load("welore", {"keep": 0.7}), wide, {})["fast"].rank == 1


def test_energy_is_left_alike_in_every_layer():
    wide = {"fast": np.diag(0.1 ** np.arange(8.0)).astype(np.float32), "slow": np.eye(8, dtype=np.float32)}
    cuts = compress(load("afm", {"keep": 0.5}), wide, {n: Statistic("gram", np.eye(8)) for n in wide})
    assert cuts["fast"].rank == 1 and cuts["slow"].rank == 3  # 16 + 48 of 64; the slow one has no tail


def test_a_rank_below_one_leaves_a_layer_whole():
    assert compress(load("lord", {"keep": 0.2}), {"a": DIAGONAL}, {})["a"].rank is None


def test_the_highest_rank_is_the_last_that_saves_a_number():
    told = Spectrum((4, 4), np.eye(4, dtype=np.float32), np.ones(4))
    assert told.most == 1 and told.numbers(1) == 8 and told.numbers(None) == 16  # rank 2 would cost 16
    assert Spectrum((3, 1), np.eye(3, dtype=np.float32), np.ones(1)).most == 0
