"""`fedlora site backup` and `restore`: after them what was spent is counted right, or too high."""

import fcntl
import json
import os
import shutil
import threading
from dataclasses import replace

import pytest

from fedlora.cli import main
from fedlora.deploy import history
from fedlora.deploy.account import Account, begun
from fedlora.deploy.backup import backup
from fedlora.deploy.history import History
from fedlora.deploy.restoring import restore
from fedlora.deploy.site import load
from fedlora.deploy.state import State
from fedlora.errors import Refusal, UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event, epsilon, in_sums
from fedlora.privacy.ledger import Ledger

EVENT = Event(noise_multiplier=1.0, sample_rate=0.1, steps=5, clip_norm=1.0)
STATISTIC = Event(noise_multiplier=0.6, sample_rate=1.0, steps=1, clip_norm=1.0)
TERMS = {"delta": 1e-5, "unit": "example", "accountant": "rdp"}


def pay(state, run, *rounds, event=EVENT):
    """A site that paid for rounds of a run, as its worker does."""
    alone = in_sums([event], 0.0)[0]
    for folder, terms, counted in (
        (state / "ledger", {**TERMS, "run": run}, alone),
        (state / "runs" / run, TERMS, event),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        book = Ledger(folder)
        for round in rounds:
            book.spend(round, {0: counted}, **terms, **begun(book))


def personalise(state, steps, run="a"):
    """What `fedlora site personalise` pays: in the account alone."""
    book = Ledger(state / "ledger")
    book.spend(0, {0: replace(EVENT, steps=steps)}, **TERMS, run=run, **begun(book))


def submitted(folder, *rounds, client=0):
    """The ledger of a submitter that heard of rounds."""
    folder.mkdir()
    book = Ledger(folder)
    for round in rounds:
        book.spend(round, {client: EVENT, client + 1: EVENT}, **TERMS)
    return folder / "privacy.jsonl"


def lose(state, *folders):
    """Ledgers that are gone: the account's under `ledger`, a run's under its name."""
    for name in folders:
        for kind in ("jsonl", "head"):
            (state / ("ledger" if name == "ledger" else f"runs/{name}") / f"privacy.{kind}").unlink(
                missing_ok=True
            )


def introduce(state, run, scenario):
    (state / "runs" / run / "run.json").write_text(json.dumps({"run": run, "scenario": scenario}))


def spent(state, run=None):
    """Steps by the account, or by a run's ledger."""
    file = (state / "ledger" if run is None else state / "runs" / run) / "privacy.jsonl"
    return sum(event.steps for events in ledger.replay(file).values() for event in events)


@pytest.fixture
def site(tmp_path):
    """The file of a site that has paid for rounds 1 and 2 of run a, and its state."""
    state, file = tmp_path / "state", tmp_path / "site.yaml"
    file.write_text(
        f"name: st-mary\nclient: 0\nstate: {state}\ndata: {{train: a.csv, labels: [x, y]}}\n"
        "privacy: {max_epsilon: 8, delta: 1.0e-5, accountant: rdp}\n"
    )
    pay(state, "a", 1, 2)
    (state / "held.key").write_bytes(b"k" * 32)
    (state / "site.log").write_text('{"message": "up"}\n{"mess')
    (state / "lock").touch()
    run = state / "runs" / "a"
    for name in ("answer-1", "rows", "rows.part", "personal/0.2.safetensors"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    (run / "judged.json").write_text('{"1": {"loss": 1.0}}')
    History(state).write(history.ROUND, history.ANSWERED, run="a", round=2)
    return file, state


@pytest.fixture
def kept(site, tmp_path):
    """The same, with a backup."""
    backup(site[0], tmp_path / "kept")
    return *site, tmp_path / "kept"


def test_a_state_that_is_gone_comes_back_but_for_answers_and_what_is_not_its_own(kept):
    file, state, made = kept
    assert made.stat().st_mode & 0o777 == 0o600
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    shutil.rmtree(state)
    done = restore(file, made, lost=["none"])
    told = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    lost = {p.relative_to(state).as_posix() for p in before.keys() - told.keys()}
    assert lost == {"runs/a/answer-1", "runs/a/rows.part"} and told.keys() <= before.keys()
    changed = {p.name for p in told if told[p] != before[p]}
    assert changed == {"site.log", "history.jsonl", "history.head"}
    assert (state / "site.log").read_text() == '{"message": "up"}\n'
    assert [line["what"] for line in history.read(state / history.NAME)] == ["round", "restored"]
    assert done.before == done.after == epsilon([EVENT, EVENT], 1e-5, "rdp") and not done.lost
    for private in ("held.key", "runs/a/personal/0.2.safetensors"):
        assert (state / private).stat().st_mode & 0o077 == 0


def test_a_backup_beside_a_worker_has_whole_lines_that_are_paid_for(site, tmp_path):
    """A worker holds its locks, and is cut off in a line of each ledger."""
    file, state = site
    with (state / "lock").open("r+") as other, (state / "ledger" / "privacy.jsonl").open("r+") as account:
        fcntl.flock(other, fcntl.LOCK_EX)
        fcntl.flock(account, fcntl.LOCK_EX)
        for path in (state / "ledger" / "privacy.jsonl", state / "runs" / "a" / "privacy.jsonl"):
            with path.open("a") as stream:
                stream.write('{"round": 3, ')
        assert backup(file, tmp_path / "kept").rounds == 2
    shutil.rmtree(state)
    restore(file, tmp_path / "kept", lost=["none"])
    assert (spent(state), spent(state, "a")) == (10, 10)


def test_a_ledger_never_goes_back(kept, capsys):
    file, state, made = kept
    pay(state, "a", 3)
    pay(state, "b", 1)
    (state / "runs" / "a" / "judged.json").write_text('{"2": {"loss": 2.0}}')
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    assert main(["site", "restore", str(file), str(made)]) == 2
    said = capsys.readouterr().err
    assert "a, round 3; b, round 1. A ledger that goes back would count less: write --merge" in said
    assert {p: p.read_bytes() for p in state.rglob("*") if p.is_file()} == before
    assert main(["site", "restore", str(file), str(made), "--merge"]) == 0
    assert "4 lines of ledgers that the backup lacked are kept" in capsys.readouterr().out
    assert (spent(state), spent(state, "a"), spent(state, "b")) == (20, 15, 5)
    assert json.loads((state / "runs" / "a" / "judged.json").read_text()) == {
        "1": {"loss": 1.0},
        "2": {"loss": 2.0},
    }
    assert not list(state.rglob("answer-*"))
    pay(state, "a", 4)  # and goes on
    assert spent(state) == 25


def test_a_state_that_was_begun_again_has_the_lines_of_both(kept):
    file, state, made = kept
    shutil.rmtree(state)
    pay(state, "b", 1)
    with pytest.raises(UserError, match="b, round 1"):
        restore(file, made)
    with pytest.raises(UserError, match="nobody here can say what was trained after"):
        restore(file, made, merge=True)
    restore(file, made, lost=["a=1"], merge=True, personalised=0)
    assert (spent(state), spent(state, "a"), spent(state, "b")) == (20, 15, 5)


def test_what_nobody_knows_of_is_for_the_owner_to_say(kept, capsys):
    file, state, made = kept
    shutil.rmtree(state)
    assert main(["site", "restore", str(file), str(made)]) == 2
    said = capsys.readouterr().err
    assert "the ledgers know of a (2 rounds paid)" in said and "--lost none" in said
    assert main(["site", "restore", str(file), str(made), "--lost", "a=3"]) == 2
    assert "add --personalised STEPS" in capsys.readouterr().err
    assert not (state / "ledger").exists()
    assert main(["site", "restore", str(file), str(made), "--lost", "a=3", "--personalised", "0"]) == 0
    told = capsys.readouterr().out
    assert "a: 3 rounds charged as lost" in told and "trained again, with fresh noise" in told
    assert (spent(state), spent(state, "a")) == (25, 25)
    lines = ledger.read(state / "ledger" / "privacy.jsonl")
    assert [(line["round"], line.get("lost")) for line in lines] == [
        (1, None),
        (2, None),
        *((r, True) for r in (3, 4, 5)),
    ]


@pytest.mark.parametrize(
    "lost, why",
    [
        (["none", "a=1"], "name nothing beside it"),
        (["some"], "write none, all, RUN=ROUNDS, RUN=FILE or RUN=all"),
        (["b=1"], "the backup has no round of it"),
        (["a=1", "a=2"], "names a a second time"),
        (["a=nowhere"], "is neither a number of rounds nor a file"),
        (["all"], "a promised no epsilon that bounds what it spent"),
        (["a=all"], "a promised no epsilon that bounds what it spent"),
    ],
)
def test_what_does_not_say_it_changes_nothing(kept, lost, why):
    file, state, made = kept
    shutil.rmtree(state)
    with pytest.raises(UserError, match=why):
        restore(file, made, lost=lost)
    assert sorted(path.name for path in state.iterdir()) == ["lock"]


def test_the_submitter_s_ledger_says_what_a_site_lost(kept, tmp_path):
    """Of other clients, and of rounds that the backup has, nothing is charged; one round may be under way."""
    file, state, made = kept
    shutil.rmtree(state)
    files = {"a": submitted(tmp_path / "a", 1, 2, 3, 4), "c": submitted(tmp_path / "c", 1, 2)}
    done = restore(file, made, lost=[f"{run}={there}" for run, there in files.items()], personalised=0)
    assert (spent(state), spent(state, "a"), spent(state, "c")) == (40, 25, 15) and done.lost == {"a": 3, "c": 3}
    rounds = [line["round"] for line in ledger.read(state / "runs" / "a" / "privacy.jsonl")]
    assert rounds == [1, 2, 3, 4, 5]


def test_a_submitter_that_did_not_hear_of_a_round_does_not_make_it_free(kept, tmp_path):
    """Client 0 was heard in round 2 for the last time, others in rounds 3 and 4; round 5 may be under way."""
    file, state, made = kept
    pay(state, "a", 3, 4)
    shutil.rmtree(state)
    there = submitted(tmp_path / "s", 1, 2)
    book = Ledger(there.parent)
    for round in (3, 4):
        book.spend(round, {1: EVENT}, **TERMS)
    with pytest.raises(UserError, match="has no line of client 0: name a=ROUNDS"):
        restore(file, made, lost=[f"a={submitted(tmp_path / 'other', 1, client=5)}"], personalised=0)
    assert restore(file, made, lost=[f"a={there}"], personalised=0).lost == {"a": 3} and spent(state) == 25


@pytest.fixture
def promised(site, tmp_path, tiny):
    """The same with a backup of a run that promised what four rounds cost."""
    most = epsilon([EVENT] * 4, 1e-5, "rdp")
    asked = tiny(f"privacy={{epsilon: {most}, delta: 1.0e-5, clip_norm: 1.0, accountant: rdp}}")
    introduce(site[1], "a", asked.model_dump(mode="json"))
    backup(site[0], tmp_path / "kept")
    return *site, tmp_path / "kept"


def test_all_that_a_run_may_spend_is_what_it_promised(promised):
    """Five rounds would pass the promise, and four do not."""
    file, state, made = promised
    shutil.rmtree(state)
    done = restore(file, made, lost=["a=all"], personalised=0)
    assert done.lost == {"a": 2} and (spent(state), spent(state, "a")) == (20, 20) and not done.closed


def test_where_nobody_knows_the_account_is_closed(promised):
    """It counts as all that the site allows, and pays for nothing any more, whatever the site file then says."""
    file, state, made = promised
    personalise(state, 500)
    shutil.rmtree(state)
    done = restore(file, made, lost=["all"])
    assert done.lost == {"a": 2} and done.closed and 8 <= done.after < 8.1
    assert "the account is closed" in "\n".join(done.lines())
    file.write_text(file.read_text().replace("max_epsilon: 8", "max_epsilon: 80"))
    with pytest.raises(Refusal) as refused:
        Account(state / "ledger", load(file).privacy).spend("b", 1, 0, EVENT)
    assert "its account is closed" in refused.value.own


@pytest.mark.parametrize("words, steps", [(["none"], 20), (["a=1"], 25), (["a=all"], 20), (["a=FILE"], 25)])
def test_an_account_that_is_gone_has_what_runs_ledgers_have(promised, tmp_path, words, steps):
    """Rounds 3 and 4 stand in the run's ledger alone, whatever the owner says of those that stand nowhere."""
    file, state, made = promised
    pay(state, "a", 3, 4)
    lose(state, "ledger")
    told = [word.replace("FILE", str(submitted(tmp_path / "s", 1, 2, 3, 4))) for word in words]
    done = restore(file, made, lost=told, merge=True, personalised=0)
    assert (spent(state), spent(state, "a"), done.level) == (steps, steps, 10)


def test_a_run_s_ledger_that_is_gone_has_what_the_account_has(kept):
    file, state, made = kept
    pay(state, "a", 3, 4)
    personalise(state, 50)
    lose(state, "a")
    done = restore(file, made, lost=["none"], merge=True)
    assert (spent(state), spent(state, "a"), done.level) == (70, 20, 10)


def test_steps_that_are_shared_out_or_banded_are_known_again(kept, tmp_path):
    """The account has a site's own part of shared noise, and of bands it has turns."""
    file, state, _ = kept
    shared = replace(EVENT, sharers=9.0)
    banded, account = replace(EVENT, bands=2, steps=4), Ledger(state / "ledger")
    for run, event, counted in (
        ("s", shared, in_sums([shared], 0.0)[0]),
        ("b", banded, replace(banded, bands=1, steps=2)),
    ):
        pay(state, run, event=event)
        book = Ledger(state / "runs" / run)
        for round in (1, 2):
            account.spend(round, {0: counted}, **TERMS, run=run)
            book.spend(round, {0: event}, **TERMS, honest=0.8, **begun(book))
    del account, book
    backup(file, tmp_path / "later")
    done = restore(file, tmp_path / "later")
    assert done.level == 0 and spent(state) == 10 + 10 + 4
    lose(state, "b", "s")
    assert restore(file, tmp_path / "later", lost=["none"]).level == 0
    lose(state, "ledger")
    for run, event in (("s", shared), ("b", banded)):
        book = Ledger(state / "runs" / run)
        book.spend(3, {0: event}, **TERMS, honest=0.8)
    del book
    done = restore(file, tmp_path / "later", lost=["none"], merge=True)
    assert done.level == 5 + 2 and spent(state) == 24 + 7
    last = ledger.read(state / "ledger" / "privacy.jsonl")[-1]
    assert (last["run"], last["noise_multiplier"], "sharers" in last) == ("s", 1.0, False)


def test_turns_of_banded_noise_go_on_after_a_backup(kept, tmp_path):
    """Three steps and three more are three turns of two groups, and nothing lacks."""
    file, state, _ = kept
    banded, account = replace(EVENT, bands=2, steps=3), Ledger(state / "ledger")
    pay(state, "b", event=banded)
    book = Ledger(state / "runs" / "b")
    for round, turns in ((1, 2), (2, 1)):
        account.spend(round, {0: replace(banded, bands=1, steps=turns)}, **TERMS, run="b")
        book.spend(round, {0: banded}, **TERMS, **begun(book))
        if round == 1:
            backup(file, tmp_path / "later")
    del account, book
    assert restore(file, tmp_path / "later", merge=True).level == 0 and spent(state) == 13


def test_a_ledger_that_was_lost_before_the_backup_hides_nothing(kept, tmp_path):
    """In the backup the account has two rounds that the run's ledger lacks; then the run has two that it lacks."""
    file, state, _ = kept
    lose(state, "a")
    backup(file, tmp_path / "later")
    pay(state, "a", 3, 4)
    lose(state, "ledger")
    done = restore(file, tmp_path / "later", lost=["none"], merge=True)
    assert (spent(state), spent(state, "a"), done.level) == (20, 20, 20)


def test_what_masked_sums_cost_is_what_a_run_promised(site, tmp_path, tiny):
    """Of a ninth of the noise one round alone passes the promise; in sums, as the run counts, many do not."""
    file, state = site
    shared = replace(EVENT, noise_multiplier=0.4, steps=1, sharers=9.0)
    pay(state, "s", 1, 2, event=shared)
    most = epsilon(in_sums([shared] * 5), 1e-5, "rdp")
    assert epsilon([shared], 1e-5, "rdp") > most
    asked = tiny(f"privacy={{epsilon: {most}, delta: 1.0e-5, clip_norm: 1.0, accountant: rdp}}")
    introduce(state, "s", asked.model_dump(mode="json"))
    backup(file, tmp_path / "kept")
    shutil.rmtree(state)
    done = restore(file, tmp_path / "kept", lost=["s=all"], personalised=0)
    assert done.lost == {"s": 3} and spent(state) == 10 + 5


def test_a_run_that_was_forgotten_after_the_backup_is_charged(promised):
    file, state, made = promised
    pay(state, "a", 3, 4)
    State(state).forget("a")
    lose(state, "ledger", "a")
    done = restore(file, made, lost=["all"])
    assert done.lost == {"a": 2} and spent(state, "a") == 20 and done.closed and not done.back


def test_a_run_that_was_forgotten_after_the_backup_is_named(promised, capsys):
    """Where the state is gone nobody here knows that it was."""
    file, state, made = promised
    State(state).forget("a")
    shutil.rmtree(state)
    assert main(["site", "restore", str(file), str(made), "--lost", "none"]) == 0
    assert "can be asked for again: a; where one was forgotten" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["rounds", "file", "none"])
def test_what_was_personalised_is_for_the_owner_to_say(kept, tmp_path, how):
    """The account alone had it: 500 steps, on the run's terms."""
    file, state, made = kept
    personalise(state, 500)
    shutil.rmtree(state)
    words = {"rounds": "a=0", "none": "none", "file": f"a={submitted(tmp_path / 's', 1, 2)}"}[how]
    if how != "none":
        with pytest.raises(UserError, match="add --personalised STEPS, in all runs together"):
            restore(file, made, lost=[words])
    restore(file, made, lost=[words], personalised=500)
    assert spent(state) == 510 + 5 * (how == "file") and spent(state, "a") == 10 + 5 * (how == "file")


def test_steps_on_terms_that_nobody_knows_are_not_charged_as_nothing(site, tmp_path):
    file, state = site
    lose(state, "ledger", "a")
    backup(file, tmp_path / "kept")
    with pytest.raises(UserError, match="no run is known by whose noise that was"):
        restore(file, tmp_path / "kept", lost=["none"], personalised=5)


def test_a_backup_from_before_the_first_round_begins_everything(site, tmp_path):
    """Whether the state went on from it or was begun again, its account alone does not say."""
    file, state = site
    lose(state, "ledger", "a")
    backup(file, tmp_path / "kept")
    for again in (False, True):
        if again:
            shutil.rmtree(state)
        pay(state, "b", 1)
        with pytest.raises(UserError, match="or was begun again"):
            restore(file, tmp_path / "kept", merge=True)
    there = submitted(tmp_path / "s", 1, 2, 3)
    restore(file, tmp_path / "kept", lost=[f"a={there}"], merge=True, personalised=0)
    assert (spent(state), spent(state, "a"), spent(state, "b")) == (25, 20, 5)


@pytest.mark.parametrize("folder", [True, False])
def test_a_run_that_begins_again_is_paid_for_again(kept, folder):
    """Its lines say the same as those of the backup; where ledgers alone were moved away, the key is the same."""
    file, state, made = kept
    shutil.rmtree(state) if folder else lose(state, "ledger", "a")
    pay(state, "a", 1, 2, 3)
    with pytest.raises(UserError, match="or was begun again"):
        restore(file, made, merge=True)
    restore(file, made, lost=["none"], merge=True)
    assert (spent(state), spent(state, "a")) == (25, 25)


def test_a_run_that_was_forgotten_stays_so(kept):
    file, state, made = kept
    assert main(["site", "forget", str(file), "a"]) == 0
    restore(file, made)
    assert sorted(p.name for p in (state / "runs" / "a").iterdir()) == [
        "forgotten",
        "privacy.head",
        "privacy.jsonl",
    ]


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1024, 2**18])
def test_encrypted_it_is_for_its_owner_alone(site, tmp_path, size):
    file, state = site
    (state / "runs" / "a" / "rows").write_bytes(b"secret row" + bytes(size))
    secret, other, made = (tmp_path / name for name in ("secret", "other", "kept"))
    secret.write_text("correct horse battery\n")
    other.write_text("correct horse batterx\n")
    assert backup(file, made, secret).sealed
    assert b"secret row" not in made.read_bytes() and b"noise_multiplier" not in made.read_bytes()
    shutil.rmtree(state)
    with pytest.raises(UserError, match="is encrypted: name the file of its passphrase"):
        restore(file, made, lost=["none"])
    with pytest.raises(UserError, match="the secret is another, or the file was changed or cut"):
        restore(file, made, other, ["none"])
    whole = made.read_bytes()
    for spoilt in (whole[:-1], whole[:-17], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        made.write_bytes(spoilt)
        with pytest.raises(UserError, match="the secret is another, or the file was changed or cut"):
            restore(file, made, secret, ["none"])
    made.write_bytes(whole)
    restore(file, made, secret, ["none"])
    assert spent(state) == 10


@pytest.mark.parametrize("sealed", [False, True])
def test_it_goes_through_a_pipe(site, tmp_path, capfdbinary, sealed):
    file, state = site
    (tmp_path / "secret").write_text("correct horse battery")
    told = ["--secret", str(tmp_path / "secret")] if sealed else []
    assert main(["site", "backup", str(file), "--out", "-", *told]) == 0
    data, said = capfdbinary.readouterr()
    assert b"the account has 2 paid rounds" in said and (b"it is not encrypted" in said) is not sealed
    shutil.rmtree(state)
    os.mkfifo(pipe := tmp_path / "pipe")
    threading.Thread(target=pipe.write_bytes, args=(data,)).start()
    assert main(["site", "restore", str(file), str(pipe), "--lost", "none", *told]) == 0
    assert spent(state) == 10


def test_what_cannot_be_a_backup_is_refused(kept, tmp_path):
    file, state, made = kept
    text, short = file.read_text(), tmp_path / "short"
    short.write_text("hunter2\n")
    whole = made.read_bytes()
    for data in (b"", b"nothing", whole[: len(whole) // 2], whole.replace(b'"steps": 5', b'"steps": 4', 1)):
        (tmp_path / "spoilt").write_bytes(data)
        with pytest.raises(UserError, match="is no whole backup of a site"):
            restore(file, tmp_path / "spoilt")
    for out, why in ((made, "is there already"), (state / "kept", "lies in the state folder")):
        with pytest.raises(UserError, match=why):
            backup(file, out)
    with pytest.raises(UserError, match="holds 7 bytes; a passphrase or key has 16 at least"):
        backup(file, tmp_path / "new", short)
    file.write_text(text.replace("st-mary", "st-john"))
    with pytest.raises(UserError, match="is a backup of the site 'st-mary', and this is 'st-john'"):
        restore(file, made)
    file.write_text(text)
    with (state / "lock").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"in use by (process|another)"):
            restore(file, made)


def test_a_damaged_ledger_is_not_kept_and_not_written_over(kept, tmp_path):
    file, state, made = kept
    book = state / "ledger" / "privacy.jsonl"
    book.write_text(book.read_text().replace('"steps": 5', '"steps": 4', 1))
    with pytest.raises(UserError, match="it was edited"):
        backup(file, tmp_path / "new")
    with pytest.raises(UserError, match=r"move privacy\.jsonl and privacy\.head elsewhere"):
        restore(file, made, lost=["none"], merge=True)
    assert '"steps": 4' in book.read_text() and not (tmp_path / "new").exists()


def test_a_statistic_is_counted_once_and_is_no_round_s_price(site, tmp_path):
    """Both ledgers have it under round 0; a lost round costs what rounds cost, though the statistic cost more."""
    file, state = site
    for folder, terms in ((state / "ledger", {**TERMS, "run": "b"}), (state / "runs" / "b", TERMS)):
        folder.mkdir(parents=True, exist_ok=True)
        book = Ledger(folder)
        book.spend(0, {0: STATISTIC}, **terms, statistic="gram", **begun(book))
    pay(state, "b", 1)
    backup(file, made := tmp_path / "kept")
    shutil.rmtree(state)
    restore(file, made, lost=["b=1"], personalised=0)
    assert spent(state, "b") == 1 + 2 * EVENT.steps and spent(state) == 1 + 4 * EVENT.steps


@pytest.mark.parametrize("heard", [False, True], ids=["from the run's ledger", "from the submitter's"])
def test_a_statistic_that_a_restore_charged_is_not_charged_by_the_next(site, tmp_path, heard):
    file, state = site
    backup(file, made := tmp_path / "first")
    theirs = tmp_path / "submitted"
    for folder, terms in (
        (theirs, TERMS),
        (state / "ledger", {**TERMS, "run": "b"}),
        (state / "runs" / "b", TERMS),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        book = Ledger(folder)
        book.spend(0, {0: STATISTIC}, **terms, statistic="gram", **begun(book))
        book.spend(1, {0: EVENT}, **terms)
    if heard:
        shutil.rmtree(state)
    else:
        lose(state, "ledger")
        backup(file, made := tmp_path / "without its account")
    restore(file, made, lost=[f"b={theirs / 'privacy.jsonl'}"] if heard else ["none"], personalised=0)
    expected = [1 + EVENT.steps * (2 + 1 + heard), 1 + EVENT.steps * (1 + heard)]  # one that may be under way
    assert [spent(state), spent(state, "b")] == expected
    backup(file, again := tmp_path / "second")
    assert restore(file, again).level == 0
    assert [spent(state), spent(state, "b")] == expected
