"""Nested ranks, by hand; a run of two tiers, and the model of each of its prefixes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import evaluate, strategy, suitability
from fedlora.adapter import Slot, Update, weighted_mean
from fedlora.errors import SettingError
from fedlora.kinds.core import Core
from fedlora.kinds.lora import Lora
from fedlora.planning import plan
from fedlora.rounds.checkpoint import read_tensors
from fedlora.schedules.levels import levelled
from fedlora.simulation import simulate

NESTED = ("model.adapter.schedule={kind: nested}", "clients.ranks={kind: list, values: [2, 4]}")


def mean(kind, layout, before, updates, ranks):
    made = levelled(kind, layout, before, updates, lambda update: ranks[update.clients[0]])
    return weighted_mean(made)


def test_a_column_is_the_mean_of_those_who_trained_it():
    """s = 2 / 4, and a client of rank 1 has s_k = 2: its 3 counts for 12. (1 * 12 + 3 * 4) / 4 = 6."""
    kind, layout = Lora(4, 2.0, ()), {"b": Slot("b", (1, 4), "B", "q"), "h": Slot("h", (1,), "head", "h")}
    before = {"b": np.array([[9, 9, 9, 9]], np.float32), "h": np.zeros(1, np.float32)}
    small = Update(
        adapter={"b": np.array([[3]], np.float32), "h": np.ones(1, np.float32)}, weight=1.0, clients=(0,)
    )
    large = Update(
        adapter={"b": np.array([[2, 5]], np.float32), "h": np.zeros(1, np.float32)}, weight=3.0, clients=(1,)
    )
    made = mean(kind, layout, before, [small, large], {0: 1, 1: 2})
    np.testing.assert_allclose(made["b"], [[6, 10, 9, 9]])  # what nobody holds stays
    np.testing.assert_allclose(made["h"], [0.25])  # a head has no scaling


@pytest.mark.parametrize("ranks, nested", [((1, 2, 3), True), ((3, 3, 3), False)])
def test_each_prefix_of_a_linear_map_becomes_its_best_of_that_rank(ranks, nested):
    """Maestro's claim: clients that step down `|| B_k A_k - W ||^2` meet in the SVD of W, column by column.

    Of equal ranks the whole is found as well, and its prefixes are not.
    """
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 3)))[0] for size in (6, 5))
    weight = u * [4.0, 2.0, 1.0] @ v.T
    kind, pace = Lora(3, 3.0, ()), 0.05
    layout = {"b": Slot("b", (6, 3), "B", "q"), "a": Slot("a", (3, 5), "A", "q")}
    at = {name: (0.3 * rng.standard_normal(slot.shape)).astype(np.float32) for name, slot in layout.items()}
    for _ in range(800):
        updates = []
        for client, rank in enumerate(ranks):
            b, a = at["b"][:, :rank], at["a"][:rank]
            off, s = b @ a - weight, kind.scaling(rank)  # the server's is 1, so that the change is b a
            stepped = {"b": (b - pace * off @ a.T) / s, "a": a - pace * b.T @ off}
            sent = {name: tensor.astype(np.float32) for name, tensor in stepped.items()}
            updates.append(Update(adapter=sent, weight=1.0, clients=(client,)))
        at = mean(kind, layout, at, updates, dict(enumerate(ranks)))
    for rank in (1, 2, 3):
        best = u[:, :rank] * [4.0, 2.0, 1.0][:rank] @ v[:, :rank].T
        away = np.linalg.norm(at["b"][:, :rank] @ at["a"][:rank] - best) / np.linalg.norm(best)
        assert away < 1e-3 if nested or rank == 3 else away > 0.1


def test_of_a_core_rows_and_columns_are_held():
    kind, layout = Core(2, 2.0, ()), {"g": Slot("g", (2, 2), "core", "q")}
    before = {"g": np.zeros((2, 2), np.float32)}
    updates = [
        Update(adapter={"g": np.array([[1]], np.float32)}, weight=1.0, clients=(0,)),
        Update(adapter={"g": np.array([[4, 5], [6, 7]], np.float32)}, weight=1.0, clients=(1,)),
    ]
    np.testing.assert_allclose(mean(kind, layout, before, updates, {0: 1, 1: 2})["g"], [[3, 5], [6, 7]])


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.floats(0.5, 8)), min_size=1, max_size=5), st.integers(0, 99)
)
def test_a_prefix_is_what_those_below_it_would_have_made_of_it(clients, seed):
    """The first column depends on the first columns alone; where all have the whole rank it is the plain mean."""
    kind, layout, rng = Lora(3, 3.0, ()), {"b": Slot("b", (2, 3), "B", "q")}, np.random.default_rng(seed)
    before = {"b": rng.standard_normal((2, 3)).astype(np.float32)}
    updates = [
        Update(adapter={"b": rng.standard_normal((2, r)).astype(np.float32)}, weight=w, clients=(i,))
        for i, (r, w) in enumerate(clients)
    ]
    ranks = {i: r for i, (r, _) in enumerate(clients)}
    made = mean(kind, layout, before, updates, ranks)["b"]
    for j in range(3):
        there = [(u, r) for u, r in zip(updates, ranks.values(), strict=True) if r > j]
        if not there:
            np.testing.assert_allclose(made[:, j], before["b"][:, j], rtol=1e-6)
            continue
        whole = sum(u.weight * 3 / r * u.adapter["b"][:, j] for u, r in there) / sum(u.weight for u, _ in there)
        np.testing.assert_allclose(made[:, j], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", [("model.adapter.kind=core",), ("model.adapter.kind=channel",)])
def test_a_run_gives_a_model_for_each_rank(told, tiny, tiny_base, reviews, tmp_path):
    scenario = tiny(*NESTED, "rounds=2", "clients.lr=2.0", *told)
    run = simulate(scenario, out=tmp_path / "run")
    assert run.summary["failures"] == 0
    assert run.summary["prefixes"].keys() == {"2", "4"}
    assert run.summary["prefixes"]["4"]["accuracy"] == run.summary["accuracy"]
    assert run.summary["prefixes"]["2"]["loss"] != run.summary["loss"]
    planned = plan(scenario)
    assert planned.bytes_up_total == run.summary["bytes_up_total"]
    assert planned.bytes_down_total == run.summary["bytes_down_total"]
    assert planned.epsilon == pytest.approx(run.summary["epsilon"])
    sent = [json.loads(line) for line in (run.folder / "clients.jsonl").read_text().splitlines()]
    assert sent[0]["bytes_up"] < sent[1]["bytes_up"]  # ranks 2 and 4
    made = read_tensors(run.folder / "prefixes" / "rank-2" / "adapter_model.safetensors")
    rows = {len(t) for n, t in made.items() if n.endswith("lora_A.weight")}
    assert rows == {6 if told and "channel" in told[0] else 2}  # channel: all of C beside the columns of B


def test_the_model_of_a_prefix_scores_what_the_summary_says(tiny, reviews, tmp_path):
    run = simulate(tiny(*NESTED, "clients.lr=2.0", f"data.files.test={reviews}"), out=tmp_path / "run")
    told = run.summary["prefixes"]
    again = evaluate(run.folder / "prefixes" / "rank-2", data=reviews, metrics=["accuracy", "log_loss"])
    assert again.metrics["accuracy"] == told["2"]["accuracy"]
    assert again.metrics["log_loss"] == pytest.approx(told["2"]["loss"], rel=1e-4)
    assert told["2"]["loss"] != pytest.approx(told["4"]["loss"], rel=1e-4)


def test_tiers_of_a_world_have_ranks_too(tiny, tmp_path):
    told = "clients.tiers={phone: {share: 0.5, rank: 2}, desk: {share: 0.5}}"
    run = simulate(tiny(NESTED[0], told, "world={}"), out=tmp_path / "run")
    assert run.summary["prefixes"].keys() == {"2", "4"} and not run.summary["failures"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (NESTED[:1], "nested is for clients of several ranks: name them, or their tiers"),
        ((*NESTED, "strategy.use=flora"), "nested goes on from a mean of changes, and what flora makes is none"),
        ((*NESTED, "privacy.unit=client", "clients.use=sgd"), "nested has ranks, and a noised sum has one shape"),
        ((*NESTED, "secure_aggregation={}"), "nested has ranks, and a masked sum has one shape"),
        ((*NESTED, "strategy.shrink={}"), "nested gives numbers noise of their own"),
        ((*NESTED, "world={concurrency: 2}"), "nested begins anew, and updates that come late"),
        (NESTED[1:], "ffa_lora needs equal ranks; .* so does model.adapter.schedule: {kind: nested}"),
    ],
    ids=["equal", "no mean", "whole clients", "masks", "shrink", "late", "none"],
)
def test_what_does_not_go_with_it_is_refused_in_a_line(told, why, tiny):
    scenario = tiny(*told)
    with pytest.raises(SettingError, match=why):
        suitability.check(strategy.load(scenario.strategy.use, {}), scenario)
