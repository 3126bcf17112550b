"""One program at a time."""

import errno
import fcntl
import gc
import os
import subprocess
import sys

import pytest

from fedlora.errors import UserError
from fedlora.privacy import lock

TRY = """
import sys
from pathlib import Path
from fedlora.privacy import lock
from fedlora.errors import UserError
try:
    lock.hold(Path(sys.argv[1]))
    print("taken")
except UserError as error:
    print(error)
"""


def elsewhere(file):
    """What another process gets."""
    return subprocess.run(
        [sys.executable, "-c", TRY, file], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_another_process_is_refused_until_nobody_here_holds_on(tmp_path):
    held = [lock.hold(tmp_path / "lock"), lock.hold(tmp_path / "lock")]
    assert held[0] is held[1]  # within a process it is shared
    why = f"in use by process {os.getpid()}; stop it (kill {os.getpid()}), or use another folder"
    assert elsewhere(tmp_path / "lock") == f"{tmp_path / 'lock'}: {why}"
    held.pop()
    assert "in use" in elsewhere(tmp_path / "lock")
    held.pop()
    gc.collect()
    assert elsewhere(tmp_path / "lock") == "taken"


def test_a_holder_that_the_system_does_not_name_is_another_process(tmp_path, monkeypatch):
    held = lock.hold(tmp_path / "lock")
    assert lock.holder(held.file) == os.getpid() and lock.holder(tmp_path / "none") is None
    monkeypatch.setattr(lock, "holder", lambda file: None)
    monkeypatch.setattr(lock, "_held", {})
    with pytest.raises(UserError, match="in use by another process; stop it, or use another folder"):
        lock.hold(held.file)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_have_it_and_takes_nothing_from_its_parent(tmp_path):
    held = lock.hold(tmp_path / "lock")
    if not (child := os.fork()):
        os._exit(0 if not held.mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held.mine and "in use" in elsewhere(tmp_path / "lock")


def test_it_waits_for_one_that_is_about_to_end(tmp_path, monkeypatch):
    tries = []

    def flock(handle, how):
        tries.append(handle)
        if len(tries) < 3:
            raise BlockingIOError(errno.EWOULDBLOCK, "taken")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "_PAUSE", 0.0)
    assert lock.hold(tmp_path / "lock", wait=60.0).mine and len(tries) == 3


@pytest.mark.parametrize(
    "number, words", [(errno.EWOULDBLOCK, "in use"), (errno.ENOLCK, "file system cannot lock")]
)
def test_what_cannot_be_locked_is_a_line(tmp_path, monkeypatch, number, words):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=words) as told:
        lock.hold(tmp_path / "lock")
    assert len(told.value.lines) == 1 and not lock._held
    with pytest.raises(UserError, match="cannot be opened to lock it"):
        lock.hold(tmp_path / "no folder" / "lock")
