"""A SuperLink that is away in the midst of a private run, as processes here; in containers: test_compose.py.

Minutes of process starts for each case: $FEDLORA_OUTAGES asks for them.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedlora.privacy import ledger
from fedlora.run import Run

from . import test_processes as processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif("FEDLORA_OUTAGES" not in os.environ, reason="minutes each: set FEDLORA_OUTAGES=1"),
]


CASES = [("paid", 5), ("asked", 5), ("paid", 75), ("asked", 75)]


class Federation:
    """A SuperLink with a database, the executor of the server, and two nodes."""

    def __init__(self, told, folder, files):
        self.environment, self.folder, self.port, self.running = told, folder, processes.free_port(), []
        (folder / "flwr").mkdir()
        connection = f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n{connection}'
        )
        self.start_link()
        self.start("server", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{self.port}")
        for k, file in enumerate(files):
            home = {"FLWR_HOME": str(folder / f"flwr-{k}"), "FEDLORA_SITE": str(file)}
            where = ("--superlink", f"127.0.0.1:{self.port}", "--port", str(processes.free_port()))
            self.start(f"node-{k}", "flower-supernode", "--insecure", *where, **home)

    def start(self, name, *command, **more):
        with (self.folder / f"{name}.log").open("ab") as log:
            told = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.running.append(subprocess.Popen(command, env=self.environment | more, **told))
        return self.running[-1]

    def start_link(self):
        told = ("--isolation", "process", "--database", str(self.folder / "link.db"), "--port", str(self.port))
        self.link = self.start("link", "flower-superlink", "--insecure", *told)
        end = time.monotonic() + 120
        while not processes.listening(self.port) and time.monotonic() < end:
            time.sleep(0.2)

    def away(self, seconds):
        os.killpg(self.link.pid, signal.SIGKILL)
        self.link.wait()
        time.sleep(seconds)
        self.start_link()

    def end(self):
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for place in Path("/proc").glob("[0-9]*/cmdline"):  # workers are in sessions of their own
            with contextlib.suppress(OSError):
                if (f"fedlora.deploy.resident\0{self.folder}/").encode() in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)


def events(file):
    """How many rounds each holder of a budget has paid for, and on which terms."""
    return ledger.replay(file) if file.exists() else {}


@pytest.mark.parametrize(("phase", "seconds"), CASES)
def test_a_private_run_outlives_its_superlink_and_spends_what_it_promised(
    environment,
    scenario,
    tmp_path,
    phase,
    seconds,
):
    """Away from when round 2 is asked for, or paid: after a resume all ledgers agree; no round is paid twice."""
    _, file, sites = scenario("rounds=3", "engine.deadline=60", "clients.local_steps=8")
    states = [site.parent / "state" for site in sites]
    federation = Federation(environment, tmp_path, sites)
    try:
        submitted, resumed, end = processes.submit(environment, file, tmp_path / "came"), 0, time.monotonic() + 400
        figures = tmp_path / "server-runs"

        def reached():
            if phase == "paid":
                return len(events(states[0] / "ledger" / "privacy.jsonl").get(ledger.Own(), ())) == 2
            return any(len(f.read_text().splitlines()) == 1 for f in figures.glob("*/metrics.jsonl"))

        while not reached() and submitted.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        federation.away(seconds)
        while True:
            _, error = submitted.communicate(timeout=600)
            if not submitted.returncode:
                break
            resumed += 1
            assert "--resume " in error and "Traceback" not in error and resumed < 6, error
            name = error.split("--resume ")[1].split()[0]
            submitted = processes.submit(environment, file, tmp_path / "came", "--resume", name)
    finally:
        federation.end()
    run = Run.open(tmp_path / "came")
    assert [line["round"] for line in run.rounds] == [1, 2, 3]
    mine, (name,) = events(run.folder / "privacy.jsonl"), os.listdir(tmp_path / "server-runs")
    for k, state in enumerate(states):
        site = events(state / "runs" / name / "privacy.jsonl")
        assert mine[k] == site[k] and len(mine[k]) == len(events(state / "ledger" / "privacy.jsonl")[ledger.Own()])
        assert len(mine[k]) == 3
    assert 0 < run.summary["epsilon"]
