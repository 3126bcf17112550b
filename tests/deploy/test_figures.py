"""Noised figures of a site's own rows: what they add up to, what they cost, and when they are told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import wire
from fedlora.deploy import figures
from fedlora.deploy.backup import backup
from fedlora.deploy.checking import check, rules
from fedlora.deploy.restoring import restore
from fedlora.deploy.site import load
from fedlora.deploy.statement import html
from fedlora.errors import UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Own
from fedlora.privacy.noise import Stream
from fedlora.tasks.classification import Classification
from tests.deploy.federation import LocalGrid, meet, refusal

HELD = "data.client_test_share=0.5"


def tells(file, told="{epsilon: 0.5}"):
    file.write_text(file.read_text() + f"figures: {told}\n")


def paid(node):
    lines = ledger.read(node.state.folder / "ledger" / "privacy.jsonl")
    return [line for line in lines if line["run"].startswith("figures:")]


@pytest.fixture
def asked(server, node):
    """A site that a run with held-out rows met, and what asks it."""

    def make(*overrides, told="{epsilon: 0.5}"):
        words, files, train = server(HELD, *overrides)
        tells(files[0], told)
        made = node(files[0])
        assert meet(made, words).get("refused") is None
        return made, files[0], lambda round: wire.unpack_words(made.answer("evaluate", train(round), 0))

    return make


def test_the_sums_are_those_of_the_rows_but_for_the_noise(asked, monkeypatch):
    made, _, ask = asked(told="{epsilon: 0.5, most_loss: 0.7}")
    scales = []
    monkeypatch.setattr(Stream, "normal", lambda self, loc, scale, size: scales.append(scale) or np.zeros(size))
    found = ask(1)
    worker = made.run.worker
    held = worker.dataset.held_out(0)
    losses, right = [], 0.0
    for row in held.rows:
        sums = worker.task.evaluation(worker.task.initial, held.examples, np.array([row])).sums
        losses.append(min(float(sums["loss"]), 0.7))
        right += float(sums["correct"])
    assert max(losses) == 0.7 > min(losses), "some are cut, and some are not"
    assert found["accuracy"] == pytest.approx(right / len(held), abs=1 / 1024)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1 / 1024)
    event = ledger.replay(made.state.folder / "ledger" / "privacy.jsonl")[Own()][0]
    assert scales == [pytest.approx(event.noise_multiplier * 2**0.5)] and event.clip_norm == 2**0.5


def test_the_account_pays_before_a_row_is_read_and_once_for_each_round(asked, monkeypatch):
    made, file, ask = asked()
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "evaluation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(1)
    (line,) = paid(made)
    assert (line["run"], line["round"], line["sample_rate"], line["steps"]) == ("figures:tiny-1", 1, 1.0, 1)
    assert 0.48 < made.epsilon <= 0.5
    first = ask(1)  # the failure told nobody anything, and this is another draw: it is paid for
    assert ask(1) == first and len(paid(made)) == 2
    assert ask(2) != first and [one["round"] for one in paid(made)] == [1, 1, 2]
    assert not (made.state.of_run("tiny-1") / "privacy.jsonl").exists(), "the run's promise is about training"
    page = html(file)
    assert "noised figures of the rows that are held out" in page
    assert check(file).privacy.runs == {"figures:tiny-1": 3}


def test_a_row_passes_all_layers_by_itself(asked):
    """What is kept of it came of a pass with others, whose lengths decide its last bits."""
    made, _, ask = asked("model.adapter.layers=[1]")
    prefix = made.run.worker.task.prefix
    prefix.kept = kept = lambda examples: pytest.fail("what is kept is used")
    assert 0 <= ask(1)["accuracy"] <= 1 and prefix.kept is kept


def test_noise_is_of_the_system_and_differs_for_the_same_question(asked, monkeypatch):
    keys, real = [], Stream.fresh.__func__
    monkeypatch.setattr(Stream, "fresh", classmethod(lambda cls: keys.append(real(cls)) or keys[-1]))
    _, _, ask = asked()
    ask(1)
    ask(2)
    assert len({key.bytes(32) for key in keys[-2:]}) == 2


@given(
    st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=6),
    st.floats(min_value=0.01, max_value=100),
)
def test_a_row_or_a_person_moves_the_sums_by_no_more_than_the_noise_hides(rows, most):
    """Whatever its losses are, and however many rows a person has: against the one that counts for nothing."""
    added = np.mean([figures._added({"loss": a, "accuracy": b}, most) for a, b in rows], axis=0)
    moved = np.floor(added * figures._FINE) / figures._FINE
    assert (moved >= 0).all() and float(np.linalg.norm(moved)) <= figures.NORM


def test_a_budget_that_ends_before_the_run_is_told_before_anything_is_paid(server, node):
    words, files, train = server(HELD)
    tells(files[0])
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 8.05"))
    made = node(files[0])
    why = meet(made, words)["refused"]
    assert why.startswith(
        "the epsilon that it allows over all runs is not enough for 2 noised evaluations beside 2"
    )
    assert made.epsilon == 0 and refusal(made, train(1)).startswith("not introduced")
    assert refusal(made, train(1), "evaluate").startswith("not introduced")
    less = {**words, "scenario": {**words["scenario"], "eval_every": 2}}
    told = load(files[0])
    cost = figures.event(told.figures, told.privacy)
    assert epsilon([cost], told.privacy.delta) == pytest.approx(0.5, rel=0.02)
    files[0].write_text(files[0].read_text().replace("max_epsilon: 8.05", "max_epsilon: 12"))
    assert meet(made, less)["figures"] == pytest.approx(cost.noise_multiplier * 2**0.5 / 20, rel=0.5)


def test_the_statistic_of_a_smaller_base_counts_beside_the_figures(server, node, monkeypatch):
    """Epsilon 8 is for the statistic and the rounds together: 8.02 leaves too little for two figures."""
    cut = ("compress={use: afm, keep: 0.5}", "statistics={kind: gram, epsilon: 4}")
    words, files, _ = server(HELD, *cut)
    tells(files[0])
    files[0].write_text(files[0].read_text().replace("max_epsilon: 80", "max_epsilon: 8.02"))
    made = node(files[0])
    assert "is not enough for 2 noised evaluations" in meet(made, words)["refused"]
    made.close()
    monkeypatch.setattr("fedlora.deploy.account.Account.measured", lambda *_: True)  # it is in the account
    assert meet(node(files[0]), words)["client"] == 0


def test_where_the_budget_is_spent_meanwhile_nothing_is_read(asked, monkeypatch):
    made, _, ask = asked()
    monkeypatch.setattr(Classification, "evaluation", lambda *_: pytest.fail("it reads"))
    made.account.terms = made.account.terms.model_copy(update={"max_epsilon": 0.1})
    assert "pass the epsilon that the site allows over all runs" in ask(1)["refused"] and not made.epsilon


def test_a_site_without_the_section_or_with_exact_figures_beside_it(server, node, tmp_path):
    words, files, _ = server("privacy.share_metrics=true")
    tells(files[0])
    assert meet(node(files[0]), words)["refused"].endswith("the scenario asks for some by privacy.share_metrics")
    text = files[0].read_text()
    for old, new, why in (
        ("own_code: false", "own_code: false, metrics: true", "figures: are noised, and accept.metrics has exact"),
        ("privacy:", "# privacy:", "figures: is paid for from a budget: set privacy too"),
        ("{epsilon: 0.5}", "{epsilon: 0}", "figures.epsilon: should be greater than 0"),
        ("{epsilon: 0.5}", "{epsilon: 1, most: 2}", "unknown key 'most' in figures"),
    ):
        files[0].write_text(text.replace(old, new))
        with pytest.raises(UserError, match=why):
            load(files[0])
    files[0].write_text(text)
    assert any("each evaluation costs epsilon 0.5 (figures)" in rule for rule in rules(load(files[0])))


def test_a_private_run_of_personal_models_is_judged_by_noised_figures(sites, nodes, deployed):
    scenario, files = sites("strategy.use=fedsa_lora", HELD)
    for file in files:
        tells(file, "{epsilon: 4}")
    notes = []
    run, _ = deployed(scenario, LocalGrid(made := nodes(files)), note=notes.append)
    assert run.state == "finished" and all(0 <= line["local_accuracy"] <= 1 for line in run.rounds)
    assert sum("its figures are noised: accuracy to 0." in note for note in notes) == len(files)
    assert [one["round"] for one in paid(made[1])] == [1, 2]
    own = ledger.epsilon_of(made[1].state.of_run("run-1") / "privacy.jsonl")
    assert own <= scenario.privacy.epsilon * (1 + 1e-9) and made[1].epsilon > own


@pytest.mark.parametrize("strategy", ["ffa_lora", "fedsa_lora"])
def test_a_run_ends_where_no_site_judges_and_says_so(sites, nodes, deployed, strategy):
    """Of personal models nothing is measured then, of a shared one the test set is."""
    scenario, files = sites(f"strategy.use={strategy}", "data.client_test_share=0.5", private=False)

    def silent(content):
        words = wire.unpack_words(content)
        return wire.pack_words({"refused": "its disk is full"}) if "accuracy" in words else content

    made, notes = nodes(files), []
    run, _ = deployed(scenario, LocalGrid(made, altered=dict.fromkeys(made, silent)), note=notes.append)
    assert run.state == "finished" and [line["local_loss"] for line in run.rounds] == [None, None]
    assert (run.summary["accuracy"] is None) == (strategy == "fedsa_lora")
    assert sum("no site judged its own model" in note for note in notes) == scenario.rounds


def test_a_restore_asks_how_many_figures_were_told(asked, tmp_path):
    made, file, ask = asked()
    ask(1)
    made.close()
    backup(file, tmp_path / "kept")
    for record in (made.state.folder / "ledger").iterdir():
        record.unlink()
    with pytest.raises(UserError, match="surveys and noised figures"):
        restore(file, tmp_path / "kept", lost=["none"])
    after = restore(file, tmp_path / "kept", lost=["none"], surveys=1).after
    cost = figures.event((site := load(file)).figures, site.privacy)
    assert after == pytest.approx(epsilon([cost] * 2, site.privacy.delta), rel=1e-3)
