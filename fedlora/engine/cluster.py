"""Ray itself: started on this machine, or a cluster joined whose head is looked for."""

import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from fedlora.engine.hardware import Node
from fedlora.errors import UserError

_SHORT = 30  # characters of a folder that has room for a session's sockets, of 107

SILENCE = 15.0  # seconds for which a cluster's head may not answer; Ray itself ends this process after 60

LAST_WORDS = (
    "fedlora: the run's process was killed, by SIGKILL or for want of memory, or Ray died on its machine; its "
    "workers end with it. What was finished is saved: go on with --resume"
)


def place() -> dict[str, str]:
    """An option of Ray for a short folder, where its own choice leaves no room for the paths of its sockets."""
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {"_temp_dir": f"/tmp/ray-{os.getuid()}"} if len(chosen) > _SHORT else {}


def begin(instead: str, **options: Any) -> None:
    """Start Ray on this machine, or join a cluster at an `address`.

    Args:
        instead: what to do where it cannot be, for the end of a line.
        options: of `ray.init`.

    Raises:
        UserError: Ray did not start in its time, or cannot be reached.
    """
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except Exception as error:  # a machine that is too slow is a bare Exception to Ray
        where = "this machine" if options["address"] == "local" else options["address"]
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot reach Ray at {where}: {why}: {instead}") from error


class Cluster:
    """Where actors run: this machine, or the nodes of the cluster at an address.

    Attributes:
        address: of the cluster's head; None: Ray is started here.
        gone: whether the head is taken for dead, and with it all that ran there.
    """

    def __init__(self, address: str | None) -> None:
        self.address, self.gone = address, False
        self._mine = False
        self._closed: Callable[[], object] = lambda: None
        self._looked = 0.0  # for the head, when last
        self._silent: float | None = None  # since when it has not answered

    def connect(self, cores: int) -> list[Node]:
        """Start Ray or join a cluster; where Ray runs in this process already, be on that.

        Args:
            cores: that Ray may use, where it is started here.

        Returns:
            What the nodes have.

        Raises:
            UserError: it cannot be reached.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        import ray

        if not ray.is_initialized():
            self._mine, self._closed = True, _witness(self)
            options: dict[str, Any] = (
                {"address": self.address}
                if self.address
                else {
                    "address": "local",  # and not whatever cluster runs here
                    "num_cpus": cores,
                    "include_dashboard": False,
                    "object_store_memory": 512 * 2**20,
                }
            )
            if not self.address:
                options |= place()
            before = signal.getsignal(signal.SIGTERM)
            try:
                begin(
                    "start it there" if self.address else "engine.kind: inline needs none, for the same result",
                    **options,
                )
            except SystemExit as stop:  # what Ray makes of a SIGTERM while it starts
                raise KeyboardInterrupt from stop
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)  # Ray's own prints where it was in the code
        held = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(int(has.get("GPU", 0)), int(has.get("CPU", 0))) for has in held]

    def look_for_head(self) -> None:
        """Make sure that the head of a joined cluster is there.

        Raises:
            UserError: it has not answered for a while.
        """
        import ray

        if self.address is None or (now := time.monotonic()) - self._looked < 1.0:
            return
        self._looked = now
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            self._silent = None
        except OSError as error:
            self._silent = self._silent or now
            if now - self._silent > SILENCE:
                self.gone, self._mine = True, False  # there is nobody to let go
                raise UserError(
                    f"the head of the Ray cluster at {self.address} is gone ({error.strerror or error}); what was "
                    "finished is saved: start a cluster, and go on with --resume"
                ) from error

    def close(self) -> None:
        """End Ray if it was started here, or let the cluster go."""
        import ray

        if self._mine:
            ray.shutdown()
            self._mine = False
        self._closed()


def _witness(cluster: object) -> Callable[[], object]:
    """A process that says a line if this one ends at once: Ray's core ends it so, and no hook of Python's runs.

    Returns:
        Lets it go; so do the end of the cluster and an orderly end of this process.
    """
    told = ["sh", "-c", 'read -r closed || echo "$0" >&2', LAST_WORDS]
    witness = subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    return weakref.finalize(cluster, witness.communicate, b"closed\n")
