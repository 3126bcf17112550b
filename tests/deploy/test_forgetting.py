"""`fedlora site forget RUN`: what was kept of a run goes, what it spent stays, and no promise breaks."""

import fcntl

import pytest

from fedlora.cli import main
from fedlora.deploy import history
from fedlora.privacy import ledger
from tests.deploy.federation import meet, refusal


@pytest.fixture
def ended(server, node):
    """A site that answered a run."""
    words, files, train = server()
    meet(made := node(files[0]), words)
    assert [refusal(made, train(round)) for round in (1, 2)] == [None, None]
    made.close()
    return words, files[0], train, made.state.folder


def test_what_was_spent_stays_and_nothing_else(ended, capsys):
    _, file, _, state = ended
    folder = state / "runs" / "tiny-1"
    spent = [(file, file.read_bytes()) for file in (folder / "privacy.jsonl", state / "ledger" / "privacy.jsonl")]
    assert (folder / "answer-1").exists()
    assert main(["site", "forget", str(file), "tiny-1"]) == 0
    assert "files removed; what it spent stays, and the name is refused" in capsys.readouterr().out
    assert sorted(path.name for path in folder.rglob("*")) == ["forgotten", "privacy.head", "privacy.jsonl"]
    assert [(path, path.read_bytes()) for path, _ in spent] == spent
    last = history.read(state / history.NAME)[-1]
    assert (last["what"], last["run"]) == ("forgotten", "tiny-1")
    assert main(["site", "forget", str(file), "tiny-1"]) == 0  # as after an interruption
    assert main(["site", "report", str(file)]) == 0
    assert "forgotten: its files were removed" in (state / "report.html").read_text()


def test_a_run_that_is_met_again_spends_nothing_again(ended, node):
    words, file, train, state = ended
    assert main(["site", "forget", str(file), "tiny-1"]) == 0
    made = node(file)
    for _ in range(2):
        assert "forget the run of this name" in meet(made, words)["refused"]
        assert "not introduced" in refusal(made, train(1))
    assert len(ledger.replay(state / "ledger" / "privacy.jsonl")[ledger.Own()]) == 2
    meet(made, {**words, "run": "tiny-2"})  # another name pays from the account as any run does
    before = made.epsilon
    assert refusal(made, train(1, run="tiny-2")) is None and made.epsilon > before
    made.close()


def test_a_forgotten_run_is_refused_however_little_was_removed(ended, node):
    _, file, train, state = ended
    (state / "runs" / "tiny-1" / "forgotten").touch()  # it was interrupted here
    made = node(file)
    assert "forget the run of this name" in refusal(made, train(2))
    made.close()


def test_it_is_refused_beside_a_worker_and_for_a_run_that_is_not_there(ended, capsys):
    _, file, _, state = ended
    for name in ("tiny-7", "../ledger", ".."):
        assert main(["site", "forget", str(file), name]) == 2
        assert f"holds no run {name!r}: " in capsys.readouterr().err
    with (state / "lock").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["site", "forget", str(file), "tiny-1"]) == 2
        assert "lock: in use by process" in capsys.readouterr().err
    assert (state / "runs" / "tiny-1" / "answer-1").exists()


def test_a_site_without_runs_has_none_to_forget(server, capsys):
    assert main(["site", "forget", str(server()[1][0]), "tiny-1"]) == 2
    assert "holds no run 'tiny-1': it holds none, and nothing is to be forgotten" in capsys.readouterr().err
