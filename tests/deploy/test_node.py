"""A site's side: what it refuses, what it pays, what it says."""

import json
import logging
import subprocess
import sys

import pytest
from flwr.app import RecordDict

from fedlora import wire
from fedlora.deploy import admission, signing
from fedlora.deploy.logs import Lines
from fedlora.deploy.node import Node
from fedlora.engine.worker import Worker
from fedlora.errors import Refusal, UserError
from fedlora.privacy import ledger
from fedlora.privacy.mechanisms.bands import Past
from tests.deploy.federation import meet, refusal


def test_introduces_itself_with_what_a_round_costs(server, node):
    words, files, _ = server()
    told = meet(made := node(files[1]), words)
    assert told["client"] == 1 and told["name"] == "site-1" and told["num_examples"] > 30
    assert told["event"]["steps"] == 2 and told["event"]["noise_multiplier"] > 0.1 and made.served == 0


@pytest.mark.parametrize(
    "change, why",
    [
        ({"version": "0.0.1"}, "and the server 0.0.1: install one version on both sides"),
        ({"base": "0" * 32}, "its base model is another than the server's"),
        ({"adapter": "0" * 16}, "its first adapter is another than the server's"),
        ({"run": "../../etc"}, "no name that could be a folder's"),
        ({"run": None}, "no name that could be a folder's"),
        ({"scenario": {"name": "a"}}, "cannot read the scenario"),
        ({"labels": None}, "names no labels"),
        ({"labels": ["good", "other"]}, "are not those of its site file (data.labels)"),
        ({"labels": [1, 2]}, "names no labels"),
    ],
)
def test_refuses_what_does_not_go_together(server, node, caplog, change, why):
    words, files, _ = server()
    assert why in meet(made := node(files[0]), {**words, **change})["refused"]
    assert made.run is None or "labels" not in change


def test_a_program_that_a_run_names_is_not_so_much_as_imported(server, node, tmp_path, monkeypatch):
    (tmp_path / "installed.py").write_text("class Mine: ...")
    monkeypatch.syspath_prepend(tmp_path)
    words, files, _ = server()
    for change in ({"task": "installed:Mine"}, {"compress": {"use": "installed:Mine"}}):
        told = meet(node(files[0]), {**words, "scenario": {**words["scenario"], **change}})["refused"]
        assert "runs no code that comes with a run, such as 'installed:Mine'" in told
    assert "installed" not in sys.modules


def test_what_is_wrong_with_its_data_stands_in_its_log_alone(server, node, caplog):
    words, files, _ = server()
    secret = files[0].parent / "train.csv"
    secret.write_text(secret.read_text().replace("text,label", "text,very_private"))
    told = meet(node(files[0]), words)["refused"]
    assert told == "its data or machine do not fit the scenario (data.files.label): its log says why"
    assert "very_private" in caplog.text and "site.yaml:" in caplog.text


def test_trains_for_those_who_signed_if_it_says_so(server, node, tmp_path):
    words, files, _ = server("data.labels=[bad, good]")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    files[0].write_text(files[0].read_text().replace("own_code: false", f"submitters: {json.dumps([public])}"))
    assert "nobody whom it knows has signed" in meet(node(files[0]), words)["refused"]
    signature = signing.sign(tmp_path / "key", words["scenario"], "tiny-1", tmp_path / "app")
    assert meet(node(files[0]), {**words, "signature": signature})["client"] == 0
    for change in ({"scenario": {**words["scenario"], "rounds": 99}}, {"run": "tiny-2"}):
        assert "nobody" in meet(node(files[0]), {**words, **change, "signature": signature})["refused"]
    other = meet(node(files[0]), {**words, "labels": ["good", "bad"], "signature": signature})
    assert "other labels than its scenario" in other["refused"]


def test_labels_that_nobody_signed_are_refused_where_submitters_are_named(server, node):
    words, files, _ = server()
    files[0].write_text(files[0].read_text().replace("own_code: false", "submitters: [ssh-ed25519 AAAA]"))
    assert "nobody has signed the run's labels" in meet(node(files[0]), words)["refused"]


def test_a_signature_is_checked_again_after_a_restart(server, node, tmp_path):
    words, files, train = server("data.labels=[bad, good]")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    files[0].write_text(files[0].read_text().replace("own_code: false", f"submitters: {json.dumps([public])}"))
    (tmp_path / "app").mkdir()
    signature = signing.sign(tmp_path / "key", words["scenario"], "tiny-1", tmp_path / "app")
    meet(node(files[0]), {**words, "signature": signature})
    assert refusal(node(files[0]), train(1)) is None
    (tmp_path / "app" / "mine.pyc").write_bytes(b"")
    assert "nobody whom it knows has signed" in refusal(node(files[0]), train(2))


def test_pays_before_it_trains_and_never_beyond_what_was_promised(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)
    for round in (1, 2):
        assert refusal(made, train(round)) is None
    paid = ledger.replay(made.state.folder / "runs" / "tiny-1" / "privacy.jsonl")
    assert len(paid[0]) == 2 and made.served == 2
    assert "and 8 was promised" in refusal(made, train(1)) and made.failed == 1  # its noise would be new
    assert ledger.replay(made.state.folder / "runs" / "tiny-1" / "privacy.jsonl") == paid


@pytest.mark.parametrize("up", ["null", "{kind: top_k, share: 0.2}"])
def test_asked_again_what_it_has_answered_it_answers_the_same_and_pays_nothing(server, node, up, monkeypatch):
    """A reply that was lost: the budget of two rounds is enough for two. Another question is another training."""
    words, files, train = server(f"compression={{up: {up}}}")
    meet(made := node(files[0]), words)
    first = made.answer("train", train(1), 0)
    fit = made.run.worker.client.passes
    monkeypatch.setattr(made.run.worker.client, "passes", lambda *_: pytest.fail("it trains again"))
    assert wire.unpack_spent(first) == ((wire.unpack_event(first),), False)
    for _ in range(2):
        again = made.answer("train", train(1), 0)
        assert wire.unpack_spent(again) == (wire.unpack_spent(first)[0], True)
        assert wire.to_bytes(RecordDict({"arrays": again["arrays"]})) == wire.to_bytes(
            RecordDict({"arrays": first["arrays"]})
        )
        made = node(files[0])  # from its disk, after a restart
    assert lines_paid(made) == [1, 1]
    told = wire.unpack_event(first)
    monkeypatch.undo()
    assert refusal(made, train(1, {"proximal-mu": 0.5})) is None
    assert lines_paid(made) == [2, 2] and fit is not None
    assert "and 8 was promised" in refusal(made, train(2))
    (spent,), _ = wire.unpack_spent(made.answer("train", train(2), 0))  # a refusal says it too
    assert spent.steps == 2 * told.steps


def test_a_plain_run_keeps_no_answers(server, node):
    words, files, train = server(private=False)
    meet(made := node(files[0]), words)
    assert wire.unpack_spent(made.answer("train", train(1), 0)) == (None, False)
    assert not list(made.state.folder.rglob("answer-*"))


def test_a_site_s_own_cap_holds_over_all_runs_and_restarts(server, node):
    words, files, train = server()
    text = files[0].read_text()
    files[0].write_text(text.replace("max_epsilon: 80", "max_epsilon: 9"))
    meet(made := node(files[0]), words)
    assert [refusal(made, train(round)) for round in (1, 2)] == [None, None]
    made = node(files[0])  # another process, another run of the same scenario
    assert 7 < made.epsilon <= 8
    meet(made, {**words, "run": "tiny-2"})
    assert "pass the epsilon that the site allows over all runs" in refusal(made, train(1, run="tiny-2"))
    assert not (made.state.folder / "runs" / "tiny-2" / "privacy.jsonl").exists()
    files[0].write_text(text)  # the site allows more by now, and says so without a restart
    meet(made, {**words, "run": "tiny-2"})
    assert refusal(made, train(1, run="tiny-2")) is None


def test_a_failure_that_was_paid_for_says_what_it_cost(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)
    made.run.worker.client.fit = lambda *_: 1 / 0
    told = wire.unpack_words(reply := made.answer("train", train(), 0))
    assert told["refused"] == "training failed: its log says why"
    (paid,) = ledger.replay(made.state.folder / "ledger" / "privacy.jsonl")[ledger.Own()]
    assert wire.unpack_event(reply) == paid


def test_a_message_of_an_unknown_run_and_one_that_lacks_merges_say_so(server, node):
    words, files, train = server("strategy.use=fedex_lora", private=False)
    meet(made := node(files[0]), words)
    assert refusal(made, train(run="other")).startswith("not introduced")
    assert refusal(made, train(run="../runs/tiny-1")).startswith("not introduced")
    assert refusal(made, train(merged=2)) == "merges missing: it has 0 of 2"


def test_a_log_line_is_json_with_round_and_client(server, node, caplog):
    words, files, train = server()
    with caplog.at_level(logging.INFO, logger="fedlora"):
        made = node(files[2])
        meet(made, words)
        made.answer("train", train(2), 0)
    record = next(r for r in caplog.records if getattr(r, "round", None) == 2)
    told = json.loads(Lines("site-2").format(record))
    assert told["part"] == "site-2" and told["client"] == 2 and told["round"] == 2 and told["kind"] == "train"
    assert told["message"] == "answered" and 0 < told["epsilon"] < 8 and told["seconds"] > 0


# Payment by the deed.


def lines_paid(made):
    """Of the site's own account, and of the run."""
    files = [
        made.state.folder / "ledger" / "privacy.jsonl",
        made.state.folder / "runs" / "tiny-1" / "privacy.jsonl",
    ]
    return [sum(map(len, ledger.replay(file).values())) if file.exists() else 0 for file in files]


STORIES = [
    {},
    {"trip": 0},
    {"trip": -1},
    {"trip": 2},
    {"trip": 2**40},
    {"server-round": 0},
    {"server-round": -1},
    {"server-round": 3},
    {"draw": -1},
    {"draw": 3},
]


@pytest.mark.parametrize("told", STORIES, ids=str)
def test_whatever_a_message_says_a_site_without_epsilon_trains_nothing(server, node, monkeypatch, told):
    words, files, train = server()
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 0.001"))
    meet(made := node(files[0]), words)
    trained = []
    monkeypatch.setattr(made.run.worker.client, "fit", lambda *_: trained.append(1))
    monkeypatch.setattr(made.run.worker.client, "passes", lambda *_: trained.append(1))
    why = refusal(made, train(1, told))
    assert ("the epsilon that the site allows" if not told else "in a message is a whole number") in why
    assert not trained and lines_paid(made) == [0, 0]
    assert Node(files[0], made.app).epsilon == 0.0  # its ledger can be read


@pytest.mark.parametrize("told", STORIES, ids=str)
def test_each_training_is_paid_whatever_a_message_says(server, node, monkeypatch, told):
    """The site's own account is read where the training is: as many lines as there were trainings, before each."""
    words, files, train = server()
    meet(made := node(files[0]), words)
    seen, passes = [], made.run.worker.client.passes

    def watched(*arguments):
        seen.append(lines_paid(made))
        return passes(*arguments)

    monkeypatch.setattr(made.run.worker.client, "passes", watched)
    made.answer("train", train(1, told), 0)
    made.answer("train", train(2 if not told else 1), 0)
    assert seen == ([[1, 1], [2, 2]] if not told else [[1, 1]])
    assert lines_paid(made) == seen[-1]


def test_a_site_counts_steps_of_banded_noise_by_its_own_ledger_under_a_key_in_memory_alone(
    server, node, monkeypatch
):
    """Three bands, two steps a round: 0-1, 2-3, and after a restart 4-5, in a block of another key."""
    words, files, train = server("privacy.bands=3", "rounds=3")
    begun, block = [], Past.block

    def watched(self, client, first, steps):
        begun.append((client, first, *block(self, client, first, steps)))
        return begun[-1][2:]

    monkeypatch.setattr(Past, "block", watched)
    told = meet(made := node(files[1]), words)
    assert told["event"]["bands"] == 3
    assert refusal(made, train(1)) is None and refusal(made, train(1, {"proximal-mu": 0.5})) is None
    made.close()
    meet(made := node(files[1]), words)
    assert refusal(made, train(2)) is None
    assert [(client, first, began) for client, first, _, began in begun] == [(1, 0, 0), (1, 2, 0), (1, 4, 4)]
    keys = {key for _, _, key, _ in begun}
    assert len(keys) == 2 and begun[0][2] == begun[1][2] and not any(isinstance(key, int) for key in keys)
    written = [file.read_bytes() for file in files[1].parent.rglob("*") if file.is_file()]
    assert not any(key in text or key.hex().encode() in text for key in keys for text in written)
    own, run = (ledger.read(made.state.folder / part / "privacy.jsonl") for part in ("ledger", "runs/tiny-1"))
    assert [(line["steps"], line["bands"]) for line in run] == [(2, 3)] * 3
    assert [line["steps"] for line in own] == [1, 1, 0] and not any("bands" in line for line in own)  # turns
    paid = [ledger.epsilon_of(made.state.folder / part / "privacy.jsonl") for part in ("ledger", "runs/tiny-1")]
    assert paid[0] == pytest.approx(paid[1], rel=1e-6)


@pytest.mark.parametrize("change", ["order", "fewer", "gone"])
def test_under_bands_a_site_goes_on_with_the_rows_that_it_began_with(server, node, caplog, change):
    """A row's place says when its turn is; without bands rows may come and go."""
    words, files, train = server("privacy.bands=3", "rounds=3")
    meet(made := node(files[1]), words)
    made.close()
    rows = files[1].parent / "train.csv"
    head, *lines = (before := rows.read_text()).splitlines()
    rows.write_text("\n".join([head, *(lines[::-1] if change != "fewer" else lines[2:])]) + "\n")
    told = meet(made := node(files[1]), words)
    assert "refused" not in told  # nothing was trained yet
    assert refusal(made, train(1)) is None
    made.close()
    rows.write_text(before)
    if change == "gone":
        rows.write_text("\n".join([head, *lines[::-1]]) + "\n")
        (made.state.of_run("tiny-1") / "rows").unlink()
    told = meet(made := node(files[1]), words)["refused"]
    assert told == "its data are not as they were when the run began: its log says why"
    assert "under privacy.bands each row has its turn by its place" in caplog.text
    assert refusal(made, train(2)) == told
    assert len(ledger.read(made.state.folder / "ledger" / "privacy.jsonl")) == 1


def test_without_bands_rows_may_come_and_go(server, node):
    words, files, train = server("rounds=3")
    meet(made := node(files[1]), words)
    assert refusal(made, train(1)) is None
    made.close()
    rows = files[1].parent / "train.csv"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-2]))
    meet(made := node(files[1]), words)
    assert refusal(made, train(2)) is None


def test_no_exchange_of_masks_trains_for_nothing(server, node, monkeypatch):
    """Keys asked for again in a round, and a masked vector asked for again: each training is paid."""
    words, files, train = server("secure_aggregation={survivors: 0.7}")
    meet(made := node(files[0]), words)
    seen, passes = [], made.run.worker.client.passes
    monkeypatch.setattr(
        made.run.worker.client, "passes", lambda *told: seen.append(lines_paid(made)) or passes(*told)
    )
    for _ in range(2):
        keys = wire.pack_parts({"you": {1: b""}})
        keys[wire.REPORT] = wire.pack_words({"run": "tiny-1", "round": 1})[wire.REPORT]
        made.answer("query.keys", keys, 0)
        made.answer("train", train(1), 0)
        made.answer("train", train(1), 0)
    assert seen == [[n, n] for n in range(1, len(seen) + 1)] and lines_paid(made) == seen[-1]


def test_the_masks_of_a_round_outlive_a_model_that_gives_way_to_two_other_runs(server, node):
    words, files, train = server("secure_aggregation={survivors: 0.7}")
    meet(made := node(files[0]), words)
    keys = wire.pack_parts({"you": {1: b""}})
    keys[wire.REPORT] = wire.pack_words({"run": "tiny-1", "round": 1})[wire.REPORT]
    made.answer("query.keys", keys, 0)
    member = made.masks.member("tiny-1", 1)
    for other in ("tiny-2", "tiny-3"):
        meet(made, {**words, "run": other})
    assert list(made._runs) == ["tiny-2", "tiny-3"]
    assert "it has no masks" not in refusal(made, train(1)) and made.masks.member("tiny-1", 1) is member
    made.masks.forget("tiny-1")  # as at the run's end
    assert "it has no masks" in refusal(made, train(1))


@pytest.mark.parametrize("there", ["0.2.anything", "0.2", "0.2.", "0.2.1.dev1", "0.3.0", "00.2.0", "0.2.0 "])
def test_only_a_number_passes_as_another_patch(monkeypatch, there):
    monkeypatch.setattr(admission, "version", lambda _: "0.2.0")
    with pytest.raises(Refusal, match="install one version on both sides"):
        admission.named({"version": there, "run": "a"})
    assert admission.named({"version": "0.2.17", "run": "a"}) == "a"


@pytest.mark.parametrize("round", [0, -1, 3, True, 1.0, "1", None, [1]])
def test_an_exchange_is_of_a_round_of_the_run(server, node, round):
    words, files, _ = server("secure_aggregation={survivors: 0.7}")
    meet(made := node(files[0]), words)
    content = wire.pack_words({"run": "tiny-1", "round": round})
    assert "round in a message is a whole number from 1 to 2" in refusal(made, content, "query.keys")


def test_frozen_tensors_are_compared_before_it_pays(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)
    assert refusal(made, train(1, {"frozen": "0" * 16})) == "training failed: its log says why"
    assert lines_paid(made) == [0, 0]


@pytest.mark.parametrize(
    "told",
    [{"clip-norm": float("nan")}, {"clip-norm": -1.0}, {"sum-noise": 0.0}, {"trip": True}, {"server-round": 1.0}],
    ids=str,
)
def test_a_number_out_of_its_range_is_told_and_costs_nothing(server, node, told):
    words, files, train = server()
    meet(made := node(files[0]), words)
    (what,) = told
    assert refusal(made, train(1, told)).startswith(f"{what} in a message is a ") and lines_paid(made) == [0, 0]


@pytest.mark.parametrize("merged", [-1, 3, True, 1.0, "1", None])
def test_the_number_of_merges_has_a_range(server, node, merged):
    words, files, train = server(private=False)
    meet(made := node(files[0]), words)
    assert "merged in a message is a whole number from 0 to 2" in refusal(made, train(1, merged=merged))


# One account, and one worker.


def test_the_cap_holds_whatever_the_client_number_is(server, node):
    words, files, train = server("clients.total=4")
    text = files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 9")
    for client, why in ((0, [None, None]), (1, ["pass the epsilon"] * 2), (3, ["pass the epsilon"] * 2)):
        files[0].write_text(text.replace("client: 0", f"client: {client}"))
        meet(made := node(files[0]), {**words, "run": f"tiny-{client}"})
        said = [refusal(made, train(round, run=f"tiny-{client}")) for round in (1, 2)]
        assert all(s is None if w is None else w in s for s, w in zip(said, why, strict=True)), said
        assert 7 < made.epsilon <= 8
    assert ledger.epsilon_of(made.state.folder / "ledger" / "privacy.jsonl") == pytest.approx(made.epsilon)


def test_of_two_workers_of_one_state_the_second_that_pays_is_refused(server, node):
    words, files, train = server()
    one, other = node(files[0]), node(files[0])  # in one process a lock is shared
    for made in (one, other):
        meet(made, words)
    assert refusal(one, train(1)) is None
    assert refusal(other, train(2)) == "its ledger cannot be written: its log says why"
    assert refusal(one, train(2)) is None and lines_paid(one) == [2, 2]


def test_a_state_folder_in_use_by_another_process_is_a_line(server, node, monkeypatch):
    _, files, _ = server()
    state = files[0].parent / "state"
    state.mkdir()
    script = (
        "import sys, pathlib; from fedlora.privacy import lock; held = lock.hold(pathlib.Path(sys.argv[1])); "
        "print('held', flush=True); sys.stdin.read()"
    )
    monkeypatch.setattr("fedlora.deploy.node._WAIT", 0.0)
    command = [sys.executable, "-c", script, state / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"state/lock: in use by process .*, or use ano"):
            node(files[0])
        other.communicate("")
    node(files[0])


# A site's own word.

FIGURES = "privacy.share_metrics=true"
HELD = "data.client_test_share=0.5"


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("asked, key", [(FIGURES, "privacy.share_metrics"), (HELD, "data.client_test_share")])
def test_a_site_tells_no_figures_unless_it_says_so(server, node, asked, key, private):
    if asked == FIGURES and not private:
        return
    words, files, _ = server(asked, private=private)
    files[0].write_text(files[0].read_text().replace(", metrics: true", ""))
    assert meet(node(files[0]), words)["refused"].endswith(f"and the scenario asks for some by {key}")
    files[0].write_text(files[0].read_text().replace("own_code: false", "own_code: false, metrics: true"))
    assert meet(node(files[0]), words)["client"] == 0


@pytest.mark.parametrize("says", [True, False])
def test_the_loss_of_a_plain_run_leaves_only_a_site_that_says_so(server, node, says):
    words, files, train = server(private=False)
    if not says:
        files[0].write_text(files[0].read_text().replace(", metrics: true", ""))
    meet(made := node(files[0]), words)
    told = dict(made.answer("train", train(1), 0)["metrics"])
    assert set(told) == ({"num-examples", "train_loss"} if says else {"num-examples"})


def may_judge(server, *overrides):
    words, files, train = server(HELD, *overrides)
    files[0].write_text(files[0].read_text().replace("own_code: false", "own_code: false, metrics: true"))
    return words, files, train


def test_nothing_is_judged_where_the_scenario_holds_nothing_out(server, node):
    words, files, train = server()
    files[0].write_text(files[0].read_text().replace("own_code: false", "own_code: false, metrics: true"))
    meet(made := node(files[0]), words)
    assert refusal(made, train(1), "evaluate") == "the scenario holds no rows out to judge by"


def test_a_site_judges_once_a_round_whatever_adapter_it_is_asked_about_again(server, node, monkeypatch):
    words, files, train = may_judge(server)
    meet(made := node(files[0]), words)
    calls, judge = [], Worker.judge
    monkeypatch.setattr(Worker, "judge", lambda *told: calls.append(1) or judge(*told))
    first = wire.unpack_words(made.answer("evaluate", train(1), 0))
    assert first["loss"] > 0 and calls == [1]
    other = train(1)
    arrays = wire.from_arrays(other[wire.ARRAYS])
    other[wire.ARRAYS] = wire.to_arrays({n: t + 1 for n, t in arrays.items()})
    for again in (made, node(files[0])):  # and after a restart
        assert wire.unpack_words(again.answer("evaluate", other, 0)) == first and calls == [1]
    assert "whole number from 1 to 2" in refusal(made, train(3), "evaluate")
    assert wire.unpack_words(made.answer("evaluate", train(2), 0)).keys() == first.keys() and calls == [1, 1]


def test_a_site_judges_by_no_fewer_rows_than_a_floor(server, node):
    words, files, train = server("data.client_test_share=0.001")
    files[0].write_text(files[0].read_text().replace("own_code: false", "own_code: false, metrics: true"))
    assert "it judges by 20 rows of its own at least" in meet(made := node(files[0]), words)["refused"]
    assert refusal(made, train(1), "evaluate").startswith("not introduced")


def test_a_site_draws_the_rows_that_it_judges_by_itself(server, node):
    """The server's seed says nothing of them, another share gives other rows, and restarts keep them."""
    words, files, _ = may_judge(server)

    def held(run, **scenario):
        changed = {**words, "run": run, "scenario": {**words["scenario"], **scenario}}
        made = node(files[0])
        assert meet(made, changed).get("client") == 0
        return made.run.worker.dataset.held_out(0).rows.tolist()

    first = held("tiny-1")
    assert len(first) >= 20 and held("tiny-1") == held("tiny-2") == first
    other = held("tiny-3", data={**words["scenario"]["data"], "client_test_share": 0.55})
    assert not set(first) <= set(other)
    key = files[0].parent / "state" / "held.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.unlink()
    assert held("tiny-1") != first


def count_of(node, files, words, **change):
    told = meet(node(files[0]), {**words, **change})
    return {key: value for key, value in told.items() if key != "time"}


def test_the_answer_is_the_same_whether_rows_of_other_labels_are_there_or_not(server, node, caplog):
    words, files, _ = server()
    rows = files[0].parent / "train.csv"
    text = rows.read_text()
    asked = [{}, {"labels": ["good", "bad"]}, {"labels": ["bad", "hiv"]}, {"labels": ["bad", "good", "hiv"]}]
    asked += [{"labels": ["bad"]}, {"labels": []}, {"labels": ["bad", "bad"]}]
    before = [count_of(node, files, words, **change) for change in asked]
    rows.write_text(text + "one more,hiv\n")
    with caplog.at_level(logging.WARNING, logger="fedlora"):
        assert [count_of(node, files, words, **change) for change in asked] == before
    assert "1 rows are left out: their label is not in data.labels" in caplog.text and "hiv" not in caplog.text
    assert [told.get("num_examples") for told in before] == [before[0]["num_examples"]] * 2 + [None] * 5


def test_a_site_that_names_no_labels_is_asked_about_none(server, node):
    words, files, _ = server()
    files[0].write_text(files[0].read_text().replace(', labels: ["bad", "good"]', ""))
    assert (
        "does not say which labels it may be asked about (data.labels)" in meet(node(files[0]), words)["refused"]
    )


def test_a_name_stands_for_one_run(server, node, tiny):
    """Else what a plain run left behind would get into a private one of the same name."""
    words, files, _ = server(private=False)
    meet(node(files[0]), words)
    private = json.loads(json.dumps(tiny().model_dump()))
    private = {**words["scenario"], "privacy": private["privacy"], "clients": private["clients"]}
    why = meet(node(files[0]), {**words, "scenario": private})["refused"]
    assert why == "it knows another run by this name: a resumed one may change its rounds, and not much else"
    assert meet(node(files[0]), {**words, "scenario": {**words["scenario"], "rounds": 5}})["client"] == 0


def test_what_a_site_says_holds_nothing_of_a_failure(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)

    def fails(*_):
        raise RuntimeError("patient 17 has hiv")

    made.run.worker.client.fit = fails
    assert refusal(made, train(1)) == "training failed: its log says why"


def test_keys_of_noise_are_never_on_disk(server, node, monkeypatch):
    from fedlora.privacy.noise import fresh_key

    words, files, train = server()
    keys = []
    monkeypatch.setattr("fedlora.engine.worker.fresh_key", lambda: keys.append(fresh_key()) or keys[-1])
    meet(made := node(files[0]), words)
    assert refusal(made, train(1)) is None and len(keys) == 1
    written = [file.read_bytes() for file in files[0].parent.rglob("*") if file.is_file()]
    assert len(written) > 5
    assert not any(key in text or key.hex().encode() in text for key in keys for text in written)
