"""Many nodes that train nothing against a real SuperLink and fedlora's server: seconds, bytes and memory.

Each node is a thread that speaks to the SuperLink as a SuperNode does, introduces itself as a site, and sends back
the tensors that it gets. The scenario is `sites` without privacy, with as many clients. Memory is the peak of a
process.

    python benchmarks/superlink.py [--nodes 50] [--rounds 3]
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supernode.fleet_http_connection import http_request_response

from fedlora import wire
from fedlora.adapter import Update
from fedlora.run import Run

PAUSE = 3.0  # seconds after which a SuperNode asks again
EXAMPLES = 100


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        port = there.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        environment = {
            **os.environ,
            "FLWR_HOME": name,
            "FEDLORA_RUNS": str(folder / "server"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        os.environ.update(environment)
        with (folder / "link.log").open("wb") as log:
            command = [
                "flower-superlink",
                "--insecure",
                "--port",
                str(port),
                "--database",
                str(folder / "state.db"),
            ]
            link = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _listens(port):
                time.sleep(0.2)
            for client in range(told.nodes):
                threading.Thread(target=_node, args=(f"127.0.0.1:{port}", client), daemon=True).start()
            asked = {
                "clients.total": told.nodes,
                "rounds": told.rounds,
                "eval_every": told.rounds,
                "privacy": "null",
                "clients.use": "sgd",
                "data.test_share": 0.01,
            }
            sets = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
            command = [sys.executable, "-m", "fedlora", "submit", "sites", "--superlink", "here", *sets]
            began = time.monotonic()
            submitted = subprocess.Popen([*command, "--out", str(folder / "run")], env=environment)
            peaks = {"SuperLink": 0.0, "server": 0.0}
            while submitted.poll() is None:
                for pid, what in _processes(link.pid):
                    peaks[what] = max(peaks[what], _peak(pid))
                time.sleep(1)
            if submitted.returncode:
                sys.exit((folder / "link.log").read_text()[-3000:])
            seconds = time.monotonic() - began
            run = Run.open(folder / "run")
        finally:
            link.terminate()
            link.wait()
        rounds = [line["seconds"] for line in run.rounds]
        up, down = (sum(line[f"bytes_{way}"] for line in run.rounds) for way in ("up", "down"))
        each = told.nodes * told.rounds
        print(
            f"{told.nodes} nodes, {told.rounds} rounds, {run.summary['failures']} failures, {seconds:.0f} s in all"
        )
        print(f"a round: {statistics.median(rounds):.1f} s, {statistics.median(rounds) / told.nodes:.2f} s a node")
        print(f"a node and round: {up / each / 1e3:.0f} kB up, {down / each / 1e3:.0f} kB down")
        for what, peak in peaks.items():
            print(f"{what}: {peak:.0f} MB at most")
        print(f"database: {(folder / 'state.db').stat().st_size / 1e6:.1f} MB")


def _node(address: str, client: int) -> None:
    """Answer what the SuperLink asks, until the process ends."""
    with http_request_response(address, True) as (_, receive, send, _, _, pull, push, confirm):
        while True:
            if (got := receive()) is None:
                time.sleep(PAUSE)
                continue
            asked, tree = got
            run, number = asked.metadata.run_id, asked.metadata.message_id
            ids = [one.object_id for one in iterate_object_tree(tree)]
            contents = pull_objects(ids, pull_object_fn=partial(pull, run))
            message = inflate_object_from_contents(tree.object_id, contents)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = number
            confirm(run, number)
            reply = Message(_answer(message, client), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects: dict[str, Any] = get_all_nested_objects(reply)
            missing, session = send(reply, get_object_tree(reply), 0.0)
            push_object_contents_from_iterable(
                ((one, objects[one].deflate()) for one in missing), push_object_fn=partial(push, run, session)
            )


def _answer(message: Message, client: int) -> Any:
    if message.metadata.message_type == "query":
        return wire.pack_words(
            {
                "client": client,
                "name": f"stub-{client}",
                "time": time.time(),
                "num_examples": EXAMPLES,
                "event": None,
            }
        )
    adapter = wire.from_arrays(message.content.array_records[wire.ARRAYS])
    return wire.pack_update(
        Update(adapter=adapter, weight=float(EXAMPLES), clients=(client,), metrics={"loss": 1.0})
    )


def _listens(port: int) -> bool:
    with socket.socket() as there:
        return not there.connect_ex(("127.0.0.1", port))


def _processes(link: int) -> list[tuple[int, str]]:
    """The SuperLink and the process of the ServerApp, which loads the base model."""
    found = [(link, "SuperLink")]
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = place.read_bytes()
            home = f"FLWR_HOME={os.environ['FLWR_HOME']}".encode()
            if b"flwr-serverapp" in said and home in place.with_name("environ").read_bytes():
                found.append((int(place.parent.name), "server"))
        except OSError:
            continue
    return found


def _peak(pid: int) -> float:
    """The most memory that a process has had, MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
