"""`fedlora site report` and `fedlora report state/runs/X`: what an owner reads, also where runs have ended."""

import re

import pytest

from fedlora.cli import main
from fedlora.deploy import history
from fedlora.deploy.account import Account
from fedlora.deploy.history import History
from fedlora.deploy.site import load
from fedlora.deploy.statement import html, runs
from fedlora.privacy.accounting import Event
from fedlora.record import Record
from tests.deploy.federation import meet, refusal

EVENT = Event(noise_multiplier=1.0, sample_rate=0.1, steps=5, clip_norm=1.0)


def test_a_run_is_told_as_finished_where_its_last_round_was_trained(server, node, capsys):
    words, files, train = server()
    meet(site := node(files[0]), words)
    folder = site.state.folder / "runs" / "tiny-1"
    said = []
    for round in (1, 2):
        said.append(Record.open(folder).site_said)
        assert refusal(site, train(round)) is None
    assert said == [
        "no round of 2 was trained here yet",
        "1 of 2 rounds were trained here, round 1 the last; whether the run goes on its server knows",
    ]
    site.close()
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "a site&#x27;s part of a run: 2 of 2 rounds were trained here, its last among them: finished" in page
    assert "has not ended" not in page and "an unknown version" not in page and "ended not yet" not in page
    assert main(["site", "report", str(files[0])]) == 0
    assert capsys.readouterr().out.endswith("state/report.html\n")
    page = (site.state.folder / "report.html").read_text()
    assert re.search(r"tiny-1</th><td>tiny</td><td>not signed</td>.*?>2</td>.*?2 of 2 rounds were trained", page)
    assert "days since" in page and "http" not in re.sub(r"<script.*</script>|xmlns\S+", "", page, flags=re.S)


def test_what_was_spent_stands_by_run_and_by_submitter(made):
    file = made(more="privacy: {max_epsilon: 8, delta: 1.0e-5}\n")
    site = load(file)
    site.folder.mkdir()
    account, record = Account(site.folder / "ledger", site.privacy), History(site.folder)
    alone = {}
    for run, whose in (("a-1", "SHA256:x lab"), ("a-2", "SHA256:x lab"), ("b-1", None)):
        account.spend(run, 1, 2, EVENT)
        alone.setdefault("one", account.epsilon)
        told = {"run": run, "submitter": whose, "scenario": "wards", "epsilon_site": account.epsilon}
        record.write(history.ROUND, history.ANSWERED, round=1, **told)
        alone[run] = account.epsilon
    record.write(history.ROUND, history.REFUSED, run="c-1", round=4, why="it is <no> run for us")
    page = html(file)
    one, two, all_ = (f"{alone[key]:.3g}" for key in ("one", "a-2", "b-1"))
    assert f'lab</th><td class="number">2</td><td class="number">{two}</td>' in page
    assert f'not signed</th><td class="number">1</td><td class="number">{one}</td>' in page
    assert f"<dd>{float(all_):.2f}<small>of 8 at delta 1e-05" in page
    assert page.count("its files are no longer kept here") == 3 and "c-1</td><td>round 4" in page
    assert "it is &lt;no&gt; run for us" in page and "never leave the site" in page
    assert 'surgery</th><td class="number">1' in page and "ein text" not in page


def test_a_statistic_is_no_paid_round_and_no_training_further(made, capsys):
    file = made(more="privacy: {max_epsilon: 8, delta: 1.0e-5}\n")
    site = load(file)
    site.folder.mkdir()
    account = Account(site.folder / "ledger", site.privacy)
    account.spend("a-1", 0, 2, EVENT, statistic="gram")
    account.spend("a-1", 1, 2, EVENT)
    (ran,) = runs(site, [])
    assert ran.rounds == 1 and len(ran.events) == 2 and "trained further" not in ran.said
    assert ran.said.endswith("; gave a statistic of the rows before its first round")
    main(["site", "check", str(file)])
    assert "; a-1 1 round\n" in capsys.readouterr().out


def test_an_empty_site_has_a_page_and_a_damaged_one_a_line(made, tmp_path, capsys):
    file = made(more="privacy: {max_epsilon: 8, delta: 1.0e-5}\n")
    for what in ("report", "log"):
        assert main(["site", what, str(file)]) == 0
        assert "nothing was asked of this site yet" in capsys.readouterr().out
    assert main(["site", "report", str(file), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "The site took part in none yet" in page and "0.00<small>of 8" in page
    site = load(file)
    site.folder.mkdir()
    Account(site.folder / "ledger", site.privacy).spend("a-1", 1, 2, EVENT)
    ledger = site.folder / "ledger" / "privacy.jsonl"
    text = ledger.read_text()
    ledger.write_text(text.replace('"round": 1', '"round": 3'))
    capsys.readouterr()
    assert main(["site", "report", str(file)]) == 2
    said = capsys.readouterr().err
    assert "privacy.jsonl:1: does not follow" in said and said.count("\n") == 1
    ledger.write_text(text)
    (site.folder / history.NAME).write_text("?\n")
    assert main(["site", "report", str(file)]) == 2 and "history.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["labels: [x, y]"])
def test_rows_that_cannot_be_read_are_a_notice(made, data):
    page = html(made(data=data))
    assert "They cannot be read" in page and "data.labels" in page
