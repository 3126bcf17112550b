"""What travels through a run's log."""

import base64
import hashlib
import io
import json
import tarfile

import pytest
from rich.console import Console

from fedlora.deploy.report import COUNTS, MARK, Follower, Reported, _pack, _unpack
from fedlora.errors import UserError
from fedlora.reports.console import Live, summary_lines
from fedlora.run import Run
from fedlora.simulation import simulate

ROUND = {"round": 1, "accuracy": 0.5, "epsilon": None}


class Seen:
    def __init__(self):
        self.told = []

    def stage(self, what):
        self.told.append(what)

    def note(self, what):
        self.told.append(what)

    def begin(self, scenario, metric, done):
        self.told.append((scenario.name, metric, done))

    def round(self, line):
        self.told.append(line["round"])


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "run-1"
    (made / "adapter").mkdir(parents=True)
    (made / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 2000)
    (made / "summary.json").write_text('{"rounds": 1}')
    (made / "checkpoint").mkdir()
    (made / "checkpoint" / "state.json").write_text("{}")
    return made


def test_a_run_is_followed_and_its_folder_comes_back_whole(tiny, folder, tmp_path, capsys):
    told = Reported()
    told.stage("loading")
    told.note("site-1 joined")
    told.begin(tiny(), "accuracy", 0)
    told.round(ROUND)
    told.finished(folder)
    log = capsys.readouterr().out.splitlines()
    follower, seen = Follower(tiny(), display := Seen()), []
    for line in ["INFO: of Flower", *log[:4], *log]:  # a log that broke off is read again
        seen.append(follower.line(line))
    assert seen[0] is False and all(seen[1:]) and follower.ended and follower.name == "run-1"
    assert display.told == [
        "loading",
        "site-1 joined",
        ("tiny", "accuracy", 0),
        1,
        "loading",
    ]
    follower.save(tmp_path / "came")
    same = "adapter/adapter_model.safetensors"
    assert (tmp_path / "came" / same).read_bytes() == (folder / same).read_bytes()
    assert not (tmp_path / "came" / "checkpoint").exists()  # it stays with the server


def test_a_failure_is_told(tiny, capsys):
    Reported().failed("no site joined")
    follower = Follower(tiny(), Seen())
    follower.line(capsys.readouterr().out.strip())
    assert follower.ended and follower.failure == "no site joined"


def test_whom_coins_drew_and_how_many_stays_with_the_server_where_clients_are_protected_whole(
    tiny, tmp_path, capsys
):
    """Neither names of a round's clients nor counts, nor sums of them, come back; the rest can be read."""
    whole = "privacy={unit: client, noise_multiplier: 2.0, delta: 1.0e-2, clip_norm: 0.5}"
    for name, masked in (("plain", "{range: 1.0}"), ("shared", "{range: 1.0, noise: shared}")):
        scenario = tiny(whole, "clients.use=sgd", f"secure_aggregation={masked}")
        run = simulate(scenario, out=tmp_path / name)
        capsys.readouterr()
        told = Reported()
        told.begin(scenario, "accuracy", 0)
        told.round(run.rounds[0])
        told.finished(run.folder)
        log = capsys.readouterr().out.splitlines()
        follower = Follower(scenario, Seen())
        assert all(follower.line(line) for line in log)
        follower.save(tmp_path / f"{name}-came")
        came = Run.open(tmp_path / f"{name}-came")
        assert came.clients == [] and len(came.rounds) == 2 and came.state == "finished"
        shown = json.loads(log[1].removeprefix(MARK))["line"]
        for line in (shown, *came.rounds, came.summary):
            assert not set(line) & set(COUNTS) and "seconds" in line
        assert {"bytes_up", "clients", "failures"} <= set(run.rounds[0])  # the server has them
        assert (came.folder / "privacy.jsonl").exists() == (name == "plain")  # the other names clients
        assert "bytes" not in (came.folder / "adapter" / "README.md").read_text()
        promise = f"epsilon {came.summary['epsilon']:.3g} at delta {came.summary['delta']:g} for each "
        assert promise + came.summary["privacy_unit"] in "".join(summary_lines(came))
        with Live(Console(file=io.StringIO(), width=200), shown=True) as page:
            page.begin(scenario, "accuracy", 0)
            page.round(shown)


@pytest.mark.parametrize("text", ["{", "[]", '{"event": "round"}', '{"event": "finished", "digest": "x"}'])
def test_a_damaged_log_is_a_line(tiny, text):
    with pytest.raises(UserError, match="log is damaged"):
        Follower(tiny(), Seen()).line(MARK + text)


def test_a_folder_that_lost_a_piece_is_not_taken(tiny, folder, capsys):
    Reported().finished(folder)
    log = capsys.readouterr().out.splitlines()
    follower = Follower(tiny(), Seen())
    with pytest.raises(UserError, match="damaged"):
        for line in log[1:]:
            follower.line(line)


@pytest.mark.parametrize(
    "name, kind", [("../adapter", b"0"), ("/etc/passwd", b"0"), ("other", b"0"), ("adapter", b"2")]
)
def test_nothing_but_a_run_folder_is_written(name, kind, tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc"
        archive.addfile(member)
    with pytest.raises(UserError, match="no run folder does"):
        _unpack(stream.getvalue(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="is no archive"):
        _unpack(b"hello", tmp_path / "new")


def test_pieces_are_what_was_packed(folder, capsys):
    Reported().finished(folder)
    told = [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.splitlines()]
    data = base64.b85decode("".join(t["data"] for t in told if t["event"] == "folder"))
    assert told[-1]["digest"] == hashlib.sha256(data).hexdigest() == hashlib.sha256(_pack(folder)).hexdigest()


def test_where_clients_are_protected_whole_nothing_is_noted_once_they_are_drawn(tiny, capsys):
    told = Reported()
    told.note("site-1 joined")
    told.begin(tiny("privacy.unit=client", "clients.use=sgd"), "accuracy", 0)
    told.note("round 1: client 1 (site-1): no reply within 2 s")
    assert [json.loads(line.removeprefix(MARK))["event"] for line in capsys.readouterr().out.splitlines()] == [
        "note",
        "begin",
    ]
