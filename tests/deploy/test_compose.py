"""Three sites in containers, over TLS, and what goes wrong between them. Needs Docker, compose and root.

The images are built from this tree, or named by $FEDLORA_IMAGE and $FEDLORA_FLOWER_IMAGE.
"""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.privacy import ledger
from fedlora.run import Run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROJECT = f"fedloratest{os.getpid()}"
FEW = ("--set", "clients.local_steps=2", "--set", "clients.batch_size=16")
SHORT = (*FEW, "--set", "data.test_share=0.01")  # what the server judges by; sites have their files
PLAIN = (*FEW, "--set", "privacy=null", "--set", "clients.use=sgd", "--set", "clients.lr=0.5")


def call(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, **options).stdout


class Stack:
    """A deployment of its own: a copy of docker/, its own keys, project and port."""

    def __init__(self, folder):
        self.docker, self.out = folder / "docker", folder
        shutil.copytree(ROOT / "docker", self.docker, ignore=shutil.ignore_patterns("deployment", ".env"))
        with socket.socket() as there:
            there.bind(("127.0.0.1", 0))
            self.port = there.getsockname()[1]
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "FEDLORA_IMAGE": self._image("FEDLORA_IMAGE", "fedlora"),
            "FEDLORA_FLOWER_IMAGE": self._image("FEDLORA_FLOWER_IMAGE", "flower"),
            "FEDLORA_PORT": str(self.port),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.docker / "deployment" / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        call(self.docker / "prepare", "--demo", env=self.environment)
        config = self.docker / "deployment" / "flwr" / "config.toml"
        config.write_text(config.read_text().replace(":8000", f":{self.port}"))

    @staticmethod
    def _image(variable, target):
        """The image that a variable names, or one that is built from this tree."""
        if named := os.environ.get(variable):
            return named
        tag = f"{target}-test"
        command = ("docker", "build", "-q", "-f", "docker/Dockerfile", "--target", target, "-t", tag, ".")
        call(*command, cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "0"})
        return tag

    def compose(self, *arguments):
        command = ("docker-compose",) if shutil.which("docker-compose") else ("docker", "compose")
        return call(*command, "-f", self.docker / "compose.yaml", *arguments, env=self.environment)

    def container(self, service):
        return self.compose("ps", "-q", service).strip()

    def inspect(self, service, form):
        return call("docker", "inspect", "-f", form, self.container(service)).strip()

    def kill(self, service):
        """SIGKILL of its first process: what a crash is, so that the restart policy holds."""
        os.kill(int(self.inspect(service, "{{.State.Pid}}")), 9)

    def away(self, service, seconds):
        """Killed for so long, and then back; for good with None: what it kept is lost, and another starts."""
        there = self.container(service)
        call("docker", "kill", there)
        if seconds is None:
            shutil.rmtree(self.docker / "deployment" / "server" / "link")
            (self.docker / "deployment" / "server" / "link").mkdir()
            os.chown(self.docker / "deployment" / "server" / "link", 10001, 10001)
        time.sleep(seconds or 0)
        call("docker", "start", there)
        self.healthy(service)
        self.compose("up", "-d", "--no-build", "registered")

    def healthy(self, *services, within=240):
        end = time.monotonic() + within
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.CalledProcessError):
                if all(self.inspect(s, "{{.State.Health.Status}}") == "healthy" for s in services):
                    return
            time.sleep(1)
        raise AssertionError(self.compose("ps") + self.compose("logs", "--tail", "20", *services))

    def submit(self, out, *more, scenario="sites"):
        command = [BIN / "fedlora", "submit", scenario, "--superlink", "compose", "--out", self.out / out, *more]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finished(self, submitted, out):
        _, error = submitted.communicate(timeout=900)
        assert submitted.returncode == 0, error + self.compose("logs", "--tail", "30")
        return Run.open(self.out / out)

    def state(self, k):
        return self.docker / "deployment" / f"site-{k}" / "state"

    @property
    def runs(self):
        return self.docker / "deployment" / "server" / "runs"

    def newest(self):
        """The run folder that began last, on the server."""
        return max(self.runs.glob("sites-*"), key=lambda folder: folder.stat().st_ctime)

    def rounds(self):
        file = self.newest() / "metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def paid(self, k):
        file = self.state(k) / "ledger" / "privacy.jsonl"
        return len(ledger.replay(file).get(ledger.Own(), [])) if file.exists() else 0

    def wait_for(self, what, within=300):
        end = time.monotonic() + within
        while not what():
            assert time.monotonic() < end, self.compose("logs", "--tail", "30")
            time.sleep(0.2)


SERVICES = [f"site-{k}{part}" for k in range(3) for part in ("", "-worker")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    if not shutil.which("docker"):
        pytest.skip("no Docker here")
    made = Stack(tmp_path_factory.mktemp("deployment"))
    try:
        made.compose("up", "-d", "--no-build")
        made.healthy("superlink", "server", *SERVICES)
        yield made
    finally:
        made.compose("down", "-v", "-t", "2")


def test_a_plain_run_brings_back_the_simulation_s_adapter(stack):
    files = [stack.docker / "deployment" / f"site-{k}" / "site" / "site.yaml" for k in range(3)]
    texts = [file.read_text() for file in files]
    for file, text in zip(files, texts, strict=True):  # these sites allow it, for once
        file.write_text(text.replace("\nprivacy", "\n# privacy"))
    run = stack.finished(stack.submit("plain", *PLAIN, "--set", "rounds=2", "--set", "eval_every=2"), "plain")
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    told = (*PLAIN, "--set", "rounds=2", "--set", "eval_every=2")
    command = [BIN / "fedlora", "simulate", "sites", *told, "--engine", "inline"]
    call(*command, "--out", stack.out / "simulated", env=stack.environment)
    one, other = (
        load_file(stack.out / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "simulated")
    )
    assert set(one) == set(other) and all(np.abs(one[n] - other[n]).max() <= 1e-5 for n in one)
    accuracy = Run.open(stack.out / "simulated").summary["accuracy"]
    assert run.summary["accuracy"] == pytest.approx(accuracy, abs=1e-4) and run.summary["failures"] == 0


SEVERAL = """\
name: several
task: multi_label
model: {base: minilm, adapter: {kind: lora, r: 2, alpha: 2, targets: [query], layers: [5]}}
data: {files: {train: ROWS, text: text, label: labels, separator: ";"}, test_share: 0.1, max_length: 16}
clients: {total: 3, use: dp_sgd, local_steps: 1, batch_size: 16, lr: 0.5}
privacy: {epsilon: 6, delta: 1.0e-5, clip_norm: 1.0}
strategy: {use: ffa_lora}
rounds: 1
"""


def test_a_private_round_of_several_labels(stack):
    """`fedlora split` writes the sites' files, each reads its own anew, and a text may have no label, or two."""
    rows, file = stack.out / "rows.csv", stack.out / "several.yaml"
    labels = ("cold", "fever", "cold;fever", "")
    rows.write_text("text,labels\n" + "".join(f"patient {i} has it,{labels[i % 4]}\n" for i in range(240)))
    file.write_text(SEVERAL.replace("ROWS", str(rows)))
    split = stack.out / "several-sites"
    call(BIN / "fedlora", "split", file, "--out", split, "--as", "/site", env=stack.environment)
    deployed = stack.docker / "deployment"
    shutil.copy(split / "test.csv", deployed / "server" / "data" / "several.csv")
    held = [deployed / f"site-{k}" / "site" / name for k in range(3) for name in ("site.yaml", "train.csv")]
    before, paid = [part.read_bytes() for part in held], [stack.paid(k) for k in range(3)]
    for part in held:
        part.write_bytes((split / part.parts[-3] / part.name).read_bytes())
    there = ("--set", "data.files.test=/data/several.csv")
    run = stack.finished(stack.submit("several", *there, scenario=split / "scenario.yaml"), "several")
    for part, text in zip(held, before, strict=True):
        part.write_bytes(text)
    assert run.summary["failures"] == 0 and 0 < run.summary["epsilon"] <= 6.0
    assert 0 <= run.summary["micro_f1"] <= 1 and "accuracy" not in run.summary
    mine = ledger.replay(run.folder / "privacy.jsonl")
    for k in range(3):
        assert len(mine[k]) == stack.paid(k) - paid[k] == 1


def test_five_private_rounds_with_a_site_killed_and_another_cut_off(stack):
    """Node and worker of site 1 die once it paid; then the network of site 2 is cut for half a minute."""
    before = [stack.paid(k) for k in range(3)]
    told = (*SHORT, "--set", "rounds=9", "--set", "engine.deadline=40", "--set", "eval_every=9")
    submitted = stack.submit("private", *told)
    stack.wait_for(lambda: stack.paid(1) > before[1])
    stack.kill("site-1-worker")
    stack.kill("site-1")
    stack.wait_for(lambda: stack.paid(2) >= before[2] + 3)
    network = f"{PROJECT}_fleet"
    cut = stack.container("site-2")
    call("docker", "network", "disconnect", network, cut)
    time.sleep(30)
    call("docker", "network", "connect", network, cut)
    run = stack.finished(submitted, "private")
    rounds = run.rounds
    assert [line["round"] for line in rounds] == list(range(1, 10))
    assert any(line["clients"] == 2 and line["failures"] == 1 for line in rounds[:2])  # it may have answered first
    errors = {line["error"] for line in run.clients if line["error"]}
    assert errors and all("no reply" in e or "connected" in e or "navailable" in e for e in errors), errors
    assert 0 < run.summary["epsilon"] <= 6.0
    for k in range(3):  # every ledger is whole, and holds what the server was sent, and at most what was lost
        answered = sum(line["client"] == k and line["error"] is None for line in run.clients)
        failed = sum(line["client"] == k and line["error"] is not None for line in run.clients)
        assert answered <= stack.paid(k) - before[k] <= answered + failed
    stack.healthy(*SERVICES)


PHASES = {  # from which moment of round 2 of a run the SuperLink is away
    "asked": lambda stack, before: len(stack.rounds()) == 1,
    "paid": lambda stack, before: stack.paid(0) == before[0] + 2,
}


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        ("paid", 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("asked", 5), ("asked", 75), ("paid", 75)]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("asked", None), ("paid", None)]),
    ],
)
def test_a_private_run_outlives_its_superlink_and_spends_what_it_promised(stack, phase, seconds):
    """Resumed where it has to be, it ends within its epsilon, and its ledger says what those of the sites say."""
    before, out = [stack.paid(k) for k in range(3)], f"cut-{phase}-{seconds}"
    kept = set(stack.runs.glob("sites-*"))
    told = (*SHORT, "--set", "rounds=3", "--set", "engine.deadline=60", "--set", "eval_every=3")
    submitted, resumed = stack.submit(out, *told), 0
    stack.wait_for(lambda: set(stack.runs.glob("sites-*")) - kept and PHASES[phase](stack, before))
    stack.away("superlink", seconds)
    while True:
        _, error = submitted.communicate(timeout=600)
        if not submitted.returncode:
            break
        resumed += 1
        assert "--resume " in error and "Traceback" not in error and resumed < 6, error
        name = error.split("--resume ")[1].split()[0].rstrip("`.;,)")
        stack.healthy("superlink", "server", *SERVICES)
        submitted = stack.submit(out, *told, "--resume", name)
    run = Run.open(stack.out / out)
    assert [line["round"] for line in run.rounds] == [1, 2, 3]
    assert 0 < run.summary["epsilon"] <= 6.0
    mine = ledger.replay(run.folder / "privacy.jsonl")
    for k in range(3):
        site = ledger.replay(stack.state(k) / "runs" / stack.newest().name / "privacy.jsonl")
        assert mine[k] == site[k] and stack.paid(k) - before[k] == len(mine[k]), k


def test_strangers_are_refused(stack):
    """A node whose key nobody registered; a client that speaks plain HTTP; one that trusts another CA."""
    folder = stack.docker / "deployment" / "stranger"
    folder.mkdir()
    call("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / "node.key")
    shutil.copy(stack.docker / "deployment" / "ca" / "ca.crt", folder / "ca.crt")
    call("chown", "-R", "10001:10001", folder)
    node = "flower-supernode --superlink superlink:8000 --root-certificates /k/ca.crt --auth-supernode-private-key"
    command = ("docker", "run", "--rm", "--network", f"{PROJECT}_fleet", "-v", f"{folder}:/k:ro")
    image = stack.environment["FEDLORA_IMAGE"]
    done = subprocess.run(
        [*command, image, *node.split(), "/k/node.key"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    said = (done.stdout + done.stderr).lower()
    assert "traceback" not in said and "failed to activate supernode" in said, said
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://127.0.0.1:{stack.port}/", timeout=10)
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", stack.port)) as there:
        ssl.create_default_context().wrap_socket(there, server_hostname="localhost")


def test_nothing_listens_but_what_the_page_lists(stack):
    """Every address that a container is reached at by another, from the kernel's own table."""
    script = (
        "import json; print(json.dumps([[l.split()[1].split(':')[0], int(l.split()[1].split(':')[1], 16)] "
        "for f in ('/proc/net/tcp', '/proc/net/tcp6') for l in open(f).readlines()[1:] if l.split()[3] == '0A']))"
    )
    open_to_others = {}
    for service in ("superlink", "server", "site-0", "site-1", "site-2"):
        listening = json.loads(call("docker", "exec", stack.container(service), "python", "-c", script))
        elsewhere = [(address, port) for address, port in listening if address not in ("0100007F", "0B00007F")]
        open_to_others[service] = {port for address, port in elsewhere}
    assert open_to_others.pop("superlink") == {8000}
    assert open_to_others.pop("server") == set()
    assert open_to_others == {f"site-{k}": {9094} for k in range(3)}
    for k in range(3):  # and that on the network of the site's two containers alone
        told = json.loads(
            call("docker", "inspect", "-f", "{{json .NetworkSettings.Networks}}", stack.container(f"site-{k}"))
        )
        address = told[f"{PROJECT}_fleet"]["IPAddress"]
        probe = f"import socket; raise SystemExit(socket.socket().connect_ex(('{address}', 9094)) == 0)"
        call("docker", "exec", stack.container("superlink"), "python", "-c", probe)


def test_a_container_is_nobody_and_holds_no_key_of_others(stack):
    for service in ("superlink", "server", *SERVICES):
        assert call("docker", "exec", stack.container(service), "id", "-u").strip() == "10001"
    seen = call("docker", "exec", stack.container("site-0-worker"), "ls", "/certs").split()
    assert seen == ["executor.secret"]
    seen = call("docker", "exec", stack.container("site-0-worker"), "ls", "-A", "/site").split()
    assert sorted(seen) == ["site.yaml", "state", "train.csv"]
    for place in ("/site/site.yaml", "/site/train.csv", "/site/new", "/opt/fedlora/new", "/certs/executor.secret"):
        with pytest.raises(subprocess.CalledProcessError):
            call("docker", "exec", stack.container("site-0-worker"), "sh", "-c", f"echo >> {place}")
    call("docker", "exec", stack.container("site-0-worker"), "sh", "-c", "echo > /site/state/new")
    layers = call("docker", "history", "--no-trunc", stack.environment["FEDLORA_IMAGE"]).lower()
    assert "private key" not in layers and ".key" not in layers
