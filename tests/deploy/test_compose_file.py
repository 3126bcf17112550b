"""What the compose file gives to whom; nothing is started."""

import json
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
FILE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = FILE["services"]
VERSION = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["version"]
WORKERS = [f"site-{k}-worker" for k in range(3)]


def mounts(service):
    """Where a container sees what of the machine, and whether it can write there."""
    told = [volume.split(":") for volume in SERVICES[service].get("volumes", ())]
    return {place: (source, how != ["ro"]) for source, place, *how in told}


@pytest.mark.parametrize("service", SERVICES)
def test_no_part_has_more_rights_than_a_user(service):
    part = SERVICES[service]
    assert part["cap_drop"] == ["ALL"] and part["security_opt"] == ["no-new-privileges:true"]
    assert part["user"] == "${FEDLORA_USER:-10001:10001}"
    assert not {"privileged", "cap_add", "pid", "network_mode", "devices"} & set(part)


@pytest.mark.parametrize("service", SERVICES)
def test_no_part_writes_elsewhere_or_takes_all_of_the_machine(service):
    part = SERVICES[service]
    assert part["read_only"] is True and part["tmpfs"] == ["/tmp:mode=1777"]
    assert {"mem_limit", "pids_limit"} <= set(part)
    assert part["logging"]["options"] == {"max-size": "10m", "max-file": "5"}


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_those_of_this_version_and_health_is_asked_for(service):
    part = SERVICES[service]
    flower = service in ("superlink", "registered") or service not in (*WORKERS, "server")
    name = "${FEDLORA_FLOWER_IMAGE:-fedlora-flower" if flower else "${FEDLORA_IMAGE:-fedlora"
    assert part["image"] == f"{name}:{VERSION}}}" and part["pull_policy"] == "never"
    if service != "registered":
        assert "/opt/fedlora/health.py" in part["healthcheck"]["test"]


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_reads_its_site_and_writes_its_state_alone(worker):
    site = f"./deployment/{worker.removesuffix('-worker')}"
    assert mounts(worker) == {
        "/site": (f"{site}/site", False),
        "/site/state": (f"{site}/state", True),
        "/certs/executor.secret": (f"{site}/certs/executor.secret", False),
    }
    environment = SERVICES[worker]["environment"]
    assert environment["FEDLORA_SITE"] == "/site/site.yaml"
    assert environment["FEDLORA_CACHE"].startswith("/site/state/")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_reaches_nobody_but_its_node(worker):
    (network,) = SERVICES[worker]["networks"]
    assert FILE["networks"][network] == {"internal": True} and "ports" not in SERVICES[worker]
    assert {s for s, part in SERVICES.items() if network in part["networks"]} == {
        worker,
        worker[: -len("-worker")],
    }


def test_keys_are_with_their_owner_alone_and_nobody_can_write_to_them():
    holders = set()
    for service in SERVICES:
        for place, (source, writes) in mounts(service).items():
            if "certs" in source:
                assert not writes, place
            if source.endswith("certs"):
                holders.add((service, source))
    nodes = {(f"site-{k}", f"./deployment/site-{k}/certs") for k in range(3)}
    assert holders == {("superlink", "./deployment/server/certs"), *nodes}
    there = {place for place in mounts("server") if place.startswith("/certs")}
    assert there == {"/certs/ca.crt", "/certs/executor.secret"}


def test_what_is_published_and_measured_is_bound_to_loopback_unless_asked():
    published = {s: part["ports"] for s, part in SERVICES.items() if "ports" in part}
    assert published == {"superlink": ["${FEDLORA_BIND:-127.0.0.1}:${FEDLORA_PORT:-8000}:8000"]}
    address = SERVICES["server"]["environment"]["FEDLORA_METRICS_ADDRESS"]
    assert address == "${FEDLORA_METRICS_ADDRESS:-127.0.0.1}"


@pytest.mark.skipif(
    not shutil.which("openssl") or not shutil.which("ssh-keygen"), reason="needs both to make keys"
)
def test_prepare_makes_all_that_is_mounted(tmp_path):
    for name in ("prepare", "compose.yaml"):
        shutil.copy(DOCKER / name, tmp_path / name)
    subprocess.run([tmp_path / "prepare", "--sites", "3"], check=True, capture_output=True)
    for service in SERVICES:
        for source, _ in mounts(service).values():
            assert (tmp_path / source).exists(), source
    for k in range(3):  # a folder that cannot be written to must hold the place of the one that can
        assert [p.name for p in (tmp_path / "deployment" / f"site-{k}" / "site").iterdir()] == ["state"]


def test_the_server_s_figures_go_to_a_network_of_their_own():
    over = yaml.safe_load((DOCKER / "compose.metrics.yaml").read_text())
    server = over["services"]["server"]
    (alias,) = server["networks"]["metrics"]["aliases"]
    assert over["networks"]["metrics"] == {"internal": True}
    assert server["environment"] == {"FEDLORA_METRICS_ADDRESS": alias}
    (job,) = yaml.safe_load((DOCKER / "metrics" / "prometheus.yml").read_text())["scrape_configs"]
    port = SERVICES["server"]["environment"]["FEDLORA_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"{alias}:{port}"]}]
    for service in ("prometheus", "grafana"):
        assert all(published.startswith("127.0.0.1:") for published in over["services"][service]["ports"])


def test_the_dashboard_asks_for_figures_that_there_are():
    source = (DOCKER.parent / "fedlora" / "deploy" / "metrics.py").read_text()
    exported = set(re.findall(r'"(fedlora_[a-z_]+)"', source))
    counters = set(re.findall(r'Counter\("(fedlora_[a-z_]+)"', source))
    exported = {f"{name}_total" if name in counters else name for name in exported}
    panels = json.loads((DOCKER / "metrics" / "dashboard.json").read_text())["panels"]
    asked = [re.search(r"fedlora_[a-z_]+", t["expr"])[0] for panel in panels for t in panel["targets"]]
    assert set(asked) == exported


@pytest.mark.parametrize("root", ["", "docker"])
def test_an_image_finds_all_that_it_copies_in_a_checkout_and_in_a_copy_of_the_folder(root):
    """By the files that a build is sent: what `.dockerignore` leaves of them."""
    there = DOCKER.parent / root
    kept = [line[1:] for line in (there / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sent = {path.relative_to(there).as_posix() for pattern in kept for path in there.glob(pattern)}
    text = (DOCKER / "Dockerfile").read_text()
    (patterns,) = re.findall(r"^COPY (docker/.*) /src/docker/$", text, re.M)
    copied = {Path(name).name for name in sent for pattern in patterns.split() if fnmatch(name, pattern)}
    named = set(re.findall(r"/src/docker/([\w.]+)", text))
    assert named == {"health.py", "reap.py", "register.py", "flower.txt", "requirements.txt"} <= copied
    assert ("pyproject.toml" in sent) is (not root), "a copy of the folder has no sources: it takes a wheel"
    assert root == "" or "*.whl" in kept


def test_what_images_install_is_pinned_as_in_the_locked_set():
    locked = _pins(DOCKER.parent / "constraints.txt")
    flower, whole = (_pins(DOCKER / name) for name in ("flower.txt", "requirements.txt"))
    assert flower.items() <= whole.items() <= locked.items()
    assert "flwr" in flower and "ray" not in flower and "transformers" in whole and "torch" not in whole


def _pins(file):
    """Version and hashes of each package of a file."""
    entries = re.findall(r"^(\S+?)(?:\[.*\])?==(.*(?:\n    .*)*)", file.read_text(), re.MULTILINE)
    assert all("--hash=sha256:" in pin for _, pin in entries)
    return dict(entries)
