"""The process that stays up on a node with the model in it, and how a ClientApp reaches it.

Flower starts a process for each message; loading the base model in each would take longer than the training.
So the ClientApp hands its message to this process over a Unix socket that only its owner can open. It is started
on demand, started again if it died, and ends when nothing was asked of it for a while.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIZES = struct.Struct(">IQ")  # bytes of the words, bytes of the content
_MOST_WORDS, _MOST_CONTENT = 2**20, 2**34
_START = 120.0  # seconds that a resident may take to listen
_TURNS = 100  # workers of other apps that are waited for
_PAUSE = 0.02  # seconds between two looks for one
_HERE = b"!"  # its first byte to whoever it takes in
_SHORT = 107 - len("/0123456789abcdef.sock")  # bytes of a folder: the path of a socket has 107 at most
_PORT = 10.0  # seconds that the worker before this one may take to let its port go
_IDLE = 300.0  # seconds without a request after which one ends where no site file says

logger = logging.getLogger("fedlora.deploy.resident")

Words = dict[str, Any]


class Unreachable(Exception):
    """There is no resident and none can be started; why, in words that the server may read."""


def ask(where: Path, app: Path, words: Words, content: bytes) -> tuple[Words, bytes]:
    """Hand a request to the node's resident, starting one if there is none.

    Args:
        where: the site file; in Flower's simulation a folder.
        app: of the Flower app; a resident that may have imported another's code gives way.
        words: of the request, JSON.
        content: bytes of the message's content.

    Returns:
        The same of the reply.

    Raises:
        Unreachable: it cannot be started, or died of the request twice.
    """
    died, turns, end = 0, 0, time.monotonic() + _START
    while (time.monotonic() < end or died or turns) and turns < _TURNS:
        try:
            with _connected(where, app) as there:
                _send(there, {**words, "app": str(app)}, content)
                told, reply = _receive(there)
        except (ConnectionError, EOFError) as error:
            if died:
                raise Unreachable("its worker died of this request, twice: its log says why") from error
            died += 1
            continue
        if not told.get("other_app"):
            return told, reply
        turns += 1
        time.sleep(_PAUSE)  # it ends now, or serves whoever was before
    raise Unreachable("its worker serves another app and does not end")


def place(where: Path) -> Path:
    """The socket of a node's resident."""
    return home() / f"{hashlib.sha256(str(where.resolve()).encode()).hexdigest()[:16]}.sock"


def home() -> Path:
    """A folder that only its owner can enter.

    Raises:
        Unreachable: somebody else made it, or opened it.
    """
    name = f"fedlora-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(folder)) > _SHORT:
        folder = Path("/tmp") / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if (there := folder.stat()).st_uid != os.getuid() or there.st_mode & 0o077:
        raise Unreachable(f"{folder} is open to others")
    return folder


@contextlib.contextmanager
def _connected(where: Path, app: Path) -> Iterator[socket.socket]:
    """A connection to the resident."""
    address, child = place(where), 0
    end = time.monotonic() + _START
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one resident, however many ask at once
        while (there := _taken_in(address)) is None:
            child = child or _start(where, app)
            if os.waitpid(child, os.WNOHANG)[0]:
                raise Unreachable("its worker does not start: what its node or container printed says why")
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                raise Unreachable(f"its worker did not listen within {_START:g} s")
            time.sleep(_PAUSE)
    with there:
        yield there


def _taken_in(address: Path) -> socket.socket | None:
    """A connection that the resident has taken in; None where there is none, or one that ends."""
    there = socket.socket(socket.AF_UNIX)
    try:
        there.connect(str(address))
        if there.recv(len(_HERE)) == _HERE:
            return there
    except OSError:
        pass
    there.close()
    return None


def _start(where: Path, app: Path) -> int:
    """Start a resident; gives its process id."""
    # -P: nothing is imported from the folder that this happens to be in; -B: nothing is written beside sources.
    command = [sys.executable, "-P", "-B", "-m", "fedlora.deploy.resident", str(where), str(app)]
    nothing = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=nothing, setsid=True)


def _send(there: socket.socket, words: Words, content: bytes) -> None:
    text = json.dumps(words).encode()
    there.sendall(_SIZES.pack(len(text), len(content)) + text)
    there.sendall(content)


def _receive(there: socket.socket) -> tuple[Words, bytes]:
    """Words and content.

    Raises:
        EOFError: the other side has gone, or talks nonsense.
    """
    words, content = _SIZES.unpack(_exactly(there, _SIZES.size))
    if words > _MOST_WORDS or content > _MOST_CONTENT:
        raise EOFError
    return json.loads(_exactly(there, words)), bytes(_exactly(there, content))


def _exactly(there: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        if not (got := there.recv_into(view[done:])):
            raise EOFError
        done += got
    return data


def main() -> int:
    """Serve a node until nothing was asked for a while."""
    parser = argparse.ArgumentParser(prog="python -m fedlora.deploy.resident")
    parser.add_argument("where", type=Path)
    parser.add_argument("app", type=Path)
    told = parser.parse_args()
    from fedlora.deploy import logs
    from fedlora.errors import UserError

    logs.start("site", shown := logging.StreamHandler())
    try:
        return _serve(told.where, told.app, shown)
    except UserError as error:
        for line in error.lines:
            logger.error("%s", line)
        return 2


def _serve(where: Path, app: Path, shown: logging.Handler) -> int:
    from fedlora.deploy import logs, metrics
    from fedlora.deploy.node import Node
    from fedlora.errors import UserError

    node, idle, ending = Node(where, app), _IDLE, contextlib.ExitStack()
    ending.callback(node.close)
    logs.start(node.site.name if node.site else "sites", shown, logs.File(node.state.folder / "site.log"))
    if node.site is not None:
        idle = 60 * node.site.idle_minutes
        if node.site.metrics_port is not None:
            try:
                told = (node, node.site.metrics_port, node.site.metrics_address, _PORT)
                ending.callback(metrics.of_site(*told))
            except UserError as error:  # no reason to take part in no run
                logger.error("%s; nothing is exported meanwhile", error)
    address = place(where)
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as here:
        before = os.umask(0o177)
        here.bind(str(address))
        os.umask(before)
        here.listen(64)
        here.settimeout(idle)
        logger.info("worker %d is up", os.getpid())
        try:
            while True:
                there, _ = here.accept()
                with there:
                    if not _answer(node, there):
                        return 0
        except TimeoutError:
            logger.info("worker %d ends: nothing was asked for %g s", os.getpid(), idle)
            return 0
        finally:
            ending.close()  # before the next one can be started
            address.unlink(missing_ok=True)


def _may_serve(node: Any, app: Path) -> bool:
    """Whether a process may serve a run of an app, which is then the node's; not after it ran another's code."""
    from fedlora.deploy import signing

    own_code = node.site is None or node.site.accept.own_code
    if own_code and app != node.app and signing.code(app) != signing.code(node.app):
        return False
    node.app = app
    return True


def _answer(node: Any, there: socket.socket) -> bool:
    """Serve one request; whether to go on."""
    from fedlora import wire

    try:
        there.sendall(_HERE)
        words, content = _receive(there)
        if not _may_serve(node, Path(words["app"])):
            _send(there, {"other_app": True}, b"")
            return False
    except (ConnectionError, EOFError):
        return True  # who asked is gone
    try:
        made = node.answer(words["kind"], wire.from_bytes(content), words["partition"])
        told, reply = {}, wire.to_bytes(made)
    except Exception:  # whatever a request trips over, the worker stays up
        logger.exception("a request failed", extra={"kind": words.get("kind")})
        told, reply = {"error": "the request failed: its log says more"}, b""  # not even of which kind
    try:
        _send(there, told, reply)
    except ConnectionError:
        logger.warning("who asked is gone; the reply is dropped", extra={"kind": words.get("kind")})
    there.close()
    node.afterwards()
    return True


if __name__ == "__main__":
    sys.exit(main())
