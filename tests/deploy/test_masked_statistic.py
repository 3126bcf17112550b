"""A statistic under masks at sites: the server learns one sum, and each site pays for what it adds to it."""

import json

import numpy as np
import pytest

from fedlora import prepare, wire, wire_base
from fedlora.deploy import cutting
from fedlora.errors import RoundError
from fedlora.privacy import accounting, ledger, secure
from tests.deploy.federation import LocalGrid, meet, refusal

GRAM = ("compress={use: lord, keep: 0.5}", "statistics={kind: gram, epsilon: 2}", "rounds=1")
MASKED = (*GRAM, "secure_aggregation={range: 8.0}")
SHARED = (*GRAM, "clients.local_steps=1", "secure_aggregation={range: 8.0, noise: shared}")
ASK = f"query.{wire_base.STATISTIC}"


@pytest.fixture
def taken(monkeypatch):
    """What sites summed, with their noise: the server never sees it, the test does."""
    made, took = [], cutting._taken

    def watch(*told):
        made.append(took(*told))
        return made[-1]

    monkeypatch.setattr(cutting, "_taken", watch)
    return made


@pytest.fixture
def known(monkeypatch):
    """What the base is cut by."""
    from fedlora.compressors import contract

    seen, compress = [], contract.compress

    def watch(compressor, weights, known):
        seen.append(known)
        return compress(compressor, weights, known)

    monkeypatch.setattr(contract, "compress", watch)
    return seen


def through(node, then):
    """Have `then` see what a node is asked, and answer in its place where it says something."""
    answer = node.answer

    def told(kind, content, partition):
        return then(kind, content) or answer(kind, content, partition)

    node.answer = told


def goes(at):
    """A site that is gone when it is asked that."""

    def gone(kind, content):
        if kind == at:
            raise ConnectionError("the site is gone")

    return gone


def statistic(run):
    return json.loads((run.folder / "base" / "manifest.json").read_text())["statistic"]


def paid(node):
    file = node.state.folder / "ledger" / "privacy.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("gone", [None, "query.shares", ASK, "query.reveal"])
def test_the_sum_is_that_of_the_sites_that_sent_and_shows_nobody(sites, nodes, deployed, taken, known, gone):
    scenario, files = sites(*MASKED)
    grid = LocalGrid(made := nodes(files))
    came = []
    for node in made.values():
        answer = node.answer
        node.answer = lambda *told, answer=answer: came.append((told[0], answer(*told))) or came[-1][1]
    if gone is not None:
        before = made[2].answer
        silent = iter([True])  # in the statistic's round alone
        made[2].answer = lambda kind, *told: (
            goes(gone)(kind, None) if kind == gone and next(silent, False) else before(kind, *told)
        )
    run, _ = deployed(scenario, grid)

    left = 4 if gone in (None, "query.reveal") else 3
    assert statistic(run)["clients"] == left and len(taken) == left
    (by,) = known
    one, layer = next((n, s) for n, s in by.items() if n.endswith("layer.0.attention.self.query"))
    plain = sum(values for sums, _ in taken for name, values in sums.items() if name.endswith(one))
    held = sum(made[n].run.worker.dataset.units(n - 1) for n in made if left == 4 or n != 2)
    assert layer.values * held == pytest.approx(plain, abs=left * 200 / 2**19)
    assert layer.deviation * held == pytest.approx(prepare.statistic(scenario).noise_multiplier * left**0.5)
    masked = [content for kind, content in came if kind == ASK]
    assert not any(content.array_records for content in masked) and len(masked) == left
    for (sums, _), content in zip(taken, masked, strict=True):
        flat = np.concatenate([sums[n][np.triu_indices(len(sums[n]))] for n in sorted(sums)])
        (vector,) = wire.unpack_parts(content)["masked"].values()
        shown = np.frombuffer(vector, "<i4").astype(float)
        assert len(shown) == len(flat) and abs(np.corrcoef(flat, shown)[0, 1]) < 5 / len(flat) ** 0.5


def test_each_site_pays_once_and_the_server_s_ledger_says_the_same(sites, nodes, deployed):
    scenario, files = sites(*MASKED)
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    there, event = ledger.replay(run.folder / "privacy.jsonl"), prepare.statistic(scenario)
    for client, node in enumerate(made.values()):
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")[client]
        assert here == there[client] and accounting.alike(here, event) == 1
        assert [line["round"] for line in paid(node)] == [0, 1]
    assert 7.9 < run.summary["epsilon"] <= 8.0 and run.summary["failures"] == 0


def test_sites_share_the_noise_of_the_statistic_out(sites, nodes, deployed, known):
    """Of four sites three send at the least, of whom one may look: K = 2."""
    scenario, files = sites(*SHARED)
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    sigma = prepare.statistic(scenario).noise_multiplier * 2**0.5
    for spent in ledger.replay(run.folder / "privacy.jsonl").values():
        assert spent[0].noise_multiplier == pytest.approx(sigma / 2**0.5) and spent[0].sharers == 2
    assert paid(made[1])[0].get("sharers", 1) == 1  # its account counts its own part alone
    assert 7.9 < run.summary["epsilon"] <= 8.0 + 1e-9 and run.summary["own_epsilon"] > 8
    held = sum(node.run.worker.dataset.units(n - 1) for n, node in made.items())
    (by,) = known
    assert next(iter(by.values())).deviation * held == pytest.approx(sigma * 2**0.5)  # four parts of K = 2
    assert not list((made[1].state.folder / "runs" / "run-1").glob("answer-0"))


def test_too_few_are_no_statistic_and_what_they_paid_counts(sites, nodes, deployed, tmp_path):
    scenario, files = sites(*MASKED)
    made = nodes(files)
    for number in (1, 2):
        through(made[number], goes("query.reveal"))
    with pytest.raises(RoundError, match="too many dropped out"):
        deployed(scenario, LocalGrid(made))
    assert len(ledger.replay(tmp_path / "runs" / "run-1" / "privacy.jsonl")) == 4


@pytest.mark.parametrize("masks, again", [(MASKED, True), (SHARED, False)], ids=["own", "shared"])
def test_asked_again_its_own_noise_is_the_same_and_a_part_is_drawn_and_paid_anew(
    sites, nodes, deployed, taken, tmp_path, masks, again
):
    """The server dies before the sum is opened, and the sites' workers are restarted."""
    scenario, files = sites(*masks, "privacy={noise_multiplier: 3.0, delta: 1.0e-3}")
    first = nodes(files)
    for node in first.values():
        through(node, goes("query.reveal"))
    with pytest.raises(RoundError):
        deployed(scenario, LocalGrid(first))
    [node.close() for node in first.values()]
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)), tmp_path / "runs" / "run-1", resume=True)
    for client, node in enumerate(made.values()):
        rounds = [line["round"] for line in paid(node)]
        assert rounds == ([0, 1] if again else [0, 0, 1])
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")[client]
        assert sum(e.steps for e in ledger.replay(run.folder / "privacy.jsonl")[client]) == sum(
            e.steps for e in here
        )
    assert len(taken) == (4 if again else 8)


@pytest.mark.parametrize("asked", [{"units": 16}, {}])
def test_a_site_sends_no_statistic_that_is_not_masked(server, node, asked):
    words, files, _ = server(*MASKED)
    meet(made := node(files[0]), words)
    refused = refusal(made, wire.pack_words({"run": "tiny-1", "round": 0, **asked}), ASK)
    assert "no masks for this round" in refused and not paid(made)


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda parts, words: words.update(units=0), "units in a message is a whole number from 1"),
        (lambda parts, words: words.update(units=2**30), "steps of the grid"),
        (lambda parts, words: parts.update(members={2: b""}), "a number of clients that cannot be"),
    ],
)
def test_a_server_that_lies_gets_no_part_of_noise_that_is_too_little(sites, nodes, deployed, spoil, why):
    scenario, files = sites(*SHARED)
    made, said = nodes(files), []
    answer = made[1].answer

    def lied(kind, content, partition):
        if kind != ASK:
            return answer(kind, content, partition)
        parts, words = wire.unpack_parts(content), wire.unpack_words(content)
        spoil(parts, words)
        told = wire.pack_words(words)
        reply = answer(kind, wire.RecordDict({**told, **wire.pack_parts(parts)}), partition)
        said.append((wire.unpack_words(reply).get("refused"), len(paid(made[1]))))
        return reply

    made[1].answer = lied
    run, _ = deployed(scenario, LocalGrid(made))
    ((refused, lines),) = said
    assert why in refused and lines == 0 and statistic(run)["clients"] == 3


def test_there_is_no_round_before_the_first_without_a_statistic(server, node, tmp_path):
    words, files, _ = server("secure_aggregation={range: 8.0}")
    meet(made := node(files[0]), words)
    keys = wire.pack_parts({"you": {1: b""}})
    asked = wire.RecordDict({**wire.pack_words({"run": "tiny-1", "round": 0}), **keys})
    assert "round in a message is a whole number from 1" in refusal(made, asked, f"query.{secure.KEYS}")
