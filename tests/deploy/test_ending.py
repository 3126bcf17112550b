"""What a site learns of a run's end: its adapter, where the site file asks for it, and no more elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import evaluate, load_adapter, traffic, wire
from fedlora.cli import main
from fedlora.clients.dp_sgd import DPSGD
from fedlora.deploy import history, loading
from fedlora.deploy.history import table
from fedlora.privacy import ledger
from fedlora.privacy.ledger import Own
from fedlora.record import Record
from fedlora.reports.console import Live, follow
from tests.deploy.federation import LocalGrid, meet, refusal
from tests.deploy.test_secure import EXAMPLES


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def wants(file):
    file.write_text(file.read_text() + "receive: adapter\n")


def part(file):
    """What a site keeps of the run."""
    return file.parent / "state" / "runs" / "run-1"


@pytest.fixture
def told(monkeypatch):
    """The content of each message of the end."""
    seen, push = [], LocalGrid.push_messages

    def recorded(self, messages):
        messages = list(messages)
        seen.extend(m.content for m in messages if m.metadata.message_type == "query.end")
        return push(self, messages)

    monkeypatch.setattr(LocalGrid, "push_messages", recorded)
    return seen


@pytest.mark.parametrize(
    "more, private",
    [
        ((), True),
        (("strategy.use=fedex_lora",), False),
        (("strategy.use=flora", "clients.ranks={kind: list, values: [2, 4]}"), False),
        (("data.validation_share=0.5", "keep={best: loss}", "clients.lr=30", "strategy.use=fedex_lora"), False),
    ],
    ids=["private", "merges", "ranks", "best"],
)
def test_a_site_that_asks_gets_the_adapter_of_the_run(sites, nodes, deployed, told, more, private):
    scenario, files = sites(*more, private=private)
    wants(files[1])
    run, _ = deployed(scenario, LocalGrid(nodes(files)))
    here, there = tensors(part(files[1]) / "adapter"), tensors(run.folder / "adapter")
    assert here.keys() == there.keys() and all(np.array_equal(here[n], there[n]) for n in here)
    assert not [file for file in files if file != files[1] and (part(file) / "adapter").exists()]
    sizes = [traffic.content_bytes(content) for content in told]
    assert run.summary["bytes_down_total"] == sum(line["bytes_down"] for line in run.rounds) + sum(sizes)
    assert all(Record.open(part(file)).site_end["round"] == run.summary["rounds"] for file in files)
    assert len(sizes) == 4 and sorted(sizes)[2] < 300 < max(sizes)
    own = files[1].parent / "train.csv"
    assert evaluate(part(files[1]), own) == evaluate(part(files[1]) / "adapter", own).__class__(
        **{**vars(evaluate(run.folder, own)), "run": str(part(files[1]))}
    )
    if not more:
        assert load_adapter(part(files[1]) / "adapter")[0].peft_config
        frozen = {name for name in told[1][wire.ARRAYS] if "lora_A" in name}
        assert not frozen, "what the seed gives is not sent"


def test_who_watches_a_run_that_ends_early_is_let_go(tiny, tmp_path):
    """A round that is trained after the end, as when more rounds were asked for, takes the word back."""
    (tmp_path / "scenario.yaml").write_text(tiny("rounds=5").to_yaml())
    (tmp_path / "run.json").write_text("{}")
    line = {
        "round": 1,
        "clients": 1,
        "failures": 0,
        "loss": None,
        "accuracy": None,
        "epsilon": 1.0,
        "train_loss": None,
    }
    line |= {"bytes_up": 1, "bytes_down": 1, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "ended.json").write_text('{"round": 1}')
    assert (
        follow(Record.open(tmp_path), Live()).site_said
        == "finished after round 1: 1 of 5 rounds were trained here"
    )
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**line, "round": 2}) + "\n")
    assert Record.open(tmp_path).site_said.endswith("round 2 the last; whether the run goes on its server knows")


def test_what_stays_with_a_site_is_its_own(sites, nodes, deployed):
    """FedSA-LoRA shares A alone: the adapter that a site gets has the B and the head that it trained."""
    scenario, files = sites("strategy.use=fedsa_lora", "data.client_test_share=0.5", private=False)
    for file in files:
        wants(file)
    run, _ = deployed(scenario, LocalGrid(nodes(files)))
    kept = [*part(files[0]).glob("personal/*.safetensors")]
    assert {file.stat().st_mode & 0o777 for file in kept} == {0o600}, "for its owner alone to read"
    folders = (part(files[0]) / "adapter", part(files[1]) / "adapter", run.folder / "adapter")
    one, other, shared = map(tensors, folders)
    assert any("lora_A" in name for name in one)
    for name in one:
        assert np.array_equal(one[name], other[name]) is ("lora_A" in name)
        assert "lora_A" not in name or np.array_equal(one[name], shared[name])


def test_a_site_that_was_away_gets_it_when_the_run_is_resumed(sites, nodes, deployed):
    scenario, files = sites(private=False)
    wants(files[0])
    made = nodes(files)
    run, _ = deployed(scenario, LocalGrid({k: v for k, v in made.items() if k != 1}))
    assert not part(files[0]).exists()
    deployed(scenario, LocalGrid(made), run.folder, resume=True)
    here, there = tensors(part(files[0]) / "adapter"), tensors(run.folder / "adapter")
    assert all(np.array_equal(here[n], there[n]) for n in there)


def test_a_run_whose_sites_are_silent_at_its_end_has_ended(sites, nodes, deployed, monkeypatch):
    scenario, files = sites(private=False)
    grid = LocalGrid(made := nodes(files))
    answer = made[2].answer

    def gone(kind, content, partition):
        if kind == "query.end":
            raise RuntimeError
        return answer(kind, content, partition)

    made[2].answer = gone
    notes = []
    run, _ = deployed(scenario, grid, note=notes.append)
    assert run.state == "finished" and notes[-1] == "client 1 (site-1) did not take the run's end: RuntimeError"
    monkeypatch.setattr("fedlora.engine.roster.Roster.ask", lambda *_: 1 / 0)
    assert deployed(scenario, grid, run.folder, resume=True)[0].state == "finished"


@pytest.mark.parametrize(
    "words, arrays, why",
    [
        ({"round": 3}, {}, "round in a message is a whole number from 1 to 2"),
        ({"merges": 1}, {}, "merges in a message is a whole number from 0 to 0"),
        ({"threshold": "high"}, {}, "threshold in a message is a finite number or null"),
        ({}, {"x": np.zeros(2)}, "which is no tensor of this adapter"),
        ({}, {"lora_B": np.zeros((2, 2))}, "shape"),
        ({}, {"lora_B": np.full((32, 4), np.nan)}, "finite"),
    ],
)
def test_what_cannot_be_an_end_changes_nothing(server, node, words, arrays, why):
    introduced, files, _ = server()
    wants(files[0])
    meet(made := node(files[0]), introduced)
    layout = made.run.worker.task.layout
    named = {next((n for n in layout if k in n), k): v.astype(np.float32) for k, v in arrays.items()}
    content = wire.pack_words({"run": "tiny-1", "round": 2, "merges": 0, "threshold": None, **words})
    content[wire.ARRAYS] = wire.to_arrays(named)
    assert why in refusal(made, content, "query.end")
    assert not [p for p in made.state.of_run("tiny-1").iterdir() if p.name in ("adapter", "ended.json")]


def test_a_finished_run_is_said_to_be_and_trained_further_from_the_site_s_account(sites, nodes, deployed, capsys):
    scenario, files = sites()
    wants(files[0])
    _, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    before = made[1].epsilon
    for served in made.values():
        served.close()
    said = "finished after round 2: 2 of 2 rounds were trained here; its adapter is here"
    assert said in Record.open(part(files[0])).remarks()[0]
    assert Record.open(part(files[3])).site_said.endswith("2 of 2 rounds were trained here")
    lines = history.read(files[3].parent / "state" / history.NAME)
    assert (lines[-1]["what"], lines[-1]["outcome"], lines[-1]["run"]) == ("finished", "answered", "run-1")
    assert " finished " in table(lines)[-1]
    assert main(["site", "report", str(files[0])]) == 0
    assert said in (files[0].parent / "state" / "report.html").read_text()
    account, own = part(files[0]).parents[1] / "ledger", part(files[0]) / "privacy.jsonl"
    events, spent = ledger.replay(account / "privacy.jsonl")[Own()], own.read_bytes()
    capsys.readouterr()
    assert main(["site", "personalise", str(files[0]), "run-1", "--steps", "3"]) == 0
    out, said = capsys.readouterr()
    folder = Path(out.strip())
    assert folder == part(files[0]) / "personalised"
    paid = ledger.replay(account / "privacy.jsonl")[Own()]
    assert paid[:-1] == events and paid[-1].steps == 3 and own.read_bytes() == spent
    assert (paid[-1].noise_multiplier, paid[-1].sample_rate) == (events[0].noise_multiplier, events[0].sample_rate)
    after = ledger.epsilon_of(account / "privacy.jsonl")
    assert f"epsilon {before:.3f} before, {after:.3f} now; the site file allows 80" in said and after > before
    ours, theirs = tensors(folder), tensors(part(files[0]) / "adapter")
    assert {n for n in ours if not np.array_equal(ours[n], theirs[n])} == {n for n in ours if "lora_A" not in n}
    assert evaluate(folder, files[0].parent / "train.csv").rows > 30
    assert history.read(account.parent / history.NAME)[-1]["what"] == "trained further"


def test_a_run_of_shared_noise_is_trained_further_under_noise_of_the_site_s_own_in_full(sites, nodes, deployed):
    """Two others at the least add noise to a sum, and none to what stays at the site."""
    scenario, files = sites(*EXAMPLES)
    wants(files[0])
    deployed(scenario, LocalGrid(made := nodes(files)))
    for served in made.values():
        served.close()
    for steps in ("5", "1"):
        assert main(["site", "personalise", str(files[0]), "run-1", "--steps", steps]) == 0
    paid = ledger.replay(part(files[0]).parents[1] / "ledger" / "privacy.jsonl")[Own()]
    assert [(e.noise_multiplier, e.steps, e.sharers) for e in paid] == [
        (pytest.approx(2**0.5), 1, 1),
        (2.0, 5, 1),
        (2.0, 1, 1),
    ]


def test_without_budget_or_adapter_nothing_is_trained(sites, nodes, deployed, capsys, monkeypatch):
    scenario, files = sites()
    wants(files[0])
    _, _ = deployed(scenario, LocalGrid(made := nodes(files)))
    for served in made.values():
        served.close()
    monkeypatch.setattr(DPSGD, "passes", lambda *_: pytest.fail("it trains"))
    text = files[0].read_text()
    files[0].write_text(text.replace("max_epsilon: 80", f"max_epsilon: {made[1].epsilon or 7.999}"))
    account = part(files[0]).parents[1] / "ledger" / "privacy.jsonl"
    before = account.read_bytes()

    def refused(file, *told):
        assert main(["site", "personalise", str(file), *told]) == 2
        return capsys.readouterr().err

    assert "it would come to epsilon" in refused(files[0], "run-1") and account.read_bytes() == before
    files[0].write_text(text)
    assert "should be from 1 to 100,000" in refused(files[0], "run-1", "--steps", "0")
    assert "holds no run 'run-2': did you mean 'run-1'?" in refused(files[0], "run-2")
    assert "has no adapter of the run: a site gets it at the end, with receive: adapter" in refused(
        files[1], "run-1"
    )
    files[0].write_text("\n".join(line for line in text.splitlines() if not line.startswith("privacy:")))
    assert "no privacy section" in refused(files[0], "run-1")


def further(file, told):
    file.write_text(
        file.read_text().replace("receive: adapter\n", "") + f"receive: adapter\npersonalise: {told}\n"
    )


def paid_further(node):
    return [line for line in ledger.read(node.state.folder / "ledger" / "privacy.jsonl") if line["round"] == 0]


def test_a_site_trains_further_by_itself_once_its_answer_to_the_end_has_gone(sites, nodes, deployed, caplog):
    scenario, files = sites()
    further(files[0], "{steps: 3}")
    further(files[1], "{steps: 3, epsilon: 0.1}")
    wants(files[2])
    made, grid = nodes(files), None
    run, _ = deployed(scenario, grid := LocalGrid(made))
    assert not (part(files[0]) / "personalised").exists(), "the server does not wait for it"
    before = made[1].epsilon
    events = ledger.replay(part(files[0]).parents[1] / "ledger" / "privacy.jsonl")[Own()]
    with caplog.at_level("INFO", logger="fedlora"):
        for served in made.values():
            served.afterwards()
    folder = part(files[0]) / "personalised"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"trained further by 3 steps: epsilon {before:.3f} before" in caplog.text and made[1].epsilon > before
    (line,) = paid_further(made[1])
    assert (line["run"], line["steps"], line["noise_multiplier"]) == ("run-1", 3, events[0].noise_multiplier)
    ours, theirs = tensors(folder), tensors(part(files[0]) / "adapter")
    assert {n for n in ours if not np.array_equal(ours[n], theirs[n])} == {n for n in ours if "lora_A" not in n}
    told = history.read(made[1].state.folder / history.NAME)[-1]
    assert (told["what"], told["outcome"], told["epsilon_site"]) == (
        "trained further",
        "answered",
        made[1].epsilon,
    )
    # The second does not: the run's noise makes three steps cost more than its file says.
    assert not paid_further(made[2]) and not (part(files[1]) / "personalised").exists()
    told = history.read(made[2].state.folder / history.NAME)[-1]
    assert (told["what"], told["outcome"]) == ("trained further", "refused")
    assert told["why"].startswith("its noise makes 3 steps cost epsilon")
    assert told["why"].endswith("and personalise.epsilon is 0.1")
    assert not paid_further(made[3]), "a site whose file says nothing of it does nothing"
    # A server that says again that the run has ended makes nobody pay again.
    deployed(scenario, grid, run.folder, resume=True)
    with caplog.at_level("INFO", logger="fedlora"):
        made[1].afterwards()
    assert "it was trained further here before" in caplog.text and len(paid_further(made[1])) == 1
    # What a site keeps for itself is its owner's alone, and the page of the site tells of it.
    for served in made.values():
        served.close()
    assert main(["site", "report", str(files[0])]) == 0
    page = (files[0].parent / "state" / "report.html").read_text()
    assert "; trained further here by 3 steps" in page and '>2</td><td class="number">' in page


@pytest.mark.parametrize("rounds, why", [(0, "no round of it was trained here"), (1, "it would come to epsilon")])
def test_a_site_pays_for_no_more_than_its_budget_by_itself_nor_for_a_run_that_it_did_not_train(
    server, node, monkeypatch, rounds, why
):
    """A server alone says that a run has ended: it could say so of as many as it likes."""
    words, files, train = server()
    further(files[0], "{steps: 2000}")
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 8"))
    meet(made := node(files[0]), words)
    for round in range(1, rounds + 1):
        assert refusal(made, train(round)) is None
    content = wire.pack_words({"run": "tiny-1", "round": 1, "merges": 0, "threshold": None})
    content[wire.ARRAYS] = wire.to_arrays({})
    before = made.epsilon
    assert refusal(made, content, "query.end") is None
    monkeypatch.setattr(DPSGD, "passes", lambda *_: pytest.fail("it trains"))
    made.afterwards()
    assert made.epsilon == before and not (made.state.of_run("tiny-1") / "personalised").exists()
    assert history.read(made.state.folder / history.NAME)[-1]["why"].startswith(why)


def test_a_failure_after_the_end_keeps_the_worker_up_and_says_no_more_than_its_kind(server, node, monkeypatch):
    words, files, train = server()
    further(files[0], "{steps: 1}")
    meet(made := node(files[0]), words)
    assert refusal(made, train(1)) is None
    content = wire.pack_words({"run": "tiny-1", "round": 1, "merges": 0, "threshold": None})
    content[wire.ARRAYS] = wire.to_arrays({})
    assert refusal(made, content, "query.end") is None

    def fails(*_):
        raise ValueError("a text of a row")

    monkeypatch.setattr(DPSGD, "fit", fails)
    made.afterwards()
    line = history.read(made.state.folder / history.NAME)[-1]
    assert (line["outcome"], line["why"]) == ("failed", "ValueError") and len(paid_further(made)) == 1
    assert "training failed" in refusal(made, train(2)), "and it answers"


def test_runs_of_two_submitters_at_once_share_a_worker(server, node, monkeypatch):
    """Two are served in turns without loading a model again; a third takes the place of the one that waits."""
    words, files, train = server(private=False)
    loaded, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *told: loaded.append(told[4]["run"]) or load(*told))
    made = node(files[0])
    for run in ("tiny-1", "tiny-2"):
        assert meet(made, {**words, "run": run})["client"] == 0
    for round in (1, 2):
        for run in ("tiny-1", "tiny-2"):
            assert refusal(made, train(round, run=run)) is None
    assert loaded == ["tiny-1", "tiny-2"]
    meet(made, {**words, "run": "tiny-3"})
    assert refusal(made, train(1, run="tiny-2")) is None and loaded == ["tiny-1", "tiny-2", "tiny-3"]
    assert refusal(made, train(1, run="tiny-1")) is None and loaded[3:] == ["tiny-1"]
    ended = wire.pack_words({"run": "tiny-1", "round": 2, "merges": 0, "threshold": None})
    assert refusal(made, ended, "query.end") is None  # the first to go, though it was asked for last
    meet(made, {**words, "run": "tiny-4"})
    assert refusal(made, train(2, run="tiny-2")) is None and loaded[4:] == ["tiny-4"]
    lines = [json.loads(line) for line in (made.state.of_run("tiny-2") / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 1, 2] and made.run.key == "tiny-2"


def test_private_runs_at_once_pay_from_one_account(server, node):
    words, files, train = server()
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 9"))
    made = node(files[0])
    for run in ("tiny-1", "tiny-2"):
        meet(made, {**words, "run": run})
    asked = [(round, run) for round in (1, 2) for run in ("tiny-1", "tiny-2")]
    refused = [refusal(made, train(round, run=run)) for round, run in asked]
    assert refused[0] is None and "pass the epsilon that the site allows over all runs" in refused[-1]
    paid = [line["run"] for line in ledger.read(made.state.folder / "ledger" / "privacy.jsonl")]
    assert paid == [run for (_, run), why in zip(asked, refused, strict=True) if why is None]
    assert {"tiny-1", "tiny-2"} == set(paid) and made.epsilon <= 9
