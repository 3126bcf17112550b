"""Secure aggregation over real nodes: what comes out is the mean, and what the server is told shows nobody."""

import contextlib
import json

import numpy as np
import pytest
from flwr.common.secure_aggregation.crypto.shamir import combine_shares

from fedlora import wire
from fedlora.adapter import Instruction, weighted_mean
from fedlora.deploy.node import Node
from fedlora.engine import Worker
from fedlora.errors import RoundError
from fedlora.privacy import ledger, secure
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from tests.deploy.federation import LocalGrid

MASKED = "secure_aggregation={range: 2.0, survivors: 0.66}"


class Recorded(LocalGrid):
    """Keeps all that nodes answer, and lets some of them fail in an exchange.

    Attributes:
        came: kind, node and content of every answer.
        fails: the nodes that fail, by kind.
    """

    came: list
    fails: dict

    def __init__(self, nodes, fails=()):
        super().__init__(nodes)
        self.came, self.fails = [], dict(fails)
        for number, node in nodes.items():
            self._record(number, node)

    def _record(self, number, node):
        answer = node.answer

        def recorded(kind, content, partition):
            if number in self.fails.get(kind, ()):
                raise ConnectionError("the site is gone")
            made = answer(kind, content, partition)
            self.came.append((kind, number, wire.from_bytes(wire.to_bytes(made))))
            return made

        node.answer = recorded


@pytest.fixture
def trained(monkeypatch):
    """What clients trained, by client: the server never sees it, the test does."""
    made, fit = {}, Worker.fit

    def watch(worker, instruction, client):
        update, report = fit(worker, instruction, client)
        made[client] = (instruction, update)
        return update, report

    monkeypatch.setattr(Worker, "fit", watch)
    return made


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def change(instruction, update):
    return np.concatenate([(update.adapter[n] - instruction.adapter[n]).ravel() for n in instruction.send])


def test_twenty_sites_of_which_five_drop_out_give_the_plain_mean_and_show_nobody(sites, nodes, deployed, trained):
    """One goes before it shares its keys, four before they send, and one that sent says no more."""
    scenario, files = sites(MASKED, "clients.total=20", "clients.batch_size=4", "rounds=1", private=False)
    grid = Recorded(nodes(files), {"query.shares": {3}, "train": {1, 7, 12, 20}, "query.reveal": {5}})
    run, engine = deployed(scenario, grid)

    gone = {2, 0, 6, 11, 19}  # node k is client k - 1
    told = {t["client"]: t["error"] for t in lines(run.folder, "clients.jsonl")}
    assert {client for client, error in told.items() if error} == gone
    sent = {client: trained[client] for client in sorted(set(range(20)) - gone)}
    expected = weighted_mean([update for _, update in sent.values()])
    (instruction, _) = sent[1]
    weights = {update.weight for _, update in sent.values()}
    assert len(weights) > 1 or weights == {9.0}
    alike = {n: np.mean([u.adapter[n] for _, u in sent.values()], axis=0) for n in expected}
    summed = engine_adapter(run)
    for name in instruction.send:
        np.testing.assert_allclose(summed[name], alike[name], rtol=0, atol=2.0 / 2**19 + 1e-6)

    # All that reached the server.
    words = b"".join(wire.to_bytes(content) for _, _, content in grid.came)
    assert not any(content.array_records or content.metric_records for _, _, content in grid.came)
    keys = {n - 1: wire.unpack_parts(c)["mask"] for kind, n, c in grid.came if kind == "query.keys"}
    names = {client: name for client, told in keys.items() for name in told}  # in this round
    assert len(set(names.values())) == 20 and not set(names.values()) & set(range(20))
    shares = {n - 1: wire.unpack_parts(c)["shares"] for kind, n, c in grid.came if kind == "query.reveal"}
    assert len(shares) == 14
    for kind, number, content in grid.came:
        if kind != "train":
            continue
        client = number - 1
        plain = change(*trained[client])
        assert all(tensor.tobytes() not in words for tensor in trained[client][1].adapter.values())
        vector = np.frombuffer(wire.unpack_parts(content)["masked"][names[client]], "<u4")
        seed = combine_shares([held[names[client]] for held in shares.values()])
        for seen in (vector, vector - secure.keystream(seed, len(vector))):  # and with the mask that it learns off
            assert abs(np.corrcoef(plain, seen.view(np.int32).astype(float))[0, 1]) < 5 / len(plain) ** 0.5
    for held in shares.values():  # nobody's two secrets are both told
        assert set(held) == {names[client] for client in range(20) if client != 2}
    assert engine.roster.late == 0


def engine_adapter(run):
    from fedlora.rounds import checkpoint

    return checkpoint.load(run.folder / "checkpoint").adapter


def test_a_private_run_is_paid_for_by_who_trained(sites, nodes, deployed):
    scenario, files = sites("secure_aggregation={survivors: 0.66}")
    grid = Recorded(made := nodes(files), {"query.shares": {1}})
    run, _ = deployed(scenario, grid)
    events = ledger.replay(run.folder / "privacy.jsonl")
    assert {client: len(spent) for client, spent in events.items()} == {1: 2, 2: 2, 3: 2}  # client 0 never trained
    assert made[1].epsilon == 0 and made[2].epsilon > 0
    assert run.summary["bytes_up_total"] > 0 and [t["clients"] for t in run.rounds] == [3, 3]


def test_clients_share_the_noise_out_over_sites(sites, nodes, deployed, trained):
    """The sum carries noise of standard deviation z C = 10, of which each of four sites adds a share."""
    whole = "privacy={unit: client, noise_multiplier: 20.0, delta: 1.0e-2, clip_norm: 0.5}"
    scenario, files = sites(whole, "clients.use=sgd", "rounds=1", "secure_aggregation={range: 1.0, noise: shared}")
    run, _ = deployed(scenario, grid := Recorded(nodes(files)))
    seen = [event for holder, spent in ledger.replay(run.folder / "privacy.jsonl").items() for event in spent
            if isinstance(holder, ledger.Whole)]  # fmt: skip
    assert len(seen) == 4 and all(19.5 < event.noise_multiplier < 20 for event in seen)
    assert run.summary["server_epsilon"] > 0 and "from the server, which follows" in run.summary["privacy"]
    instruction = trained[0][0]
    plain = sum(change(*made) for made in trained.values())
    after = engine_adapter(run)
    moved = np.concatenate([(after[n] - instruction.adapter[n]).ravel() for n in instruction.send]) * 4 - plain
    assert abs(moved.std() / 10 - 1) < 6 / (2 * len(moved)) ** 0.5  # z C = 10
    assert not any(content.metric_records for _, _, content in grid.came)


EXAMPLES = (
    "clients.local_steps=1",
    "rounds=1",
    "privacy={noise_multiplier: 2.0, delta: 1.0e-2}",
    "secure_aggregation={range: 4.0, noise: shared}",
)


def test_sites_share_out_the_noise_of_their_examples(sites, nodes, deployed, trained):
    """Four sites, of which three send at the least, and one may look. sigma 2 of the sum."""
    scenario, files = sites(*EXAMPLES)
    run, _ = deployed(scenario, Recorded(made := nodes(files)))
    events = ledger.replay(run.folder / "privacy.jsonl")
    assert set(events) == {0, 1, 2, 3} and all(e.sharers == 2 for spent in events.values() for e in spent)
    assert all(e.noise_multiplier == pytest.approx(2**0.5) for spent in events.values() for e in spent)
    assert run.summary["own_epsilon"] > run.summary["epsilon"] == run.summary["server_epsilon"] > 0
    ((mine,),) = made[1].account.ledger.events.values()
    assert mine.noise_multiplier == pytest.approx(2**0.5) and mine.sharers == 1  # its own part, whoever lies
    assert made[1].epsilon == run.summary["own_epsilon"]
    (said, *_) = ledger.statements(made[1].state.folder / "ledger")[1:]
    assert "Poisson sampling of examples" in said and "of those who sent" not in said
    assert made[1].run.epsilon(0) == pytest.approx(run.summary["epsilon"])
    plain = [change(*told) for _, told in sorted(trained.items())]
    after, instruction = engine_adapter(run), trained[0][0]
    moved = np.concatenate([(after[n] - instruction.adapter[n]).ravel() for n in instruction.send])
    np.testing.assert_allclose(moved, np.mean(plain, axis=0), atol=4 * 2.0**-19 + 1e-6)  # with their noise


def test_a_part_of_the_noise_enters_one_sum_and_is_paid_for(sites, nodes, deployed, tmp_path, monkeypatch):
    """The server dies with a sum open that one site was never asked to reveal for, and is resumed."""
    scenario, files = sites(*EXAMPLES)
    sent, fit, spend = {client: [] for client in range(4)}, Worker.fit, Budget.spend

    def watch(worker, instruction, client):
        update, report = fit(worker, instruction, client)
        sent[client].append(change(instruction, update))
        return update, report

    def dies(*_):
        monkeypatch.setattr(Budget, "spend", spend)
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "fit", watch)
    monkeypatch.setattr(Budget, "spend", dies)
    folder = tmp_path / "runs" / "run-1"
    for resume in (False, True):
        grid = Recorded(made := nodes(files), {} if resume else {"query.reveal": {1}})
        with contextlib.suppress(KeyboardInterrupt):
            deployed(scenario, grid, folder, resume=resume)
        for node in made.values():
            node.close()
    for client, (first, second) in sent.items():
        assert not np.array_equal(first, second)
        paid = [Ledger(files[client].parent / "state" / "ledger"), Ledger(folder)]
        assert [[e.steps for spent in kept.events.values() for e in spent] for kept in paid] == [[2], [2] * 4]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"example-noise": 1.9}, "asks for less noise than the 2"),
        ({"members": 3}, "another number of clients"),
        ({"members": 5}, "how many are in the round"),
    ],
)
def test_a_site_divides_no_more_noise_than_there_is(sites, nodes, deployed, wrong, words):
    scenario, files = sites(*EXAMPLES)
    made = nodes(files)
    answer = made[1].answer

    def less(kind, content, partition):
        if kind == "train":
            assert (content["config"]["example-noise"], content["config"]["members"]) == (pytest.approx(2.0), 4)
            content["config"].update(wrong)
        return answer(kind, content, partition)

    made[1].answer = less
    run, _ = deployed(scenario, LocalGrid(made))
    (bad,) = [t for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert bad["client"] == 0 and words in bad["error"] and run.rounds[0]["clients"] == 3


def test_a_site_heeds_nothing_that_takes_noise_out_of_a_sum_and_does_not_pay(sites, nodes, deployed):
    scenario, files = sites(*EXAMPLES)
    made, refused = nodes(files), {}
    answer = made[1].answer

    def lied(kind, content, partition):
        told = content.config_records.get("config", {})
        for name in ("clip-norm", "sum-noise", "count-noise", "proximal-mu", "train", "send") * (kind == "train"):
            before = dict(told)
            mask = np.unpackbits(np.frombuffer(told["train"], np.uint8))
            mask[np.flatnonzero(mask)[0]] = 0
            told[name] = np.packbits(mask).tobytes() if name in told else 1.0e-3
            refused[name] = wire.unpack_words(answer(kind, content, partition)).get("refused")
            told.clear()
            told.update(before)
            assert made[1].epsilon == 0
        return answer(kind, content, partition)

    made[1].answer = lied
    run, _ = deployed(scenario, LocalGrid(made))
    other = "the server asks for other tensors than the run's strategy trains and sends"
    words = ("clip-norm", "sum-noise", "count-noise", "proximal-mu")
    assert refused == {name: f"the server says {name}, and the run has none" for name in words} | dict.fromkeys(
        ("train", "send"), other
    )
    assert run.rounds[0]["clients"] == 4 and made[1].epsilon > 0  # of the honest question that came last


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"sum-noise": 19.0}, "less noise than the scenario's 20 times"),
        ({"clip-norm": 0.6}, "is not the scenario's 0.5"),
        ({"count-noise": 0.0}, "says count-noise, and the scenario has none"),
    ],
)
def test_a_site_adds_no_less_noise_than_its_scenario_says(sites, nodes, deployed, wrong, words):
    whole = "privacy={unit: client, noise_multiplier: 20.0, delta: 1.0e-2, clip_norm: 0.5}"
    scenario, files = sites(whole, "clients.use=sgd", "rounds=1", "secure_aggregation={range: 1.0, noise: shared}")
    made = nodes(files)
    answer = made[1].answer

    def less(kind, content, partition):
        if kind == "train":
            assert content["config"]["sum-noise"] == 20.0
            content["config"].update(wrong)
        return answer(kind, content, partition)

    made[1].answer = less
    run, _ = deployed(scenario, LocalGrid(made))
    (bad,) = [t for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert bad["client"] == 0 and words in bad["error"]
    assert run.rounds[0]["clients"] == 3


def test_a_site_whose_worker_died_between_two_exchanges_has_dropped_out(sites, nodes, deployed, tmp_path):
    scenario, files = sites(MASKED, "rounds=2", private=False)
    made = nodes(files)
    grid, answer = LocalGrid(made), made[1].answer

    def dies(kind, content, partition):
        if kind == "train":
            grid.nodes[1] = Node(files[0], tmp_path)
            return grid.nodes[1].answer(kind, content, partition)
        return answer(kind, content, partition)

    made[1].answer = dies
    run, _ = deployed(scenario, grid)
    errors = [(t["round"], t["client"], t["error"]) for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert [e[:2] for e in errors] == [(1, 0)] and "no masks for this round" in errors[0][2]
    assert [t["clients"] for t in run.rounds] == [3, 4]


@pytest.mark.parametrize(
    "fails, words",
    [
        ({"query.keys": {1, 2}}, "2 clients are there for secure aggregation: a sum takes 3"),
        ({"train": {1, 2, 3}}, "1 of 4 clients sent: too many dropped out"),
        ({"query.reveal": {1, 2}}, "2 of the 3 shares of a client came: too many dropped out"),
    ],
)
def test_too_few_are_a_failed_round_and_no_sum(sites, nodes, deployed, fails, words):
    scenario, files = sites(MASKED, private=False)
    with pytest.raises(RoundError, match=words):
        deployed(scenario, Recorded(nodes(files), fails))


@pytest.mark.parametrize(
    "kind, spoil, words",
    [
        ("query.keys", lambda parts: {"mask": {1: b"no key"}, "share": {1: b"no key"}}, "keys lacks or garbles"),
        ("query.shares", lambda parts: {"sealed": {}}, "shares is not what was asked for"),
        (
            "train",
            lambda parts: {"masked": {n: v[:-4] for n, v in parts["masked"].items()}},
            "masked is not what was asked for",
        ),
        ("query.shares", lambda parts: {"strange": {0: b""}}, "holds 'strange/0'"),
    ],
)
def test_an_answer_that_is_not_whole_drops_its_site_alone(sites, nodes, deployed, kind, spoil, words):
    scenario, files = sites(MASKED, "rounds=1", private=False)
    made = nodes(files)
    answer = made[2].answer

    def spoiled(asked, content, partition):
        reply = answer(asked, content, partition)
        return wire.pack_parts(spoil(wire.unpack_parts(reply))) if asked == kind else reply

    made[2].answer = spoiled
    run, _ = deployed(scenario, LocalGrid(made))
    (bad,) = [t for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert bad["client"] == 1 and words in bad["error"] and run.rounds[0]["clients"] == 3


def test_a_site_sends_nothing_that_is_not_masked_and_masks_once(sites, nodes, deployed):
    """A server that asks for an update by itself, or for a second one under the same masks, gets none."""
    scenario, files = sites(MASKED, "rounds=2", private=False)
    grid = Recorded(made := nodes(files))
    asked = []
    answer = made[1].answer

    def keeps(kind, content, partition):
        asked.append((kind, content))
        return answer(kind, content, partition)

    made[1].answer = keeps
    made[1].masks.forget = lambda run: None  # as if the run went on
    deployed(scenario, grid)
    train = [content for kind, content in asked if kind == "train"][-1]

    def refused(kind, content):
        return wire.unpack_words(made[1].answer(kind, content, 0)).get("refused", "")

    assert "second vector under the same masks" in refused("train", train)
    last = wire.unpack_instruction(train, made[1].run.worker.task.layout)
    again = wire.pack_instruction(Instruction(**{**vars(last), "round": 1}), made[1].run.worker.task.layout)
    again[wire.REPORT] = train[wire.REPORT]
    assert "no masks for this round" in refused("train", again)
    words = wire.pack_words({"run": "run-1", "round": 2})
    for round in (1, 2):
        again = wire.pack_parts({"you": {1: b""}})
        again[wire.REPORT] = wire.pack_words({"run": "run-1", "round": round})[wire.REPORT]
        assert f"has masked what it sends in round {round}" in refused("query.keys", again)
    for round, you in ((3, {1: b""}), (0, {1: b""}), ([1], {1: b""}), (1, {}), (1, {1: b"", 2: b""})):
        none = wire.pack_parts({"you": you})
        none[wire.REPORT] = wire.pack_words({"run": "run-1", "round": round})[wire.REPORT]
        assert "round" in refused("query.keys", none)
    assert "no exchange of nothing" in refused("query.nothing", words)
    reveal = wire.pack_parts({"sent": {0: b"", 1: b""}, "dropped": {2: b"", 3: b""}})
    reveal[wire.REPORT] = words[wire.REPORT]
    assert "single client" in refused("query.reveal", reveal)
