"""A site's side: what it refuses, what it pays, what it says."""

import json
import logging
import subprocess
from importlib.metadata import version

import pytest

from fedlora import ledger, simulation, wire
from fedlora.adapter import Instruction
from fedlora.deploy import signing
from fedlora.deploy.logs import Lines
from fedlora.deploy.node import Node
from fedlora.engine.worker import Worker
from fedlora.strategies.ffa_lora import FFALoRA


@pytest.fixture
def server(sites):
    """What a server sends: its introduction, and a round's instruction."""

    def make(*overrides, private=True):
        scenario, files = sites(*overrides, private=private)
        ready = simulation.prepare_server(scenario)
        worker = Worker(ready.setup)
        words = {
            "run": "tiny-1",
            "scenario": json.loads(json.dumps(ready.setup.scenario)),
            "labels": list(ready.data.labels),
            "version": version("fedlora"),
            "base": worker.base_fingerprint(),
            "adapter": worker.describe().fingerprint,
            "signature": None,
        }
        strategy = FFALoRA()
        strategy.bind(worker.task.layout, worker.task.kind, worker.task.initial, private)

        def train(round=1, **words):
            told = strategy.instruct(round, worker.task.initial)
            content = wire.pack_instruction(
                Instruction(round=round, adapter=told.adapter, train=told.train, send=told.send),
                worker.task.layout,
            )
            content[wire.REPORT] = wire.pack_words({"run": "tiny-1", "merged": 0, **words})[wire.REPORT]
            return content

        return words, files, train

    return make


@pytest.fixture
def node(tmp_path):
    return lambda file: Node(file, tmp_path / "app")


def meet(node, words):
    return wire.unpack_words(node.answer("query", wire.pack_words(words), 0))


def refusal(node, content, kind="train"):
    return wire.unpack_words(node.answer(kind, content, 0)).get("refused")


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


def test_what_is_wrong_with_its_data_stands_in_its_log_alone(server, node, caplog):
    words, files, _ = server()
    secret = files[0].parent / "train.csv"
    secret.write_text(secret.read_text().replace("text,label", "text,very private"))
    told = meet(node(files[0]), words)["refused"]
    assert told == "its data or machine do not fit the scenario (data.files.label): its log says why"
    assert "very private" in caplog.text and "site.yaml:" in caplog.text


def test_trains_for_those_who_signed_if_it_says_so(server, node, tmp_path):
    words, files, _ = server("data.labels=[bad, good]")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    files[0].write_text(files[0].read_text().replace("{own_code: false}", json.dumps({"submitters": [public]})))
    assert "nobody whom it knows has signed" in meet(node(files[0]), words)["refused"]
    signature = signing.sign(tmp_path / "key", words["scenario"], "tiny-1", tmp_path / "app")
    assert meet(node(files[0]), {**words, "signature": signature})["client"] == 0
    for change in ({"scenario": {**words["scenario"], "rounds": 99}}, {"run": "tiny-2"}):
        assert "nobody" in meet(node(files[0]), {**words, **change, "signature": signature})["refused"]
    other = meet(node(files[0]), {**words, "labels": ["good", "bad"], "signature": signature})
    assert "other labels than its scenario" in other["refused"]


def test_labels_that_nobody_signed_are_refused_where_submitters_are_named(server, node):
    words, files, _ = server()
    files[0].write_text(files[0].read_text().replace("{own_code: false}", "{submitters: [ssh-ed25519 AAAA]}"))
    assert "nobody has signed the run's labels" in meet(node(files[0]), words)["refused"]


def test_a_signature_is_checked_again_after_a_restart(server, node, tmp_path):
    words, files, train = server("data.labels=[bad, good]")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    public = (tmp_path / "key.pub").read_text().strip()
    files[0].write_text(files[0].read_text().replace("{own_code: false}", json.dumps({"submitters": [public]})))
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
    paid = ledger.replay(made.folder / "runs" / "tiny-1" / "privacy.jsonl")
    assert len(paid[0]) == 2 and made.served == 2
    assert "and 8 was promised" in refusal(made, train(2)) and made.failed == 1
    assert ledger.replay(made.folder / "runs" / "tiny-1" / "privacy.jsonl") == paid
    assert "and 8 was promised" in refusal(made, train(1))  # nor by asking for a round again: its noise is new


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
    assert not (made.folder / "runs" / "tiny-2" / "privacy.jsonl").exists()
    files[0].write_text(text)  # the site allows more by now, and says so without a restart
    meet(made, {**words, "run": "tiny-2"})
    assert refusal(made, train(1, run="tiny-2")) is None


def test_a_failure_that_was_paid_for_says_what_it_cost(server, node):
    words, files, train = server()
    meet(made := node(files[0]), words)
    made.run.worker.client.fit = lambda *_: 1 / 0
    told = wire.unpack_words(reply := made.answer("train", train(), 0))
    assert told["refused"] == "training failed: its log says why"
    (paid,) = ledger.replay(made.folder / "ledger" / "privacy.jsonl")[ledger.Own()]
    assert wire.unpack_event(reply) == paid


def test_a_message_of_an_unknown_run_and_one_that_lacks_merges_say_so(server, node):
    words, files, train = server(private=False)
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
