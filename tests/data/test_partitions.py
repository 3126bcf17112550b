"""How rows become the partitions of clients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedlora.data.partitions import split
from fedlora.errors import SettingError
from fedlora.scenario import LabelShares, Partition

TARGETS = np.repeat([0, 1, 2], [60, 30, 10])
OWNERS = ["abc"[i % 3] for i in range(100)]  # 34, 33, 33
KINDS = [
    {"kind": "iid"},
    {"kind": "dirichlet", "alpha": 1.0, "min_examples": 1},
    {"kind": "pathological", "labels_per_client": 2},
    {"kind": "shards", "shards_per_client": 2},
    {"kind": "size", "growth": "linear"},
    {"kind": "size", "growth": "square"},
    {"kind": "size", "growth": "exponential"},
    {"kind": "natural", "column": "site"},
    {"kind": "label_shares", "shares": [[0.6, 0.3, 0.1]]},
]


def parts(how: dict, clients: int, seed: int = 0, targets=TARGETS, owners=OWNERS) -> list[np.ndarray]:
    return split(TypeAdapter(Partition).validate_python(how), targets, owners, clients, seed)


def refused(how: dict, clients: int, **more) -> SettingError:
    with pytest.raises(SettingError) as caught:
        parts(how, clients, **more)
    return caught.value


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_every_kind_gives_each_row_to_one_client(how):
    made = parts(how, 3)
    rows = np.concatenate(made)
    assert len(made) == 3 and all(len(part) for part in made)
    used = {"shards": 96, "label_shares": 99}.get(how["kind"], 100)  # 6 shards of 16; 3 clients of 20 + 10 + 3
    assert len(rows) == len(set(rows.tolist())) == used and set(rows.tolist()) <= set(range(100))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in made)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_a_split_follows_from_its_seed(how):
    one, again, other = parts(how, 3, seed=1), parts(how, 3, seed=1), parts(how, 3, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    same = all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert same is (how["kind"] == "natural")  # there is one way to split by owner


@pytest.mark.parametrize("how", KINDS[:5], ids=str)
@given(clients=st.integers(1, 7), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=8, deadline=None)
def test_no_number_of_clients_and_no_seed_gives_a_row_twice(how, clients, seed):
    made = parts(how, clients, seed)
    rows = np.concatenate(made)
    assert len(made) == clients and len(rows) == len(set(rows.tolist())) <= 100
    if how["kind"] in ("iid", "dirichlet", "size"):
        assert len(rows) == 100


def test_sizes_by_hand():
    def sizes(how: dict, clients: int) -> list[int]:
        return [len(part) for part in parts(how, clients)]

    assert sizes({"kind": "iid"}, 7) == [15, 15, 14, 14, 14, 14, 14]
    assert sizes({"kind": "shards", "shards_per_client": 3}, 5) == [18] * 5  # 15 shards of 6; 10 rows are left
    assert sizes({"kind": "size", "growth": "linear"}, 4) == [10, 20, 30, 40]
    assert sizes({"kind": "size", "growth": "square"}, 3)[:2] == [7, 28]  # 100/14, 400/14; the last has the rest
    assert sizes({"kind": "natural", "column": "site"}, 3) == [34, 33, 33]


def test_owners_keep_their_rows_in_the_order_of_their_names():
    owners = list("ccccbbbaaaaa")
    made = parts({"kind": "natural", "column": "site"}, 3, targets=np.zeros(12, int), owners=owners)
    assert ["".join(owners[row] for row in part) for part in made] == ["aaaaa", "bbb", "cccc"]


@pytest.mark.parametrize("clients", [2, 4])
def test_another_number_of_clients_than_owners_is_told_which(clients):
    error = refused({"kind": "natural", "column": "site"}, clients)
    assert (error.key, error.message) == (
        "clients.total",
        "column 'site' has 3 values: set clients.total to that",
    )


@pytest.mark.parametrize(("labels", "clients"), [(1, 6), (2, 6), (3, 4)])
def test_pathological_clients_hold_as_many_labels_as_asked(labels, clients):
    targets = np.repeat(range(5), 40)
    made = parts({"kind": "pathological", "labels_per_client": labels}, clients, targets=targets)
    assert [len(set(targets[part])) for part in made] == [labels] * clients


def test_dirichlet_is_more_skewed_with_a_smaller_alpha():
    targets = np.repeat(range(4), 500)

    def skew(alpha: float) -> float:
        made = parts({"kind": "dirichlet", "alpha": alpha, "min_examples": 5}, 5, targets=targets)
        shares = np.array([np.bincount(targets[p], minlength=4) / len(p) for p in made])
        return float(np.abs(shares - 0.25).mean())

    assert skew(0.1) > 3 * skew(10.0)
    assert all(len(p) >= 15 for p in parts({"kind": "dirichlet", "alpha": 1, "min_examples": 15}, 4))


@pytest.mark.parametrize(
    ("how", "clients", "key", "message"),
    [
        ({"kind": "iid"}, 101, "clients.total", "101 clients, and only 100 examples"),
        (
            {"kind": "dirichlet", "alpha": 0.5, "min_examples": 50},
            5,
            "data.partition",
            "no draw gave every client",
        ),
        ({"kind": "dirichlet", "alpha": 1e-9}, 9, "data.partition", "raise alpha, or lower min_examples"),
        (
            {"kind": "pathological", "labels_per_client": 4},
            5,
            "data.partition",
            "labels_per_client is 4, and there are 3 labels",
        ),
        ({"kind": "shards", "shards_per_client": 40}, 5, "data.partition", "5 clients with 40 shards each need"),
        ({"kind": "size", "growth": "exponential"}, 20, "data.partition", "leaves the least of 20 clients no"),
        ({"kind": "label_shares", "shares": [[0.5, 0.5]]}, 2, "data.partition.shares", "2 shares, and there"),
        ({"kind": "label_shares", "shares": [[0.4, 0.2, 0.2, 0.2]]}, 2, "data.partition.shares", "4 shares, and"),
    ],
    ids=str,
)
def test_a_split_that_cannot_be_is_told_why(how, clients, key, message):
    error = refused(how, clients)
    assert error.key == key and message in error.message and "\n" not in error.message


def test_label_shares_by_hand():
    # 60 of label 0, 30 of label 1. Two clients of n rows ask for 0.9 n + 0.1 n and 0.1 n + 0.9 n: n = 30.
    how = {"kind": "label_shares", "shares": [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]}
    made = parts(how, 2)
    assert [np.bincount(TARGETS[p], minlength=3).tolist() for p in made] == [[27, 3, 0], [3, 27, 0]]
    # Four clients take the two rows in turn: n = 15, and 13.5 of a label is rounded down to 13.
    made = parts(how, 4)
    assert [np.bincount(TARGETS[p], minlength=3).tolist() for p in made] == [[13, 1, 0], [1, 13, 0]] * 2
    assert len(set(np.concatenate(made).tolist())) == 56


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.integers(1, 9), min_size=n, max_size=n), min_size=1, max_size=3),
            st.lists(st.integers(40, 200), min_size=n, max_size=n),
        )
    ),
    st.integers(1, 3),
)
def test_label_shares_are_kept_to_a_whole_row(case, repeats):
    weights, available = case
    shares = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    targets = np.repeat(range(len(available)), available)
    how = LabelShares(kind="label_shares", shares=tuple(map(tuple, shares.tolist())))
    made = split(how, targets, None, len(shares) * repeats, 0)
    counts = np.array([np.bincount(targets[p], minlength=len(available)) for p in made])
    size = min(np.array(available) / (shares.sum(axis=0) * repeats))  # the scarcest label decides
    wanted = np.tile(shares * size, (repeats, 1))
    assert (counts <= wanted + 1e-6).all() and (counts > wanted - 1 - 1e-6).all()
    assert len(set(np.concatenate(made).tolist())) == counts.sum()
