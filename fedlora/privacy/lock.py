"""One program at a time: an exclusive lock on a file, for as long as somebody in this process holds on to it.

It is `flock`: the kernel lets go of it when the process ends, however it ends. Within a process a lock is shared,
so that a run can be resumed where it was begun; a child that was forked does not have it. The file is never
removed, as another program could then lock its successor. Over NFS the server must support locks.
"""

import contextlib
import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from fedlora.errors import UserError

_PAUSE = 0.05  # seconds between two tries

_held: "weakref.WeakValueDictionary[tuple[int, int], Lock]" = weakref.WeakValueDictionary()


class Lock:
    """A file that this process has locked, until nobody refers to this any more."""

    def __init__(self, file: Path, handle: int) -> None:
        self.file, self._handle = file, handle
        self._close = weakref.finalize(self, os.close, handle)

    def forget(self) -> None:
        """Have it no longer, in a child; the parent still does, for closing a copy lets go of nothing."""
        self._close()

    @property
    def mine(self) -> bool:
        """Whether this process has it: it was not forked from the one that does."""
        return self._close.alive


def hold(file: Path, wait: float = 0.0) -> Lock:
    """Lock a file, which is made where it is missing.

    Args:
        file: to lock.
        wait: seconds to wait for another process that has it.

    Raises:
        UserError: another process has it, or it cannot be locked.
    """
    end = time.monotonic() + wait
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)  # to write: NFS locks nothing that is only read
    except OSError as error:
        raise UserError(f"{file}: cannot be opened to lock it: {error.strerror}") from error
    there = os.fstat(handle)
    key = (there.st_dev, there.st_ino)
    if (mine := _held.get(key)) is not None:
        os.close(handle)
        return mine
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and time.monotonic() < end:
                time.sleep(_PAUSE)
                continue
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                whom, how = "another process", "stop it"
                if pid := holder(file):
                    whom, how = f"process {pid}", f"stop it (kill {pid})"
                raise UserError(f"{file}: in use by {whom}; {how}, or use another folder") from None
            raise UserError(f"{file}: its file system cannot lock it: {error.strerror}") from error
    _held[key] = lock = Lock(file, handle)
    return lock


def holder(file: Path) -> int | None:
    """The process that has locked a file; None where the system does not say, or it is not to be seen from here.

    Of the processes that `/proc/locks` names with the file's inode, the one that has the file open.
    """
    with contextlib.suppress(OSError):
        there = file.stat()
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] != "FLOCK" or not words[5].endswith(f":{there.st_ino}"):
                continue
            with contextlib.suppress(OSError):
                for handle in Path("/proc", words[4], "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if os.path.samestat(handle.stat(), there):
                            return int(words[4])
    return None


def _forget() -> None:
    for lock in list(_held.values()):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
