"""The process beside a SuperNode: started on demand, again when it dies, gone when idle; its owner's alone."""

import logging
import os
import signal
import socket
import stat
import time
from importlib.metadata import version

import pytest

from fedlora import wire
from fedlora.deploy import resident

HELLO = {"kind": "query", "partition": 0}


@pytest.fixture
def site(sites, tmp_path, monkeypatch):
    """A site file, with its resident's socket in a folder of the test's own."""
    monkeypatch.setattr(resident.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    _, files = sites()
    yield files[0]
    for pid in pids(files[0]):
        os.kill(pid, signal.SIGKILL)


def pids(site):
    found = []
    for folder in os.listdir("/proc"):
        try:
            with open(f"/proc/{folder}/cmdline", "rb") as stream:
                words = stream.read().split(b"\0")
        except OSError:
            continue
        if b"fedlora.deploy.resident" in words and os.fsencode(site) in words:
            found.append(int(folder))
    return found


def ask(site, app, **words):
    return resident.ask(site, app, {**HELLO, **words}, wire.to_bytes(wire.pack_words({"version": "0.0.1"})))


def test_one_process_serves_all_requests_and_comes_back_when_it_dies(site, tmp_path):
    for _ in range(2):
        told, reply = ask(site, tmp_path)
        assert told == {}
        words = wire.unpack_words(wire.from_bytes(reply))
        assert words["refused"] == f"it runs fedlora {version('fedlora')}, and the server 0.0.1: install one " + (
            "version on both sides"
        )
    (first,) = pids(site)
    os.kill(first, signal.SIGKILL)
    while os.path.exists(f"/proc/{first}") and first in pids(site):
        time.sleep(0.01)
    assert ask(site, tmp_path)[0] == {}
    (second,) = pids(site)
    assert second != first
    assert "worker" in (site.parent / "state" / "site.log").read_text()


def test_only_its_owner_reaches_it(site, tmp_path):
    ask(site, tmp_path)
    address = resident.place(site)
    assert stat.S_IMODE(address.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    address.parent.chmod(0o755)
    with pytest.raises(resident.Unreachable, match="is open to others"):
        resident.place(site)


def test_another_program_gets_another_process_and_another_run_does_not(site, tmp_path):
    """Apps that differ in their configuration alone are runs of one program."""
    site.write_text(site.read_text().replace("own_code: false", "own_code: true"))
    for name, text in (("one", "a = 1"), ("same", "a = 1"), ("other", "a = 2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(text)
        (tmp_path / name / "pyproject.toml").write_text(f"name = '{name}'")
    ask(site, tmp_path / "one")
    (first,) = pids(site)
    assert ask(site, tmp_path / "same")[0] == {} and pids(site) == [first]
    assert ask(site, tmp_path / "other")[0] == {}
    end = time.monotonic() + 20
    while first in pids(site) and time.monotonic() < end:
        time.sleep(0.01)
    assert first not in pids(site) and len(pids(site)) == 1


def test_a_port_that_is_taken_keeps_no_site_out_of_a_run(site, tmp_path, monkeypatch):
    ours = logging.getLogger("fedlora")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(ours, name, getattr(ours, name))
    monkeypatch.setattr(resident, "_PORT", 0.1)
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        told = f"metrics_port: {there.getsockname()[1]}\nidle_minutes: 0.001\n"
        site.write_text(site.read_text() + told)
        assert resident._serve(site, tmp_path, logging.NullHandler()) == 0
    for handler in ours.handlers:
        handler.close()
    log = (site.parent / "state" / "site.log").read_text()
    assert "cannot be used" in log and "is up" in log and "nothing was asked" in log


def test_it_ends_when_nothing_is_asked(site, tmp_path):
    site.write_text(site.read_text() + "idle_minutes: 0.005\n")
    ask(site, tmp_path)
    end = time.monotonic() + 20
    while pids(site) and time.monotonic() < end:
        time.sleep(0.01)
    assert not pids(site) and not resident.place(site).exists()


def test_a_request_that_is_nonsense_harms_nobody(site, tmp_path):
    ask(site, tmp_path)
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n" * 4, resident._SIZES.pack(2**31, 5)):
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(str(resident.place(site)))
            there.sendall(nonsense)
    told, _ = resident.ask(site, tmp_path, {**HELLO, "kind": "train"}, b"\xff")
    assert told["error"].endswith("its log says more")
    assert ask(site, tmp_path)[0] == {} and len(pids(site)) == 1


def test_a_site_file_that_is_wrong_is_said_on_the_site(site, tmp_path, capfd):
    site.write_text("name: a\n")
    with pytest.raises(resident.Unreachable, match="does not start: what its node or container printed says why"):
        ask(site, tmp_path)
    assert "client is missing" in capfd.readouterr().err


def test_sockets_lie_where_their_paths_are_short(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(resident.Path, "mkdir", lambda self, **_: made.append(str(self)))
    monkeypatch.setattr(
        resident.Path, "stat", lambda self: os.stat_result((0o40700, 0, 0, 0, os.getuid(), *[0] * 5))
    )
    for length in (60, 70, 200):
        monkeypatch.setattr(resident.tempfile, "gettempdir", lambda n=length: "/" + "x" * n)
        assert len(f"{resident.home()}/0123456789abcdef.sock") <= 107
    assert made == [f"{folder}/fedlora-{os.getuid()}" for folder in ("/" + "x" * 60, "/" + "x" * 70, "/tmp")]


def test_what_a_site_does_for_itself_begins_once_its_answer_has_gone(tmp_path):
    here, there = socket.socketpair()
    seen = []

    class Node:
        site, app = None, tmp_path

        def answer(self, kind, content, partition):
            return wire.pack_words({"ended": 2})

        def afterwards(self):
            assert here.recv(1) == b"!"
            seen.append(wire.unpack_words(wire.from_bytes(resident._receive(here)[1])))
            assert here.recv(1) == b"", "whoever asked is not kept waiting"

    with here, there:
        words = {"kind": "query.end", "partition": 0, "app": str(tmp_path)}
        resident._send(here, words, wire.to_bytes(wire.pack_words({})))
        assert resident._answer(Node(), there)
    assert seen == [{"ended": 2}]
