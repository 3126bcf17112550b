"""The server's side of a deployment, against real nodes."""

import json
import re
import shutil
import time
from importlib.metadata import version

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from fedlora import prepare, simulate, wire
from fedlora.cli import main
from fedlora.deploy.node import Node
from fedlora.engine import roster
from fedlora.engine.roster import Roster
from fedlora.errors import ContractError, RoundError, SettingError
from fedlora.privacy import accounting, ledger
from fedlora.privacy.accounting import Event
from fedlora.privacy.budget import Budget
from fedlora.rounds.loop import Loop
from tests.deploy.federation import LocalGrid


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "use, more",
    [
        ("ffa_lora", ()),
        ("ffa_lora", ("clients.optimizer={kind: adamw, state: averaged}",)),
        ("ffa_lora", ("model.adapter.schedule={kind: nested}", "clients.ranks={kind: list, values: [2, 4]}")),
        ("ffa_lora", ("model.adapter.schedule={kind: grow, every: 1}", "model.adapter.kind=core")),
        ("ffa_lora", ("model.adapter.schedule={kind: probe}", "model.adapter.kind={peft: RandLoraConfig}")),
        ("fedex_lora", ()),
        ("fedsa_lora", ("data.client_test_share=0.5",)),
        ("fedask", ()),
        ("flwr.serverapp.strategy:FedMedian", ()),
    ],
)
def test_sites_give_what_a_simulation_gives_bit_for_bit(
    sites, nodes, deployed, tiny, tmp_path, use, more, monkeypatch
):
    """The same files, the same order, no noise: nothing may differ, merges, kept factors and trips included.

    Sites draw by a key of their own which rows they hold out; for once it is the simulation's seed.
    """
    told = prepare.prepare_site

    def alike(scenario, labels, rows, client, own, **placed):
        return told(scenario, labels, rows, client, scenario.seed, **placed)

    monkeypatch.setattr(prepare, "prepare_site", alike)
    scenario, files = sites(f"strategy.use={use}", *more, private=False)
    run, engine = deployed(scenario, LocalGrid(nodes(files)))
    plain = simulate(tiny(f"strategy.use={use}", *more, private=False), out=tmp_path / "plain")
    one, other = adapter(run.folder), adapter(plain.folder)
    assert set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)
    assert run.summary["accuracy"] == pytest.approx(plain.summary["accuracy"], abs=1e-6)
    assert run.summary["failures"] == 0 and engine.roster.late == 0


@pytest.mark.parametrize(
    "use, up, down",
    [
        ("ffa_lora", "{kind: int4}", "{kind: int8}"),
        ("fedavg_lora", "{kind: top_k, share: 0.2}", "null"),
        ("fedask", "{kind: bf16}", "{kind: fp16}"),
        ("flwr.serverapp.strategy:FedMedian", "{kind: int8}", "{kind: fp16}"),
    ],
)
def test_compressed_sites_give_what_a_simulation_gives_bit_for_bit(
    sites, nodes, deployed, tiny, tmp_path, use, up, down
):
    told = (f"strategy.use={use}", f"compression={{up: {up}, down: {down}}}")
    scenario, files = sites(*told, private=False)
    run, _ = deployed(scenario, LocalGrid(nodes(files)))
    plain = simulate(tiny(*told, private=False), out=tmp_path / "plain")
    one, other = adapter(run.folder), adapter(plain.folder)
    assert set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)
    assert run.summary["failures"] == 0
    for here, there in zip(run.clients, plain.clients, strict=True):  # a message to a site names its run too
        assert here["bytes_up"] == pytest.approx(there["bytes_up"], abs=6)
        assert 0 < here["bytes_down"] - there["bytes_down"] < 200


def test_a_server_of_sites_keeps_the_round_that_a_simulation_keeps(sites, nodes, deployed, tiny, tmp_path):
    told = ("data.validation_share=0.5", "keep={best: loss}", "stop={patience: 1}", "rounds=5", "clients.lr=30")
    scenario, files = sites(*told, private=False)
    run, _ = deployed(scenario, LocalGrid(nodes(files)))
    plain = simulate(tiny(*told, private=False), out=tmp_path / "plain")
    one, other = adapter(run.folder), adapter(plain.folder)
    assert set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)
    for key in ("rounds", "best_round", "validation_examples", "test_examples", "ended"):
        assert run.summary[key] == plain.summary[key]
    assert run.summary["rounds"] < 5 and run.state == "finished"
    assert run.summary["validation_loss"] == pytest.approx(plain.summary["validation_loss"], abs=1e-6)


def test_a_private_run_is_accounted_for_on_both_sides(sites, nodes, deployed, tmp_path):
    scenario, files = sites()
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    events = ledger.replay(run.folder / "privacy.jsonl")
    assert {client: len(e) for client, e in events.items()} == {0: 2, 1: 2, 2: 2, 3: 2}
    assert 0 < run.summary["epsilon"] <= 8.0 and "from the operating system" in run.summary["privacy"]
    for client, node in enumerate(made.values()):
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")
        assert here == {client: events[client]}
        assert ledger.replay(node.state.folder / "ledger" / "privacy.jsonl") == {ledger.Own(): events[client]}
        assert node.epsilon == pytest.approx(ledger.epsilon_of(node.state.folder / "ledger" / "privacy.jsonl"))


def test_a_site_watches_its_own_rounds(sites, nodes, deployed, capsys, monkeypatch):
    scenario, files = sites()
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    monkeypatch.setenv("COLUMNS", "120")
    own = made[2].state.folder / "runs" / "run-1"
    assert main(["watch", str(own)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "/2 " in line]
    spent = [t["epsilon"] for t in lines(run.folder, "clients.jsonl") if t["client"] == 1]
    assert [(row[0], row[1], row[-3]) for row in rows] == [(f"{r}/2", "1", f"{spent[r - 1]:.3f}") for r in (1, 2)]


def test_noise_at_sites_is_nobodys_to_repeat(sites, nodes, deployed, tmp_path):
    scenario, files = sites("rounds=1")
    runs = [deployed(scenario, LocalGrid(nodes(files)), tmp_path / f"run-{k}")[0] for k in (1, 2)]
    one, other = (adapter(run.folder) for run in runs)
    assert all((one[n] != other[n]).any() for n in one if "lora_B" in n)


def test_a_site_that_says_nothing_is_missed_at_the_deadline_and_its_late_reply_is_dropped(sites, nodes, deployed):
    scenario, files = sites()
    run, engine = deployed(scenario, LocalGrid(nodes(files), late={2}), deadline=3.0)
    told = lines(run.folder, "clients.jsonl")
    assert [(t["round"], t["client"], t["error"]) for t in told if t["error"]] == [
        (1, 1, "no reply within 3 s"),
        (2, 1, "no reply within 3 s"),
    ]
    assert engine.roster.late == 2  # that of round 2 came while the run ended
    assert len(ledger.replay(run.folder / "privacy.jsonl")[1]) == 2  # it trained, for all the server knows


@pytest.mark.parametrize("more", [(), ("privacy.bands=2", "rounds=3")])
@pytest.mark.parametrize("dies", ["before it pays", "before it saves"])
def test_an_interrupted_run_ends_within_its_epsilon_and_all_ledgers_agree(
    sites, nodes, deployed, tmp_path, monkeypatch, more, dies
):
    """The server dies in each round once, after its sites have trained."""
    scenario, files = sites(*more)
    grid, folder, died = LocalGrid(made := nodes(files)), tmp_path / "runs" / "run-1", set()
    where = (Budget, "spend") if dies == "before it pays" else (Loop, "_record")
    original = getattr(*where)

    def killed(self, what, *rest):
        round = what if isinstance(what, int) else what.round
        if round not in died:
            died.add(round)
            raise RuntimeError("killed")
        return original(self, what, *rest)

    monkeypatch.setattr(*where, killed)
    for _ in range(scenario.rounds):
        with pytest.raises(RuntimeError, match="killed"):
            deployed(scenario, grid, folder, resume=folder.exists())
        for node in made.values():
            node.close() if not more else None  # banded noise has its key in memory
    run, _ = deployed(scenario, grid, folder, resume=True)
    assert (
        run.summary["failures"] == 0 and run.summary["rounds"] == scenario.rounds and len(died) == scenario.rounds
    )
    assert 7 < run.summary["epsilon"] <= 8.0
    for client, node in enumerate(made.values()):
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")
        there = ledger.replay(run.folder / "privacy.jsonl")[client]
        assert len(here[client]) == scenario.rounds and here[client] == there


def test_a_banded_release_that_is_made_again_under_another_key_pays_a_turn_of_its_own(
    sites, nodes, deployed, tmp_path, monkeypatch
):
    """The server died three times in the second of two rounds: its group had four turns, the other one."""
    asked = (
        "privacy={unit: client, noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01, bands: 2, epsilon: null}"
    )
    scenario, files = sites(asked, "clients.per_round=2", "clients.use=sgd", "rounds=2", private=True)
    grid, folder, deaths = LocalGrid(nodes(files)), tmp_path / "runs" / "run-1", []
    original = Loop._record

    def killed(self, round, *rest):
        if round == 2 and len(deaths) < 3:
            deaths.append(round)
            raise RuntimeError("killed")
        return original(self, round, *rest)

    monkeypatch.setattr(Loop, "_record", killed)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="killed"):
            deployed(scenario, grid, folder, resume=folder.exists())
    run, _ = deployed(scenario, grid, folder, resume=True)
    told = lines(folder, "privacy.jsonl")
    assert [(line["round"], line.get("bands", 1)) for line in told] == [(1, 2), (2, 2), (2, 1), (2, 1), (2, 1)]
    turn = Event(noise_multiplier=3.0, sample_rate=told[0]["sample_rate"], steps=4, clip_norm=0.01)
    assert run.summary["epsilon"] == pytest.approx(accounting.epsilon([turn], 1e-3), rel=1e-9)


@pytest.mark.parametrize("opened", [True, False])
def test_under_masks_an_answer_is_given_again_until_a_sum_of_it_may_be_open(
    sites, nodes, deployed, tmp_path, monkeypatch, opened
):
    """Then sites train once more, for which a reserve of rounds has room."""
    scenario, files = sites("secure_aggregation={survivors: 0.7}", "privacy.reserve=1")
    grid, folder = LocalGrid(made := nodes(files)), tmp_path / "runs" / "run-1"

    def dies(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        if opened:
            patch.setattr(Budget, "spend", dies)
        else:
            send = LocalGrid.push_messages

            def cut(self, messages):
                told = list(messages)
                if any(message.metadata.message_type == "query.reveal" for message in told):
                    dies()
                return send(self, told)

            patch.setattr(LocalGrid, "push_messages", cut)
        with pytest.raises(RuntimeError, match="killed"):
            deployed(scenario, grid, folder)
    kept = [bool(list(node.state.folder.rglob("answer-*"))) for node in made.values()]
    assert kept == [not opened] * 4
    for node in made.values():
        node.masks.__init__()  # its worker was started again
    run, _ = deployed(scenario, grid, folder, resume=True)
    assert run.summary["failures"] == 0 and run.summary["epsilon"] <= 8.0
    for client, node in enumerate(made.values()):
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")[client]
        there = ledger.replay(run.folder / "privacy.jsonl")[client]
        assert len(here) == 2 + opened and sum(e.steps for e in here) == sum(e.steps for e in there)


@pytest.mark.parametrize("lost", ["put back", "gone"])
def test_a_site_that_lost_its_ledger_trains_for_no_less_in_the_server_s(sites, nodes, deployed, tmp_path, lost):
    scenario, files = sites("rounds=4", "clients.local_steps=1")
    made = nodes(files)
    state, copy, answer = made[1].state.folder, tmp_path / "copy", made[1].answer

    def restored(kind, content, partition):
        round = wire.unpack_instruction(content, made[1].run.worker.task.layout).round if kind == "train" else 0
        if round == 2:
            shutil.copytree(state, copy)
        if round == 4:
            made[1].close()
            shutil.rmtree(state / "runs" if lost == "put back" else state)
            if lost == "put back":
                shutil.rmtree(state)
                shutil.copytree(copy, state)
            else:
                (state / "runs" / "run-1").mkdir(parents=True)
                shutil.copy(copy / "runs" / "run-1" / "run.json", state / "runs" / "run-1")
            made[1]._read_site()
        return answer(kind, content, partition)

    made[1].answer = restored
    run, _ = deployed(scenario, LocalGrid(made))
    assert run.summary["failures"] == 0
    assert sum(e.steps for e in ledger.replay(run.folder / "privacy.jsonl")[0]) == 4


def test_what_a_server_did_not_hear_of_stands_in_its_ledger_when_it_hears_again(sites, nodes, deployed, tmp_path):
    """A site has paid for a question that its server, which lost its disk, has never asked."""
    scenario, files = sites("privacy={noise_multiplier: 3.0, delta: 1.0e-3}", "rounds=1")
    grid = LocalGrid(made := nodes(files))
    deployed(scenario, grid)
    shutil.rmtree(tmp_path / "runs" / "run-1")
    changed = scenario.model_copy(update={"rounds": 2})
    for node in made.values():
        for answer in node.state.folder.rglob("answer-*"):
            answer.unlink()
    run, _ = deployed(changed, grid)
    for client, node in enumerate(made.values()):
        here = ledger.replay(node.state.folder / "runs" / "run-1" / "privacy.jsonl")[client]
        there = ledger.replay(run.folder / "privacy.jsonl")[client]
        assert sum(e.steps for e in here) == sum(e.steps for e in there) == 6
        assert [e.steps for e in there] == [4, 2]


def test_a_site_that_is_not_there_is_a_failure_and_one_that_comes_joins(sites, nodes, deployed):
    scenario, files = sites("rounds=3")
    made = nodes(files)
    grid, away = LocalGrid({n: made[n] for n in (1, 2, 4)}), made[3]
    answer = made[1].answer

    def comes(kind, content, partition):
        if kind == "train" and wire.unpack_instruction(content, made[1].run.worker.task.layout).round == 1:
            grid.nodes[3] = away
        return answer(kind, content, partition)

    made[1].answer = comes
    run, _ = deployed(scenario, grid)
    missing = [t["round"] for t in lines(run.folder, "clients.jsonl") if t["client"] == 2 and t["error"]]
    assert missing == [1] and [t["clients"] for t in run.rounds] == [3, 4, 4]


def test_a_full_disk_at_a_site_costs_its_replies_until_there_is_room(sites, nodes, deployed, largest_file):
    """It cannot pay, so it does not train; its worker stays up, and its ledgers go on whole."""
    scenario, files = sites("rounds=4")
    made = nodes(files)
    answer = made[3].answer

    def full(kind, content, partition):
        asked = kind == "train" and wire.unpack_instruction(content, made[3].run.worker.task.layout).round
        largest_file(*([100] if asked in (2, 3) else []))
        try:
            return answer(kind, content, partition)
        finally:
            largest_file()

    made[3].answer = full
    run, _ = deployed(scenario, LocalGrid(made))
    errors = [(t["round"], t["client"], t["error"]) for t in lines(run.folder, "clients.jsonl") if t["error"]]
    why = "its ledger cannot be written: its log says why"
    assert errors == [(2, 2, why), (3, 2, why)] and [t["clients"] for t in run.rounds] == [4, 3, 3, 4]
    own = [made[3].state.folder / folder / "privacy.jsonl" for folder in ("ledger", "runs/run-1")]
    assert [sum(map(len, ledger.replay(file).values())) for file in own] == [2, 2]
    assert len(ledger.replay(run.folder / "privacy.jsonl")[2]) == 2  # it said that it did not train


def test_a_node_that_lost_its_process_goes_on_from_its_disk(sites, nodes, deployed, tmp_path):
    scenario, files = sites("strategy.use=fedex_lora", "rounds=3", private=False)
    made = nodes(files)
    grid, count = LocalGrid(made), {"train": 0}
    answer = made[1].answer

    def dies(kind, content, partition):
        count[kind] = count.get(kind, 0) + 1
        if kind == "train" and count["train"] == 2:
            grid.nodes[1] = Node(files[0], tmp_path)  # a process that was never introduced
            return grid.nodes[1].answer(kind, content, partition)
        return answer(kind, content, partition)

    made[1].answer = dies
    run, _ = deployed(scenario, grid)
    whole, _ = deployed(scenario, LocalGrid(nodes(files)), tmp_path / "runs" / "whole")
    one, other = adapter(run.folder), adapter(whole.folder)
    assert run.summary["failures"] == 0 and all(np.array_equal(one[n], other[n]) for n in one)


def test_a_node_that_lost_its_disk_is_introduced_again(sites, nodes, deployed, tmp_path):
    import shutil

    scenario, files = sites("strategy.use=fedex_lora", "rounds=4", private=False)
    made = nodes(files)
    grid, count = LocalGrid(made), {"train": 0}
    answer = made[1].answer

    def loses(kind, content, partition):
        count["train"] += kind == "train"
        if kind == "train" and count["train"] == 2:
            shutil.rmtree(made[1].state.folder)
            grid.nodes[1] = Node(files[0], tmp_path)
            return grid.nodes[1].answer(kind, content, partition)
        return answer(kind, content, partition)

    made[1].answer = loses
    run, _ = deployed(scenario, grid)
    errors = [(t["round"], t["error"]) for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert [round for round, _ in errors] == [2] and errors[0][1].startswith("not introduced")
    assert [t["clients"] for t in run.rounds] == [4, 3, 4, 4]


def test_a_resumed_run_goes_on_where_its_sites_are_ahead(sites, nodes, deployed, tiny, tmp_path):
    """The server lost a round that the sites had folded in: they fall back with it."""
    scenario, files = sites("strategy.use=fedex_lora", "rounds=3", private=False)
    grid = LocalGrid(nodes(files))
    whole, _ = deployed(scenario, LocalGrid(nodes(files)), tmp_path / "runs" / "whole")
    import shutil

    folder = tmp_path / "runs" / "run-1"
    two = scenario.model_copy(update={"rounds": 2})
    one = scenario.model_copy(update={"rounds": 1})
    deployed(one, grid, folder)
    shutil.copytree(folder, tmp_path / "after-one")
    deployed(two, grid, folder, resume=True)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "after-one", folder)
    run, _ = deployed(scenario, grid, folder, resume=True)
    a, b = adapter(run.folder), adapter(whole.folder)
    assert all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda c: c.__setitem__("metrics", MetricRecord({"num-examples": -1.0})), "no positive"),
        (lambda c: c.__setitem__("arrays", ArrayRecord()), "exactly the tensors"),
        (lambda c: c.__setitem__("fedlora", ConfigRecord({"privacy": "{"})), "not JSON"),
        (lambda c: c.__setitem__("fedlora", ConfigRecord({"privacy": "{}"})), "garbles"),
    ],
)
def test_a_reply_that_is_not_as_asked_is_a_failure_that_is_paid_for(sites, nodes, deployed, spoil, words):
    scenario, files = sites("rounds=1")

    def altered(content):
        if "arrays" in content:
            spoil(content)
        return content

    run, _ = deployed(scenario, LocalGrid(nodes(files), altered={2: altered}))
    (bad,) = [t for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert bad["client"] == 1 and words in bad["error"]
    assert len(ledger.replay(run.folder / "privacy.jsonl")[1]) == 1


def test_a_reply_that_names_no_cost_is_paid_for_all_the_same(sites, nodes, deployed):
    scenario, files = sites("rounds=1")

    def silent(content):
        if "arrays" in content:
            del content["fedlora"]
        return content

    run, _ = deployed(scenario, LocalGrid(nodes(files), altered={2: silent}))
    events = ledger.replay(run.folder / "privacy.jsonl")
    assert run.summary["failures"] == 0 and len(events[1]) == 1 and events[1][0].steps == 2


def test_a_client_that_did_not_clip_is_refused_where_clients_are_protected_whole(sites, nodes, deployed):
    overrides = ("privacy.unit=client", "privacy.epsilon=50", "privacy.delta=1e-3", "clients.use=sgd", "rounds=1")
    scenario, files = sites(*overrides)

    def louder(content):
        if "arrays" in content:
            arrays = wire.from_arrays(content["arrays"])
            content["arrays"] = wire.to_arrays({n: t + 100 for n, t in arrays.items()})
        return content

    run, _ = deployed(scenario, LocalGrid(nodes(files), altered={3: louder}))
    (bad,) = [t for t in lines(run.folder, "clients.jsonl") if t["error"]]
    assert bad["client"] == 2 and "longer than the bound, 1," in bad["error"]
    assert "from the operating system" in run.summary["privacy"]


@pytest.mark.parametrize(
    "says",
    [
        {"loss": 10**400},
        {"loss": float("nan")},
        {"accuracy": "1"},
        {"mcc": "1"},
        {"mcc": float("inf")},
        {"refused": "no"},
    ],
    ids=str,
)
def test_a_site_that_judges_nonsense_counts_for_nothing(sites, nodes, deployed, caplog, says):
    scenario, files = sites("data.client_test_share=0.5", "rounds=1", "metrics=[mcc, auroc]", private=False)

    def lies(content):
        words = wire.unpack_words(content)
        return wire.pack_words({**words, **says}) if "loss" in words else content

    run, _ = deployed(scenario, LocalGrid(nodes(files), altered={2: lies}))
    assert "client 1 (site-1) did not judge" in caplog.text
    assert 0 < run.rounds[0]["local_loss"] < 9 and 0 <= run.rounds[0]["local_accuracy"] <= 1
    own = {line["client"]: line for line in run.clients}
    assert "local_mcc" not in own[1] and all(-1 <= own[c]["local_mcc"] <= 1 for c in own if c != 1)


@pytest.mark.parametrize(
    "says, words",
    [
        ({"num_examples": 10**400}, "num_examples in a message is a whole number from 1 to"),
        ({"num_examples": True}, "num_examples in a message is a whole number from 1 to"),
        ({"num_examples": 0}, "num_examples in a message is a whole number from 1 to"),
        ({"client": True}, "client in a message is a whole number from 0 to 3"),
        ({"client": 4}, "client in a message is a whole number from 0 to 3"),
        ({"event": {"steps": 10**400}}, "privacy event"),
    ],
    ids=str,
)
def test_a_site_that_introduces_itself_as_nonsense_is_turned_away(says, words):
    roster = Roster(LocalGrid({}), 4, deadline=60.0, join=0.0)
    good = {"client": 1, "name": "site-1", "num_examples": 45, "event": None}
    assert roster._introduced(7, good).num_examples == 45
    with pytest.raises(ContractError, match=words):
        roster._introduced(7, {**good, **says})


class Unreadable(LocalGrid):
    """Of some nodes each reply is what Flower's reader trips over, when all of a request are lost."""

    broken, kinds = frozenset({2}), ("train",)

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        told = zip(ids, messages, strict=True)
        self.bad = getattr(self, "bad", set()) | {
            i for i, m in told if m.metadata.dst_node_id in self.broken and m.metadata.message_type in self.kinds
        }
        return ids

    def pull_messages(self, message_ids):
        made = super().pull_messages(message_ids)
        if {reply.metadata.reply_to_message_id for reply in made} & self.bad:
            raise ValueError("Invalid object content")
        return made


@pytest.mark.parametrize("masked", [False, True])
def test_a_reply_that_flower_cannot_read_costs_its_node_alone(sites, nodes, deployed, masked):
    more = ("secure_aggregation={survivors: 0.7}",) if masked else ()
    scenario, files = sites(*more, private=False)
    run, _ = deployed(scenario, Unreadable(nodes(files)))
    assert [(line["clients"], line["failures"]) for line in run.rounds] == [(3, 1), (3, 1)]
    errors = {line["error"] for line in lines(run.folder, "clients.jsonl") if line["error"]}
    assert len(errors) == 1 and "its reply cannot be read" in errors.pop()


def test_of_many_nodes_it_costs_a_piece_once_and_then_its_node_alone():
    """Flower lets go of all replies of a request in which one cannot be read; few are asked for one by one."""
    assert [*roster.batches(["a", "b"])] == [["a"], ["b"]] and [*roster.batches([])] == []
    many = [str(i) for i in range(1000)]
    assert [len(piece) for piece in roster.batches(many)] == [50] * 20
    assert {len(piece) for piece in roster.batches([*many] * 5)} == {100}

    asked = []

    class Grid:
        def pull_messages(self, ids):
            asked.append(list(ids))
            if "7" in ids:
                raise ValueError("Invalid object content")
            return [roster._unreadable(i) for i in ids]

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    made = roster.Roster(Grid(), 10, 1.0, 0.0)
    assert made._pull(["6", "7", "8"]) == []
    said = made._pull(["5", "7", "9"])
    assert [one.metadata.reply_to_message_id for one in said] == ["5", "7", "9"]
    assert asked == [["6", "7", "8"], ["5"], ["7"], ["9"]]


def test_nobody_is_an_error_that_says_why(sites, nodes, deployed, tmp_path):
    scenario, files = sites(private=False)
    for file in files:
        file.write_text(file.read_text() + "privacy: {max_epsilon: 1, delta: 1.0e-5}\n")
    with pytest.raises(RoundError, match=r"no site joined: .*under differential privacy .*asks for none"):
        deployed(scenario, LocalGrid(nodes(files)))
    assert not (tmp_path / "runs").exists()


def test_the_submitter_is_told_of_each_site_by_name_as_it_happens(sites, nodes, deployed):
    scenario, files = sites("rounds=2")
    files[1].write_text(files[1].read_text().replace("own_code: false", "strategies: [fedavg_lora]"))
    rows = files[2].parent / "train.csv"
    rows.write_text(rows.read_text().replace("text,label", "text,very_private"))
    files[3].write_text(files[3].read_text().replace("max_epsilon: 80", "max_epsilon: 7"))
    told: list = []
    run, _ = deployed(scenario, LocalGrid(nodes(files)), note=told.append)
    rules = "its rules refuse the run: it does not accept the strategy 'ffa_lora'"
    data = "its data or machine do not fit the scenario (data.files.label): its log says why"
    assert told[:7] == [
        "waiting for 4 sites to join: 0 s at most",
        "client 0 (site-0) joined",
        f"client 1 (site-1) does not take part: {rules}",
        f"client 2 (site-2) does not take part: {data}",
        "client 3 (site-3) joined",
        f"the run begins without client 1: its site (site-1) does not take part: {rules}",
        f"the run begins without client 2: its site (site-2) does not take part: {data}",
    ]
    cap = "another round would pass the epsilon that the site allows over all runs"
    assert told[-3:] == [
        f"round 2: client 1: its site (site-1) does not take part: {rules}",
        f"round 2: client 2: its site (site-2) does not take part: {data}",
        f"round 2: client 3 (site-3): {cap}",
    ]
    errors = [line["error"] for line in run.clients if line["round"] == 2]
    assert errors[0] is None and errors[1] == f"its site (site-1) does not take part: {rules}"
    assert "very_private" not in "".join(told)


def test_a_round_says_whom_it_waits_for_and_how_long(sites, nodes, deployed, monkeypatch):
    scenario, files = sites("rounds=1")
    told: list = []
    monkeypatch.setattr("fedlora.engine.roster._PATIENCE", 0.5)
    deployed(scenario, LocalGrid(nodes(files), late={2}), deadline=2.0, note=told.append)
    waits = [said for said in told if said.startswith("waiting for client")]
    assert len(waits) == 1 and re.fullmatch(r"waiting for client 1 \(site-1\): [01] s more at most", waits[0])
    assert told[-1] == "round 1: client 1 (site-1): no reply within 2 s"


def test_what_a_node_says_of_itself_is_bounded_and_takes_no_other_s_place():
    told: list = []
    roster = Roster(LocalGrid({}), 4, deadline=60.0, join=0.0, note=told.append)
    good = {"client": 1, "name": "site-1", "num_examples": 45, "event": None}
    roster.sites[1] = roster._introduced(7, {**good, "time": 1000.0})
    assert roster._introduced(7, {**good, "time": time.time() + 90}).clock == pytest.approx(90, abs=5)
    roster._since -= 200  # its reply waited at the SuperLink, or here
    assert roster._introduced(7, {**good, "time": time.time() - 150}).clock == 0
    assert roster._introduced(7, {**good, "time": time.time() - 300}).clock == pytest.approx(-100, abs=5)
    assert roster.sites[1].clock < -1e9 and roster._introduced(7, {**good, "time": "?"}).clock == 0
    wrong = {"refused": "x" * 999, "name": "\x1b[2J" + "y" * 99}
    assert roster._who(8, {**wrong, "client": 1}) == "client 1 (?[2J" + "y" * 60 + ")" and not roster.absent
    assert roster._who(8, {**wrong, "client": 4}) == roster._who(8, {**wrong, "client": None}) == "node 8"
    roster._who(8, {**wrong, "client": 2})
    assert list(roster.absent) == [2] and len(roster.absent[2]) == 300


def test_versions_may_differ_by_a_patch_and_the_submitter_is_told(sites, nodes, deployed, monkeypatch):
    scenario, files = sites("rounds=1")
    minor, patch = (here := version("fedlora")).rpartition(".")[::2]
    newer = f"{minor}.{int(patch) + 1}"
    for module in ("admission", "node"):  # the server has another
        monkeypatch.setattr(f"fedlora.deploy.{module}.version", lambda _: newer)
    told: list = []
    run, _ = deployed(scenario, LocalGrid(nodes(files)), note=told.append)
    assert run.summary["failures"] == 0
    assert f"client 0 (site-0): it runs fedlora {newer}, and the server {here}" in told


def test_two_nodes_for_one_client_are_one_too_many(sites, nodes, deployed):
    scenario, files = sites("rounds=1")
    grid = LocalGrid({**nodes(files), 9: nodes(files[:1])[1]})
    run, engine = deployed(scenario, grid)
    assert run.summary["failures"] == 0 and engine.roster.sites[0].node == 1
    assert "is served by node 1 already" in engine.roster.turned_away[9][1]


def test_what_sites_cannot_do_is_said_before_anything_starts(sites):
    from fedlora.prepare import prepare_server

    scenario, _ = sites()
    files = scenario.data.files.model_copy(update={"test": None})
    with pytest.raises(SettingError, match="the server's own file"):
        prepare_server(scenario.model_copy(update={"data": scenario.data.model_copy(update={"files": files})}))


def test_a_garbled_introduction_is_a_contract_error():
    with pytest.raises(ContractError, match="garbles"):
        wire.read_event({"steps": "many"})
    with pytest.raises(ContractError, match="not JSON"):
        wire.unpack_words(type(wire.pack_words({}))({"fedlora": ConfigRecord({"a": "{"})}))
