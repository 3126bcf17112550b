"""A base that is cut at sites: what each pays, what it is sent, and what it does not take."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import prepare, simulate, wire, wire_base
from fedlora.deploy import cutting, history
from fedlora.engine.asked import Asked
from fedlora.engine.replies import Said
from fedlora.engine.roster import Roster
from fedlora.errors import Refusal
from fedlora.privacy import accounting, ledger
from fedlora.privacy.accounting import Event
from tests.deploy.federation import LocalGrid, meet, refusal

CUT = "compress={use: lord, keep: 0.5}"
GRAM = (CUT, "statistics={kind: gram, epsilon: 2}")


def factors(folder):
    return load_file(folder / "base" / "factors.safetensors")


def own(node):
    return node.state.folder / "runs" / "run-1"


def test_sites_cut_by_weights_give_what_a_simulation_gives_bit_for_bit(sites, nodes, deployed, tiny, tmp_path):
    scenario, files = sites(CUT, "rounds=1", private=False)
    run, engine = deployed(scenario, LocalGrid(made := nodes(files)))
    plain = simulate(tiny(CUT, "rounds=1", private=False), out=tmp_path / "plain")
    one, other = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (run, plain))
    assert all(np.array_equal(one[n], other[n]) for n in one) and run.summary["failures"] == 0
    mine, theirs = factors(run.folder), factors(own(made[1]))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[n], theirs[n]) for n in mine)
    sent = sum(t.nbytes for n, t in mine.items() if n.endswith((".left", ".right")))
    rounds = sum(line["bytes_down"] for line in run.rounds)
    assert 4 * sent < run.summary["bytes_down_total"] - rounds < 4 * (1.1 * sent + 20_000)
    assert engine.roster.greeted == 0, "all are counted"


def test_factors_that_an_earlier_process_of_the_server_sent_count_after_a_resume(sites, nodes, deployed):
    """The second process introduces itself to all four sites again, with the same factors."""
    scenario, files = sites(CUT, "rounds=1", private=False)
    run, _ = deployed(scenario, grid := LocalGrid(nodes(files)))
    told = [run.summary["bytes_down_total"] - sum(line["bytes_down"] for line in run.rounds)]
    more, _ = deployed(scenario.model_copy(update={"rounds": 2}), grid, run.folder, resume=True)
    told.append(more.summary["bytes_down_total"] - sum(line["bytes_down"] for line in more.rounds))
    sent = sum(t.nbytes for n, t in factors(run.folder).items() if n.endswith((".left", ".right")))
    assert told[0] > 4 * sent and told[1] > 8 * sent


@pytest.fixture
def cut(sites, nodes, deployed):
    """A private run whose sites gave a statistic."""
    scenario, files = sites(*GRAM)
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    return run, made, scenario, files


def test_each_site_pays_its_own_ledgers_once_and_the_server_s_says_the_same(cut):
    run, made, scenario, _ = cut
    there = ledger.replay(run.folder / "privacy.jsonl")
    event = prepare.statistic(scenario)
    for client, node in enumerate(made.values()):
        here = ledger.replay(own(node) / "privacy.jsonl")[client]
        assert here == there[client] and accounting.alike(here, event) == 1
        assert ledger.replay(node.state.folder / "ledger" / "privacy.jsonl") == {ledger.Own(): here}
        lines = [json.loads(line) for line in (own(node) / "privacy.jsonl").read_text().splitlines()]
        assert (lines[0]["round"], lines[0]["statistic"], lines[1]["round"]) == (0, "gram", 1)
        asked = [line["what"] for line in history.read(node.state.folder / "history.jsonl")]
        assert asked[:4] == ["introduction", "statistic", "introduction", "round"]
    assert 7.9 < run.summary["epsilon"] <= 8.0 and run.summary["failures"] == 0
    told = json.loads((run.folder / "base" / "manifest.json").read_text())["statistic"]
    assert (told["clients"], told["noise_multiplier"]) == (4, event.noise_multiplier)
    assert len({tuple(t.ravel()[:9]) for t in [factors(own(n))["pooler.dense.left"] for n in made.values()]}) == 1


def test_a_run_that_goes_on_asks_nobody_again(sites, nodes, deployed):
    """Its noise is fixed, so that a further round has room; what the statistic cost has other noise."""
    scenario, files = sites(*GRAM, "privacy={noise_multiplier: 3.0, delta: 1.0e-3}", "rounds=1")
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    grid = LocalGrid(made)
    more, _ = deployed(scenario.model_copy(update={"rounds": 2}), grid, run.folder, resume=True)
    assert "query.statistic" not in {kind for kind, _ in grid.told} and more.summary["failures"] == 0
    for client, node in enumerate(made.values()):
        here = ledger.replay(own(node) / "privacy.jsonl")[client]
        assert here == ledger.replay(run.folder / "privacy.jsonl")[client]
        assert accounting.alike(here, prepare.statistic(scenario)) == 1


def test_asked_again_it_answers_the_same_and_pays_nothing(server, node):
    words, files, train = server(*GRAM)
    meet(made := node(files[0]), words)
    ask = wire.pack_words({"run": "tiny-1"})
    first = made.answer("query.statistic", ask, 0)
    again = node(files[0]).answer("query.statistic", ask, 0)  # from its disk, after a restart
    assert wire.to_bytes(wire_base_arrays(first)) == wire.to_bytes(wire_base_arrays(again))
    assert wire.unpack_words(again)["again"] is True and wire.unpack_event(first) == wire.unpack_event(again)
    lines = (made.state.folder / "ledger" / "privacy.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert "to be cut before anybody trains" in refusal(made, train(1)) and len(lines) == 1


def wire_base_arrays(content):
    from flwr.app import RecordDict

    return RecordDict({"arrays": content["arrays"]})


def test_its_noise_is_that_of_its_ledger_and_nobody_s_to_repeat(server, node):
    words, files, _ = server(*GRAM)
    sums = []
    for file in files[:1] * 2:
        meet(made := node(file), words)
        event = wire.unpack_event(content := made.answer("query.statistic", wire.pack_words({"run": "tiny-1"}), 0))
        taker_shapes = {n: _shape(a.shape[0]) for n, a in content["arrays"].items()}
        sums.append(wire_base.unpack_statistic(content, taker_shapes))
        made.close()
        shutil.rmtree(made.state.folder)
    apart = np.concatenate([np.diag(sums[0][n] - sums[1][n]) for n in sums[0]])
    assert apart.std() == pytest.approx(2**0.5 * event.noise_multiplier, rel=0.2) and len(apart) > 200


def _shape(count):
    side = int((8 * count + 1) ** 0.5 / 2)
    assert side * (side + 1) // 2 == count
    return side, side


@pytest.mark.parametrize("cap, why", [(1.5, "would pass the epsilon that the site allows"), (80, None)])
def test_a_site_whose_budget_is_not_enough_looks_at_no_row(server, node, monkeypatch, cap, why):
    words, files, _ = server(*GRAM)
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", f"max_epsilon: {cap}"))
    meet(made := node(files[0]), words)
    seen = []
    monkeypatch.setattr(cutting.Taker, "sums", lambda self, *told: seen.append(paid(made)) or {})
    said = refusal(made, wire.pack_words({"run": "tiny-1"}), "query.statistic")
    assert (said is None and seen == [1]) if why is None else (why in said and not seen)


def paid(node):
    file = node.state.folder / "ledger" / "privacy.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "told, why",
    [((), "no statistic that noise hides"), ((CUT,), "no statistic that noise hides")],
)
def test_a_site_takes_no_statistic_that_the_run_has_not(server, node, told, why):
    words, files, _ = server(*told)
    meet(made := node(files[0]), words)
    assert why in refusal(made, wire.pack_words({"run": "tiny-1"}), "query.statistic") and not paid(made)


def test_factors_that_are_no_cut_of_its_own_copy_are_refused():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(6, 4)).astype(np.float32)
    left = np.linalg.qr(rng.normal(size=(6, 2)))[0].astype(np.float32)
    right = left.T @ weight
    (made,) = cutting.checked({"a": (left, right)}, {"a": weight}, 1e-3).values()
    lost = np.linalg.norm(weight - left @ right) / np.linalg.norm(weight)
    assert made.rank == 2 and made.error == pytest.approx(lost)
    nothing = left[:, :0], right[:0]
    for sides in (
        nothing,
        (left, 1.01 * right),
        (2 * left, right / 2),
        (left, right * np.nan),
        (left[:, ::-1], right),
    ):
        with pytest.raises(Refusal, match="are no cut of its own copy of the base"):
            cutting.checked({"a": sides}, {"a": weight}, 1e-3)


def test_no_direction_of_an_input_comes_out_longer_than_the_slack_allows():
    """Many small errors of one sign add up along one direction: each is 0.02, and all 64 stretch it 1.3 times."""
    left = np.linalg.qr(np.random.default_rng(2).normal(size=(128, 64)))[0]
    root = np.linalg.cholesky(np.eye(64) + 0.02 * (np.ones((64, 64)) - np.eye(64)))
    steep = (left @ root.T).astype(np.float32)
    assert np.abs(steep.T @ steep - np.eye(64)).max() < 0.021
    weight = np.eye(128, dtype=np.float32)
    with pytest.raises(Refusal, match="are no cut of its own copy"):
        cutting.checked({"a": (steep, steep.T @ weight)}, {"a": weight}, 3e-2)
    right = left.T.astype(np.float32) @ weight
    far = right + 0.01 * np.outer(left[:, 0][:64], np.ones(128)).astype(np.float32)  # short beside all of W
    assert np.linalg.norm(far - right) < 3e-2 * np.linalg.norm(weight)
    with pytest.raises(Refusal, match="are no cut of its own copy"):
        cutting.checked({"a": (left.astype(np.float32), far)}, {"a": weight}, 3e-2)


@pytest.mark.parametrize("told", [GRAM, ()])
def test_nothing_is_merged_into_a_base_that_is_whole_or_by_a_strategy_that_merges_nothing(server, node, told):
    """What is merged before could make a row count for more than 1 in the statistic."""
    words, files, train = server(*told)
    meet(made := node(files[0]), words)
    shapes = made.run.worker.task.weights
    change = {n: (np.ones((o, 1), np.float32), np.ones((1, i), np.float32)) for n, (o, i) in shapes.items()}
    content = train(1, merged=1)
    wire.pack_merges(content, 0, [change])
    assert "the run has no such thing" in refusal(made, content)
    assert not len(made.run.merges) and not [*made.state.of_run("tiny-1").glob("merges/*")]


def test_a_statistic_is_not_taken_where_rows_of_a_pass_move_each_other(server, node, monkeypatch):
    words, files, _ = server(*GRAM)
    meet(made := node(files[0]), words)
    monkeypatch.setattr("fedlora.engine.statistic.alone.mingle", lambda *_: "logits are off")
    assert "no statistic can be taken of its base (statistics)" in refusal(
        made, wire.pack_words({"run": "tiny-1"}), "query.statistic"
    )
    assert not paid(made)


def test_a_restarted_site_that_lost_its_base_is_greeted_again(sites, nodes, deployed):
    scenario, files = sites(CUT, "rounds=3", private=False)
    made = nodes(files)
    answer = made[1].answer

    def lost(kind, content, partition):
        if kind == "train" and not gone:
            base = own(made[1]) / "base"
            gone.append(shutil.rmtree(base))
            made[1]._runs.clear()
        return answer(kind, content, partition)

    gone = []
    made[1].answer = lost
    run, _ = deployed(scenario, LocalGrid(made))
    assert gone and run.summary["failures"] == 1 and (own(made[1]) / "base").is_dir()


def test_a_site_runs_no_compressor_that_comes_with_a_run(server, node):
    words, files, _ = server()
    words["scenario"]["compress"] = {"use": "os:path", "keep": 0.5}
    assert "such as 'os:path' (compress)" in meet(node(files[0]), words)["refused"]


EVENT = Event(noise_multiplier=2.0, sample_rate=1.0, steps=1, clip_norm=1.0)


class TestAnswers:
    """What a server takes of an answer."""

    def said(self, sums, event=EVENT, units=10):
        from types import SimpleNamespace

        told = []
        roster = Roster(None, 1, 1.0, 1.0, note=told.append)
        reply = SimpleNamespace(has_error=lambda: False, content=wire_base.pack_statistic(sums, event))
        return Asked(EVENT, {"a": (2, 2), "b": (3,)}, roster).said(0, units, reply), told

    def test_a_sum_is_read_as_it_was_sent(self):
        sums = {"a": np.array([[1.0, 2.0], [2.0, 3.0]]), "b": np.array([4.0, 5.0, 6.0])}
        said, _ = self.said(sums)
        assert all(np.array_equal(said.sums[n], sums[n]) for n in sums) and said.event == EVENT

    @pytest.mark.parametrize(
        "change, why",
        [
            ({"a": np.eye(3)}, "has shape (6,)"),
            ({"b": np.array([np.nan, 0, 0])}, "not finite"),
            ({"c": np.zeros(2)}, "of other layers"),
            ({"b": np.array([50.0, 0, 0])}, "its sum is 50 long, and 10 rows make it 37.3 at most"),
        ],  # the last: 10 + 1.5 * 2 * sqrt(3 + 3) + 10 * 2
    )
    def test_what_no_honest_site_could_say_is_left_out_and_counted_as_paid(self, change, why):
        said, told = self.said({"a": np.zeros((2, 2)), "b": np.zeros(3)} | change)
        assert said.sums is None and said.event == EVENT and why in told[0]

    def test_other_noise_is_no_part_of_the_sum(self):
        sums = {"a": np.zeros((2, 2)), "b": np.zeros(3)}
        less = replace(EVENT, noise_multiplier=1.0)
        said, told = self.said(sums, less)
        assert said == Said(client=0, event=less, bytes_up=said.bytes_up) and "its noise is not what" in told[0]
        assert self.said(sums, replace(EVENT, noise_multiplier=2.0 + 1e-9))[0].sums is not None
