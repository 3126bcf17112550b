"""Many nodes that train nothing against a real SuperLink and fedlora's server: seconds, bytes, memory and CPU.

The nodes are connections of one process: each has keys, a heartbeat and requests of its own, as a SuperNode has,
and a few threads serve whichever is due. A node introduces itself as a site, and sends back the tensors that it
gets, with its number added, for the SuperLink stores equal tensors once. The scenario is `sites` without privacy,
with as many clients. Memory is the peak of a process.

    python benchmarks/superlink.py [--nodes 50] [--per-round 50] [--rounds 3] [--pause 3] [--in-memory]
"""

import argparse
import functools
import heapq
import multiprocessing
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node as Number
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora import wire
from fedlora.adapter import Update
from fedlora.run import Run

PAUSE = 3.0  # seconds after which a SuperNode asks again
EXAMPLES = 100
THREADS = 8  # that serve all nodes, and as many their heartbeats
TRIES = 5  # of a request that does not arrive
BEAT = 0.8 * (HEARTBEAT_DEFAULT_INTERVAL - 5)  # seconds after which a SuperNode says that it is there
TICK = os.sysconf("SC_CLK_TCK")  # of /proc, a second


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--per-round", type=int, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quiet", type=float, default=20.0, help="seconds for which nothing but asking is measured"
    )
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds after which a node asks again")
    parser.add_argument("--within", type=float, default=600.0, help="seconds in which all nodes must connect")
    parser.add_argument("--in-memory", action="store_true", help="the SuperLink's database, not on disk")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what was started is ended below
    cohort = told.per_round or told.nodes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = _environment(folder)
        database = ":flwr-in-memory:" if told.in_memory else str(folder / "state.db")
        with (folder / "link.log").open("wb") as log:
            command = ["flower-superlink", "--insecure", "--port", str(port), "--database", database]
            link = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        there = multiprocessing.get_context("spawn")
        counts = [there.Value("i", 0) for _ in range(3)]
        joined, lost, requests = counts
        nodes = there.Process(
            target=_nodes, args=(f"127.0.0.1:{port}", told.nodes, told.pause, *counts), daemon=True
        )

        def alive() -> None:
            """End where what all wait for is gone."""
            for name, code in (("SuperLink", link.poll()), ("nodes' process", nodes.exitcode)):
                if code is not None:
                    sys.exit(f"the {name} ended with {code}\n{(folder / 'link.log').read_text()[-3000:]}")

        try:
            while not _listens(port):
                alive()
                time.sleep(0.2)
            began = time.monotonic()
            nodes.start()
            while joined.value < told.nodes:
                alive()
                if time.monotonic() - began > told.within:
                    sys.exit(f"{joined.value} of {told.nodes} nodes connected within {told.within:.0f} s")
                time.sleep(0.2)
            print(f"{told.nodes} nodes connected after {time.monotonic() - began:.0f} s", flush=True)
            before, asked = _cpu(link.pid), requests.value
            time.sleep(told.quiet)
            idle_asked, asked = (requests.value - asked) / told.quiet, requests.value
            idle = (_cpu(link.pid) - before) / told.quiet
            print(
                f"while they only ask: {idle:.2f} cores of the SuperLink, {1e3 * idle / told.nodes:.2f} ms/s each"
            )
            run, seen, seconds = _run(folder, link.pid, told.nodes, cohort, told.rounds, alive)
        finally:
            for pid, what in _processes(link.pid):
                if what == "server":  # outlives the SuperLink
                    os.kill(pid, signal.SIGKILL)
            link.terminate()
            link.wait()
            if nodes.pid:
                nodes.kill()
        rounds = [line["seconds"] for line in run.rounds]
        up, down = (sum(line[f"bytes_{way}"] for line in run.rounds) for way in ("up", "down"))
        each = cohort * told.rounds
        median, failures = statistics.median(rounds), run.summary["failures"]
        print(f"{told.rounds} rounds of {cohort}, {failures} failures, {seconds:.0f} s in all")
        print(f"a round: {median:.1f} s, {median / cohort:.2f} s for each of its nodes")
        print(f"a node and round: {up / each / 1e3:.0f} kB up, {down / each / 1e3:.0f} kB down")
        for what, (first, last, spent) in seen.items():
            of = (
                f"{spent:.0f} s of CPU"
                if what != "SuperLink"
                else f"{spent - idle * seconds:.0f} s of CPU beside asking"
            )
            print(f"{what}: {last:.0f} MB at most, {first:.0f} MB after the first round; {of}")
        print(f"nodes that the SuperLink failed: {lost.value}")
        print(f"requests of nodes: {requests.value - asked}, of which {idle_asked:.0f} a second only ask")
        if not told.in_memory:
            print(f"database: {(folder / 'state.db').stat().st_size / 1e6:.1f} MB")


def _environment(folder: Path) -> int:
    """Where Flower and fedlora find themselves, for this process and those that it starts; gives the port."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        port = int(there.getsockname()[1])
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    os.environ |= {
        "FLWR_HOME": str(folder),
        "FEDLORA_RUNS": str(folder / "server"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return port


def _run(
    folder: Path, link: int, nodes: int, cohort: int, rounds: int, alive: Callable[[], None]
) -> tuple[Run, dict[str, tuple[float, float, float]], float]:
    """Submit a run; gives it, of each process MB after the first round, at most and CPU, and the seconds."""
    asked = {
        "clients.total": nodes,
        "clients.per_round": cohort,
        "rounds": rounds,
        "eval_every": rounds,
        "engine.deadline": 3600,
        "privacy": "null",
        "clients.use": "sgd",
        "data.test_share": 0.01,
    }
    sets = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fedlora", "submit", "sites", "--superlink", "here", *sets]
    began, before = time.monotonic(), _cpu(link)
    submitted = subprocess.Popen([*command, "--out", str(folder / "run")])
    seen = dict.fromkeys(("SuperLink", "server"), (0.0, 0.0, 0.0))
    try:
        while submitted.poll() is None:
            alive()
            first = not any(file.stat().st_size for file in (folder / "server").glob("*/metrics.jsonl"))
            for pid, what in _processes(link):
                peak, spent = max(seen[what][1], _peak(pid)), max(seen[what][2], _cpu(pid))
                seen[what] = (peak if first else seen[what][0], peak, spent)
            time.sleep(1)
    finally:
        submitted.terminate()
    if submitted.returncode:
        sys.exit((folder / "link.log").read_text()[-3000:])
    peak_first, peak, spent = seen["SuperLink"]
    seen["SuperLink"] = (peak_first, peak, spent - before)
    return Run.open(folder / "run"), seen, time.monotonic() - began


class Node:
    """A connection to the SuperLink, as a SuperNode has one; where the SuperLink fails it, it begins again.

    Args:
        address: of the SuperLink.
        client: its number in the scenario.
        pause: seconds after which it asks again.
        joined: counts nodes that connected, and those that came back.
        lost: counts nodes that the SuperLink failed.
        requests: counts what was asked.
    """

    def __init__(self, address: str, client: int, pause: float, joined: Any, lost: Any, requests: Any) -> None:
        self.address, self.client, self.pause = address, client, pause
        self.joined, self.lost, self.requests = joined, lost, requests
        self.link: FleetHttpClient | None = None
        self.number = Number()

    def turn(self) -> float:
        """Do what is due; gives the seconds until the next turn."""
        try:
            if self.link is None:
                self._connect()
            told = self._ask("PullMessages", PullMessagesRequest(node=self.number))
            if told.messages_list:
                self._serve(message_from_proto(told.messages_list[0]), told.message_object_trees[0])
                return 0.0
        except Exception as error:  # it comes back, as a container does
            print(f"node {self.client}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self.link = None
            _count(self.lost)
        return self.pause

    def beat(self) -> float:
        """Say that it is there; gives the seconds until it says so again."""
        if self.number.node_id and (link := self.link) is not None:
            try:
                link.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=self.number, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                )
            except httpx.HTTPError:
                return 1.0
        return BEAT

    def _connect(self) -> None:
        private, public = generate_key_pairs()
        interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, public)]
        self.link = FleetHttpClient.from_server_address(self.address, True, None, interceptors)
        key = public_key_to_bytes(public)
        self._ask("RegisterNode", RegisterNodeFleetRequest(public_key=key))
        asked = ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self.number = Number(node_id=self._ask("ActivateNode", asked).node_id)
        _count(self.joined)

    def _ask(self, what: str, request: Any) -> Any:
        """The answer to a request, which is sent again where it did not arrive, as a SuperNode does."""
        for left in reversed(range(TRIES)):
            _count(self.requests)
            try:
                return getattr(self.link, what)(request)
            except httpx.TransportError:
                if not left:
                    raise
                time.sleep(1)
        raise AssertionError(TRIES)

    def _serve(self, asked: Message, tree: Any) -> None:
        """Fetch a message, piece by piece, and send the answer so."""
        run, number = asked.metadata.run_id, asked.metadata.message_id
        ids = [one.object_id for one in iterate_object_tree(tree)]
        pull = make_pull_object_fn_protobuf(functools.partial(self._ask, "PullObject"), self.number, run)
        message = inflate_object_from_contents(tree.object_id, pull_objects(ids, pull_object_fn=pull))
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = number
        confirm = functools.partial(self._ask, "ConfirmMessageReceived")
        make_confirm_message_received_fn_protobuf(confirm, self.number, run)(number)
        reply = Message(_answer(message, self.client), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects: dict[str, Any] = get_all_nested_objects(reply)
        pushed = self._ask(
            "PushMessages",
            PushMessagesRequest(
                node=self.number,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            ),
        )
        push = make_push_object_fn_protobuf(
            functools.partial(self._ask, "PushObject"), self.number, run, pushed.session_id
        )
        missing = set(pushed.objects_to_push)
        push_object_contents_from_iterable(((one, objects[one].deflate()) for one in missing), push_object_fn=push)


def _count(of: Any) -> None:
    with of.get_lock():
        of.value += 1


def _nodes(address: str, total: int, pause: float, *counts: Any) -> None:
    """Be all nodes, until the process is killed."""
    vars(ssl)["create_default_context"] = functools.cache(ssl.create_default_context)  # 1 MB each, and not used
    nodes = [Node(address, client, pause, *counts) for client in range(total)]
    for what in ([node.turn for node in nodes], [node.beat for node in nodes]):
        due = [(time.monotonic(), number) for number in range(total)]
        change = threading.Condition()
        for _ in range(THREADS):
            threading.Thread(target=_turns, args=(due, change, what), daemon=True).start()
    threading.Event().wait()


def _turns(due: list[tuple[float, int]], change: threading.Condition, what: list[Callable[[], float]]) -> None:
    """Do whatever is due first, for ever; `due` is a heap of times and places in `what`."""
    while True:
        with change:
            while not due or due[0][0] > time.monotonic():
                change.wait(due[0][0] - time.monotonic() if due else None)
            _, number = heapq.heappop(due)
        wait = what[number]()
        with change:
            heapq.heappush(due, (time.monotonic() + wait, number))
            change.notify()


def _answer(message: Message, client: int) -> Any:
    kind = message.metadata.message_type
    if kind == f"query.{wire.END}":
        return wire.pack_words({})
    if kind == "query":
        return wire.pack_words(
            {
                "client": client,
                "name": f"stub-{client}",
                "version": version("fedlora"),
                "time": time.time(),
                "num_examples": EXAMPLES,
                "event": None,
            }
        )
    came = wire.from_arrays(message.content.array_records[wire.ARRAYS])
    adapter = {name: tensor + np.float32(1e-6 * client) for name, tensor in came.items()}
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


def _cpu(pid: int) -> float:
    """The seconds of CPU that a process has had."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / TICK


def _peak(pid: int) -> float:
    """The most memory that a process has had, MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
