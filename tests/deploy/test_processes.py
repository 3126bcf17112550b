"""A real SuperLink, real SuperNodes and `fedlora submit` as processes here; and Flower's own simulation.

Minutes of process starts: marked slow. In containers, over TLS and with faults: test_compose.py.
"""

import contextlib
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import evaluate, simulate
from fedlora.privacy import ledger
from fedlora.record import Record
from fedlora.run import Run

from .test_submit import certificates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TLS = (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key"))


def free_port():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def listening(port):
    with socket.socket() as there:
        return not there.connect_ex(("127.0.0.1", port))


@pytest.fixture
def federation(environment, tmp_path):
    """Starts a SuperLink and a SuperNode for each site file; gives their processes."""
    running = []

    def start(name, *command, **more):
        log = (tmp_path / f"{name}.log").open("ab")
        running.append(
            subprocess.Popen(
                command, env=environment | more, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        log.close()
        return running[-1]

    def node(port, k, file, *trust, **more):
        home = {"FLWR_HOME": str(tmp_path / f"flwr-{k}"), "FEDLORA_SITE": str(file)}
        link = ("--superlink", f"127.0.0.1:{port}", "--port", str(free_port()))
        return start(f"node-{k}", "flower-supernode", *(trust or ("--insecure",)), *link, **home, **more)

    def up(files, trust="insecure = true", *keys):
        port = free_port()
        (tmp_path / "flwr").mkdir()
        (tmp_path / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n{trust}\n'
        )
        start("link", "flower-superlink", *(keys or ("--insecure",)), "--port", str(port))
        end = time.monotonic() + 60
        while not listening(port) and time.monotonic() < end:
            time.sleep(0.2)
        return port, [node(port, k, file) for k, file in enumerate(files)]

    yield up, node
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(["pkill", "-9", "-f", f"fedlora.deploy.resident {tmp_path}"])


def submit(environment, file, out, *more):
    command = [str(BIN / "fedlora"), "submit", str(file), "--superlink", "here", "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_submitted_run_gives_the_adapter_of_its_simulation(environment, scenario, federation, tmp_path):
    made, file, sites = scenario(private=False)
    sites[0].write_text(sites[0].read_text() + "receive: adapter\n")
    federation[0](sites)
    done = submit(environment, file, tmp_path / "came")
    out, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    assert "accuracy" in out and str(tmp_path / "came") in out
    one, other = adapter(tmp_path / "came"), adapter(simulate(made, out=tmp_path / "plain").folder)
    assert all(np.array_equal(one[n], other[n]) for n in other)
    assert (summary := Run.open(tmp_path / "came").summary)["failures"] == 0
    (kept,), (other_site,) = ([*(site.parent / "state" / "runs").iterdir()] for site in sites)
    mine = adapter(kept)
    assert all(np.array_equal(mine[n], one[n]) for n in one) and not (other_site / "adapter").exists()
    assert Record.open(other_site).site_said.startswith("finished after round 2")
    said = evaluate(kept, tmp_path / "sites" / "test.csv")
    assert said.metrics["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-6)


def test_runs_at_once_and_one_after_another_share_a_worker_and_a_port(environment, scenario, federation, tmp_path):
    """Neither the figures of a site nor those of the server keep a run from beginning."""
    _, file, sites = scenario()
    for site in sites:
        site.write_text(site.read_text() + f"metrics_port: {free_port()}\n")
    environment["FEDLORA_METRICS_PORT"] = str(free_port())
    federation[0](sites)

    def ended(*names):
        asked = [submit(environment, file, tmp_path / name) for name in names]
        for done in asked:
            _, error = done.communicate(timeout=800)
            assert done.returncode == 0, error
        assert all(Run.open(tmp_path / name).summary["failures"] == 0 for name in names)
        return {line["message"] for site in sites for line in log(site) if line["message"].endswith(" is up")}

    first = ended("one", "two")
    assert len(first) == 2 and ended("three") == first, "a worker for each site, and the same"
    assert not [line for site in sites for line in log(site) if "cannot be used" in line["message"]]
    for site in sites:
        assert len([*(site.parent / "state" / "runs").iterdir()]) == 3


def log(site):
    return [json.loads(line) for line in (site.parent / "state" / "site.log").read_text().splitlines()]


OWN = "from fedlora.strategies.ffa_lora import FFALoRA\n\n\nclass Mine(FFALoRA):\n    pass\n"


def test_sites_that_ask_who_submits_take_a_signed_run_with_its_code(environment, scenario, federation, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "code_of_mine.py").write_text(OWN)
    (tmp_path / "lab" / "notes.txt").write_text("does not travel")
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path / "lab")])
    submitter = environment | {"PYTHONPATH": path}
    _, file, sites = scenario("rounds=1", "data.labels=[bad, good]")
    text = file.read_text().replace("use: ffa_lora", "use: code_of_mine:Mine")
    file.write_text(text)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    rules = f"own_code: true, submitters: {json.dumps([(tmp_path / 'key.pub').read_text().strip()])}"
    for site in sites:
        told = site.read_text().replace("own_code: false", rules)
        site.write_text(told + "survey: {epsilon: 0.5, floor: 1}\n")
    federation[0](sites)  # to whom the code comes with the run alone
    unsigned = submit(submitter, file, tmp_path / "unsigned")
    _, error = unsigned.communicate(timeout=600)
    assert unsigned.returncode and "nobody whom it knows has signed this run" in error
    done = submit(submitter, file, tmp_path / "came", "--key", str(tmp_path / "key"))
    _, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    run = Run.open(tmp_path / "came")
    assert run.summary["failures"] == 0 and run.rounds[0]["clients"] == 2
    told = survey(environment, "--key", str(tmp_path / "key"))
    assert [one["labels"] for one in told] == [["bad", "good"]] * 2 and all(one["noise"] > 1 for one in told)
    assert survey(environment, "--key", str(tmp_path / "key")) == told  # paid for once, and drawn once
    assert all("nobody whom it knows" in one["refused"] for one in survey(environment))


def survey(environment, *more):
    command = [str(BIN / "fedlora"), "survey", "--superlink", "here", "--json", *more]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True).stdout)


class Tunnel(socketserver.BaseRequestHandler):
    """A proxy that knows `CONNECT` alone, and notes where to."""

    def handle(self):
        head = b""
        while b"\r\n\r\n" not in head and (more := self.request.recv(4096)):
            head += more
        method, place, *_ = head.decode().split()
        self.server.asked.append((method, place))
        if method != "CONNECT":
            self.request.sendall(b"HTTP/1.1 405 No\r\n\r\n")
            return
        host, port = place.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as there:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            ways = {self.request: there, there: self.request}
            while True:
                for one in select.select(list(ways), [], [])[0]:
                    if not (data := one.recv(2**16)):
                        return
                    ways[one].sendall(data)


def test_a_site_behind_a_proxy_answers_through_its_tunnel(environment, scenario, federation, tmp_path):
    """Its node opens connections and accepts none; the worker, which calls the node, takes no proxy."""
    certificates(tmp_path, 9)
    _, _, sites = scenario()
    sites[0].write_text(sites[0].read_text() + "survey: {epsilon: 0.5}\n")
    keys = [f"--ssl-{name}={tmp_path / file}" for name, file in TLS]
    port, _ = federation[0]((), f'root-certificates = "{tmp_path / "ca.crt"}"', *keys)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.asked, proxy.daemon_threads = [], True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        way = {"https_proxy": f"http://127.0.0.1:{proxy.server_address[1]}", "no_proxy": ""}
        federation[1](port, 0, sites[0], "--root-certificates", str(tmp_path / "ca.crt"), **way)
        end = time.monotonic() + 120
        while not proxy.asked and time.monotonic() < end:
            time.sleep(0.5)
        (told,) = survey(environment, "--wait", "120")
        proxy.shutdown()
    assert told["name"] == "site-0" and set(proxy.asked) == {("CONNECT", f"127.0.0.1:{port}")}


def test_a_site_killed_in_mid_round_costs_that_round_one_reply(environment, scenario, federation, tmp_path):
    """Its node and its worker die by SIGKILL while it trains; it comes back, with its ledger."""
    _, file, sites = scenario("rounds=12", "engine.deadline=20", "clients.local_steps=4")
    up, node = federation
    port, nodes = up(sites)
    done = submit(environment, file, tmp_path / "came")
    paid = sites[1].parent / "state" / "ledger" / "privacy.jsonl"
    end = time.monotonic() + 300
    while not (paid.exists() and paid.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    subprocess.run(["pkill", "-9", "-f", f"fedlora.deploy.resident {sites[1]}"], check=True)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    before = paid.read_bytes()
    node(port, 1, sites[1])
    _, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    run = Run.open(tmp_path / "came")
    assert [line["round"] for line in run.rounds] == list(range(1, 13))
    assert run.rounds[0]["clients"] == 1 and run.rounds[0]["failures"] == 1
    assert run.rounds[0]["seconds"] < 60
    assert 2 in [line["clients"] for line in run.rounds]  # how soon depends on how busy the machine is
    assert paid.read_bytes().startswith(before)
    trained = sum(line["client"] == 1 and line["error"] is None for line in run.clients)
    assert len(ledger.replay(paid)[ledger.Own()]) == 1 + trained


MASKED = ("clients.total=3", "secure_aggregation={range: 2.0, survivors: 0.66}")


def test_sites_that_mask_what_they_send_give_the_mean_of_their_simulation(
    environment, scenario, federation, tmp_path
):
    made, file, sites = scenario(*MASKED, private=False)
    federation[0](sites)
    done = submit(environment, file, tmp_path / "came")
    _, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    plain = made.model_copy(update={"secure_aggregation": None})
    one, other = adapter(tmp_path / "came"), adapter(simulate(plain, out=tmp_path / "plain").folder)
    for name in other:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-4)
    assert Run.open(tmp_path / "came").summary["failures"] == 0


def test_a_masking_site_killed_while_it_trains_leaves_the_sum_of_the_others(
    environment, scenario, federation, tmp_path
):
    """Its keys are shared, its masks are in the others' vectors: they help to take them off."""
    told = ("clients.total=4", "rounds=1", "engine.deadline=30", "clients.local_steps=4")
    _, file, sites = scenario(*MASKED, *told)
    _, nodes = federation[0](sites)
    done = submit(environment, file, tmp_path / "came")
    paid = sites[1].parent / "state" / "ledger" / "privacy.jsonl"
    end = time.monotonic() + 300
    while not (paid.exists() and paid.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    subprocess.run(["pkill", "-9", "-f", f"fedlora.deploy.resident {sites[1]}"], check=True)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    _, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    run = Run.open(tmp_path / "came")
    assert run.rounds[0]["clients"] == 3 and run.rounds[0]["failures"] == 1
    assert len(ledger.replay(tmp_path / "came" / "privacy.jsonl")[1]) == 1  # it may have trained


def test_flower_s_own_simulation_runs_the_app(environment, tiny, tmp_path):
    text = tiny("clients.total=2", "rounds=1", "engine.deadline=300", private=False).to_yaml()
    text = text.replace("    test: null", f"    test: {tiny().data.files.train}")
    (tmp_path / "config.toml").write_text(f"scenario = {json.dumps(text)}\n")
    ports = ("--federation-config", "num-supernodes=2", "--run-config", str(tmp_path / "config.toml"), "--stream")
    command = [str(BIN / "flwr"), "run", str(ROOT / "docker" / "app"), "local", *ports]
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets do not fit under a longer path
        environment["TMPDIR"] = short
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
        subprocess.run(["pkill", "-9", "-f", f"fedlora.deploy.resident {short}"])
        subprocess.run(["pkill", "-f", "flower-superlink.*--simulation"])
    assert (tmp_path / "server-runs").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = (tmp_path / "server-runs").iterdir()
    assert Run.open(folder).rounds[0]["clients"] == 2, done.stdout[-3000:]
    assert '"event": "finished"' in done.stdout
