"""Kill a run wherever the disk has changed, go on with it, and compare with the run that was never killed.

    python -m tests.faults.kill SCENARIO FOLDER [EVERY [beside]]

The phases are what the code has: every line of the loop, the ledger, the checkpoints and the run folder, and of
the standard library's `shutil` beneath them, that a run of the scenario comes to. A resumed run sees nothing but
the disk, so of the lines that find the disk as it was one is enough: the run is killed before the first line after
each change, or after every EVERY-th one. Each run is a process of its own, forked from this one, which has
imported and loaded all but trained nothing. With `beside` each round is evaluated in the course of the next.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import fedlora
from fedlora import scenario, simulation
from fedlora.adapter import Instruction
from fedlora.client import Setter
from fedlora.engine.inline import InlineEngine
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import accounting, ledger
from fedlora.rounds import checkpoint, folder
from fedlora.rounds import loop as rounds

WATCHED = {module.__file__ for module in (rounds, ledger, checkpoint, folder, simulation, shutil)}
SAME = ("round", "clients", "failures", "loss", "accuracy", "bytes_up", "bytes_down", "epsilon", "resting")


class Lines:
    """Calls `at(phase)` before each line of the watched modules, by this thread; `phase` counts its visits."""

    def __init__(self, at):
        self.at, self.visits = at, Counter()

    def __enter__(self):
        sys.settrace(self.enter)

    def __exit__(self, *_):
        sys.settrace(None)

    def enter(self, frame, event, _):
        return self.line if frame.f_code.co_filename in WATCHED else None

    def line(self, frame, event, _):
        if event == "line":
            code = frame.f_code
            where = f"{Path(code.co_filename).stem}.{code.co_qualname}:{frame.f_lineno}"
            self.visits[where] += 1
            self.at(where, self.visits[where])
        return self.line


def forked(work):
    """Run `work` in a child; how it ended, as `os.waitpid` says."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def disk(folder):
    """What is under a folder, by what would change with it."""
    found = []
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            told = os.stat(os.path.join(place, name))
            found.append((place, name, told.st_ino, told.st_size, told.st_mtime_ns))
    return found


def run(told, folder, resume=False):
    fedlora.simulate(told, out=folder, resume=resume)


def warm(told):
    """Have everything imported and cached before the forks, but for what starts threads: no backward pass."""
    import opacus  # noqa: F401

    ready = prepare(told)
    noise = calibrate(told, ready.data)
    engine = InlineEngine(told.clients.total)
    engine.start(replace(ready.setup, noise=noise))
    engine.evaluate(engine.description.initial)
    spends = ready.client.spends(
        20, Setter(told, {20: 1.0})(Instruction(round=1, adapter={}, train=(), send=()), 20)
    )
    accounting.epsilon([spends], told.privacy.delta)


def record(told, folder, into):
    """Run to the end and write down each phase: its name, its visit and whether the disk had changed."""
    seen, last = [], None

    def at(where, visit):
        nonlocal last
        now = disk(folder.parent)
        seen.append((where, visit, now != last))
        last = now

    with Lines(at):
        run(told, folder)
    into.write_text(json.dumps(seen))


def killed(told, folder, where, visit):
    """Run until a phase, and be gone."""

    def at(here, now):
        if (here, now) == (where, visit):
            os.kill(os.getpid(), signal.SIGKILL)

    with Lines(at):
        run(told, folder)


def outcome(folder):
    """All that a run promises to repeat."""
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    lines = [{k: line.get(k) for k in SAME} for line in ledger.read(folder / "metrics.jsonl")]
    clients = [(c["round"], c["client"], c["epsilon"]) for c in ledger.read(folder / "clients.jsonl")]
    merges = [file.read_bytes() for file in sorted(folder.glob("merges/*"))]
    return adapter, lines, clients, merges, ledger.replay(folder / "privacy.jsonl")


def matrix(file, work, every=1):
    """Kill and compare at every chosen phase; what was tried and what went wrong."""
    told = scenario.load(file)
    work.mkdir(parents=True, exist_ok=True)
    warm(told)
    assert forked(lambda: record(told, work / "whole" / "run", work / "phases.json")) == 0
    phases = json.loads((work / "phases.json").read_text())
    whole = outcome(work / "whole" / "run")
    epsilon = ledger.epsilon_of(work / "whole" / "run" / "privacy.jsonl")
    changes = [(where, visit) for where, visit, changed in phases if changed][::every]
    wrong = []
    for where, visit in changes:
        folder = work / "cut" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        ended = forked(lambda w=where, v=visit, f=folder: killed(told, f, w, v))
        if not (os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL):
            wrong.append(f"{where} visit {visit}: was not killed there")
            continue
        begun = (folder / "scenario.yaml").exists()
        if forked(lambda b=begun, f=folder: run(told, f, resume=b)):
            wrong.append(f"{where} visit {visit}: did not go on")
        elif outcome(folder) != whole or ledger.epsilon_of(folder / "privacy.jsonl") < epsilon:
            wrong.append(f"{where} visit {visit}: ended otherwise")
    return {
        "strategy": told.strategy.use,
        "lines": len({where for where, _, _ in phases}),
        "visits": len(phases),
        "changes": sum(changed for _, _, changed in phases),
        "killed": len(changes),
        "modules": sorted({where.split(".")[0] for where, _, _ in phases}),
        "wrong": wrong,
    }


if __name__ == "__main__":
    if sys.argv[4:] == ["beside"]:
        InlineEngine.beside = lambda engine, adapter: partial(engine.evaluate, dict(adapter))
    print(json.dumps(matrix(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)))
