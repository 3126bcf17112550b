"""What a round costs a site outside training, with the resident worker and without.

Flower starts a process for each message. Each sample here is such a process: it imports what a ClientApp
imports and serves one round of the scenario `sites`, through the resident worker or by loading the model itself.
What is told is the seconds from the process's start to its end, less those of training and of Flower's own
imports. The two take turns.

    python benchmarks/resident_worker.py [--rounds 5]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUND = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from flwr.clientapp import ClientApp  # what Flower's process imports before ours
flower = time.perf_counter() - began
from fedlora.deploy import client_app
from fedlora import wire
site, app, how, file = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
content = wire.from_bytes(file.read_bytes())
if how == "resident":
    from fedlora.deploy import resident
    told, reply = resident.ask(site, app, {"kind": "train", "partition": 0}, wire.to_bytes(content))
    reply = wire.from_bytes(reply)
    import json
    log = (site.parent / "state" / "site.log").read_text().splitlines()
    trained = json.loads(log[-1])["trained"]
else:
    from fedlora.deploy.node import Node
    node = Node(site, app)
    reply = node.answer("train", content, 0)
    trained = node.trained
assert "refused" not in wire.unpack_words(reply), wire.unpack_words(reply)
print(flower + trained)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive")
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = place
        site, messages = _prepare(Path(place), asked.rounds)
        outside: dict[str, list[float]] = {"resident": [], "alone": []}
        for message in messages:
            for how, seconds in outside.items():
                seconds.append(_round(site[how], Path(place), how, message))
        print(f"{'seconds outside training':<28} {'first round':>12} {'later, median':>14} {'(range)':>16}")
        for how, name in (("resident", "with the resident worker"), ("alone", "loading in each process")):
            first, *later = outside[how]
            spread = f"{min(later):.2f}-{max(later):.2f}"
            print(f"{name:<28} {first:>12.2f} {statistics.median(later):>14.2f} {spread:>16}")
        subprocess.run(["pkill", "-f", f"fedlora.deploy.resident {place}"])


def _prepare(place: Path, rounds: int) -> tuple[dict[str, Path], list[Path]]:
    """A site for each way, both introduced, and the messages of the rounds."""
    import json
    import shutil
    from importlib.metadata import version

    from fedlora import prepare, wire
    from fedlora import scenario as scenarios
    from fedlora.deploy.node import Node
    from fedlora.deploy.split import split
    from fedlora.engine.worker import Worker

    told = scenarios.load("sites", [f"rounds={2 * rounds}"])
    files = split(told, place / "sites")
    ready = prepare.prepare_server(told)
    worker = Worker(ready.setup)
    words = {
        "run": "bench",
        "scenario": json.loads(json.dumps(ready.setup.scenario)),
        "labels": list(ready.data.labels),
        "version": version("fedlora"),
        "base": worker.base_fingerprint(),
        "adapter": worker.describe().fingerprint,
    }
    sites = {}
    for how in ("resident", "alone"):
        folder = place / how
        shutil.copytree(files[0].parent, folder)
        (folder / "site.yaml").write_text(
            files[0].read_text().replace(str(place / "sites" / "site-0"), str(folder))
        )
        Node(folder / "site.yaml", place).answer("query", wire.pack_words(words), 0)
        sites[how] = folder / "site.yaml"
    ready.strategy.bind(worker.task.layout, worker.task.kind, worker.task.initial, private=True)
    messages = []
    for round in range(1, rounds + 1):
        instruction = ready.strategy.instruct(round, worker.task.initial)
        content = wire.pack_instruction(instruction, worker.task.layout)
        content[wire.REPORT] = wire.pack_words({"run": "bench", "merged": 0})[wire.REPORT]
        messages.append(place / f"round-{round}")
        messages[-1].write_bytes(wire.to_bytes(content))
    return sites, messages


def _round(site: Path, app: Path, how: str, message: Path) -> float:
    """Seconds of a process that serves one round, less training and what Flower's own imports take."""
    told = app / "told"  # a pipe would stay open with the worker
    began = time.perf_counter()
    with told.open("w") as stream:
        command = [sys.executable, "-c", ROUND, str(site), str(app), how, str(message)]
        subprocess.run(command, stdout=stream, check=True)
    return time.perf_counter() - began - float(told.read_text().split()[-1])


if __name__ == "__main__":
    main()
