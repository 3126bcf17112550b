"""What the compose file gives to whom; nothing is started."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
FILE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = FILE["services"]
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


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_reads_its_site_and_writes_its_state_alone(worker):
    site = f"./deployment/{worker.removesuffix('-worker')}"
    assert mounts(worker) == {
        "/site": (f"{site}/site", False),
        "/site/state": (f"{site}/state", True),
        "/certs/executor.secret": (f"{site}/certs/executor.secret", False),
    }
    part = SERVICES[worker]
    assert part["read_only"] is True and part["tmpfs"] == ["/tmp"]
    assert part["environment"]["FEDLORA_SITE"] == "/site/site.yaml"
    assert part["environment"]["FEDLORA_CACHE"].startswith("/site/state/")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_reaches_nobody_but_its_node(worker):
    (network,) = SERVICES[worker]["networks"]
    assert FILE["networks"][network] == {"internal": True} and "ports" not in SERVICES[worker]
    assert {s for s, part in SERVICES.items() if network in part["networks"]} == {
        worker,
        worker[: -len("-worker")],
    }


def test_a_node_s_key_is_in_the_node_alone_and_nobody_can_write_to_it():
    for service in SERVICES:
        for place, (source, writes) in mounts(service).items():
            if source.rstrip("/").endswith("certs"):
                assert not writes and service in ("superlink", "server", "site-0", "site-1", "site-2"), place


def test_what_is_published_and_measured_is_bound_to_loopback_unless_asked():
    published = {s: part["ports"] for s, part in SERVICES.items() if "ports" in part}
    assert published == {"superlink": ["${FEDLORA_BIND:-127.0.0.1}:${FEDLORA_PORT:-8000}:8000"]}
    address = SERVICES["server"]["environment"]["FEDLORA_METRICS_ADDRESS"]
    assert address == "${FEDLORA_METRICS_ADDRESS:-127.0.0.1}"


@pytest.mark.skipif(
    not shutil.which("openssl") or not shutil.which("ssh-keygen"), reason="needs both to make keys"
)
def test_prepare_makes_all_that_is_mounted(tmp_path):
    for name in ("prepare", "register.py"):
        shutil.copy(DOCKER / name, tmp_path / name)
    subprocess.run([tmp_path / "prepare", "--sites", "3"], check=True, capture_output=True)
    for service in SERVICES:
        for source, _ in mounts(service).values():
            assert (tmp_path / source).exists(), source
    for k in range(3):  # a folder that cannot be written to must hold the place of the one that can
        assert [p.name for p in (tmp_path / "deployment" / f"site-{k}" / "site").iterdir()] == ["state"]
