"""Many nodes that train nothing against a real SuperLink and fedlora's server: seconds, bytes, memory and CPU.

Each node is a thread that speaks to the SuperLink as a SuperNode does, introduces itself as a site, and sends back
the tensors that it gets, with its number added, for the SuperLink stores equal tensors once. The scenario is
`sites` without privacy, with as many clients. Memory is the peak of a process.

    python benchmarks/superlink.py [--nodes 50] [--per-round 50] [--rounds 3] [--pause 3] [--in-memory]
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
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
PROCESSES = 2  # that the nodes are threads of
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
    parser.add_argument("--in-memory", action="store_true", help="the SuperLink's database, not on disk")
    told = parser.parse_args()
    cohort = told.per_round or told.nodes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = _environment(folder)
        database = ":flwr-in-memory:" if told.in_memory else str(folder / "state.db")
        with (folder / "link.log").open("wb") as log:
            command = ["flower-superlink", "--insecure", "--port", str(port), "--database", database]
            link = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        there = multiprocessing.get_context("spawn")
        joined = there.Value("i", 0)
        nodes = [
            there.Process(
                target=_nodes, args=(f"127.0.0.1:{port}", part, told.nodes, told.pause, joined), daemon=True
            )
            for part in range(PROCESSES)
        ]
        try:
            while not _listens(port):
                time.sleep(0.2)
            began = time.monotonic()
            for process in nodes:
                process.start()
            while joined.value < told.nodes:
                time.sleep(0.2)
            print(f"{told.nodes} nodes connected after {time.monotonic() - began:.0f} s", flush=True)
            before = _cpu(link.pid)
            time.sleep(told.quiet)
            idle = (_cpu(link.pid) - before) / told.quiet
            print(
                f"while they only ask: {idle:.2f} cores of the SuperLink, {1e3 * idle / told.nodes:.2f} ms/s each"
            )
            run, seen, seconds = _run(folder, link.pid, told.nodes, cohort, told.rounds)
        finally:
            link.terminate()
            link.wait()
            for process in nodes:
                process.kill()
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
        print(f"nodes that the SuperLink failed, and that came back: {joined.value - told.nodes}")
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
    folder: Path, link: int, nodes: int, cohort: int, rounds: int
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
    while submitted.poll() is None:
        first = not any(file.stat().st_size for file in (folder / "server").glob("*/metrics.jsonl"))
        for pid, what in _processes(link):
            peak, spent = max(seen[what][1], _peak(pid)), max(seen[what][2], _cpu(pid))
            seen[what] = (peak if first else seen[what][0], peak, spent)
        time.sleep(1)
    if submitted.returncode:
        sys.exit((folder / "link.log").read_text()[-3000:])
    peak_first, peak, spent = seen["SuperLink"]
    seen["SuperLink"] = (peak_first, peak, spent - before)
    return Run.open(folder / "run"), seen, time.monotonic() - began


def _nodes(address: str, part: int, total: int, pause: float, joined: Any) -> None:
    """Be every PROCESSES-th node, until the process is killed."""
    threading.stack_size(256 * 1024)
    vars(ssl)["create_default_context"] = functools.cache(ssl.create_default_context)  # 1 MB each, and not used
    door = threading.Semaphore(4)
    for client in range(part, total, PROCESSES):
        threading.Thread(target=_node, args=(address, client, pause, door, joined), daemon=True).start()
    threading.Event().wait()


def _node(address: str, client: int, pause: float, door: threading.Semaphore, joined: Any) -> None:
    """Be a node, until the process ends; one that the SuperLink fails comes back, as a container does."""
    while True:
        with contextlib.ExitStack() as stack:
            with door:  # a few at a time
                connected = stack.enter_context(http_request_response(address, True))
            _, receive, send, _, _, pull, push, confirm = connected
            with joined.get_lock():
                joined.value += 1
            while True:
                if (got := receive()) is None:
                    time.sleep(pause)
                    continue
                asked, tree = got
                run, number = asked.metadata.run_id, asked.metadata.message_id
                ids = [one.object_id for one in iterate_object_tree(tree)]
                contents = pull_objects(ids, pull_object_fn=functools.partial(pull, run))
                message = inflate_object_from_contents(tree.object_id, contents)
                assert isinstance(message, Message)
                message.metadata.__dict__["_message_id"] = number
                confirm(run, number)
                reply = Message(_answer(message, client), reply_to=message)
                reply.metadata.__dict__["_message_id"] = reply.object_id
                objects: dict[str, Any] = get_all_nested_objects(reply)
                missing, session = send(reply, get_object_tree(reply), 0.0)
                push_object_contents_from_iterable(
                    ((one, objects[one].deflate()) for one in missing),
                    push_object_fn=functools.partial(push, run, session),
                )
        time.sleep(pause)


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
