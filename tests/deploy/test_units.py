"""Units of systemd and containers of Podman: what they start is what compose.yaml starts."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
UNITS = {"superlink": "superlink", "server": "server", "site-0": "node", "site-0-worker": "worker"}
PLACES = {"/etc/fedlora/certs": "/certs", "/opt/fedlora/bin/": "", "/var/lib/fedlora/link": "/link"}


def read(file):
    """A unit's settings, of which one may stand several times."""
    text = file.read_text().replace("\\\n", " ")
    return re.findall(r"^(\w+)=(.*)$", text, re.M)


def words(command):
    """A command without the addresses, which are another matter on another network."""
    told = shlex.split(command)
    addresses = ("--superlink", "--host", "--runtime-api-address", "--health-server-address")
    return [word for before, word in zip(["", *told], told, strict=False) if before not in addresses]


@pytest.mark.parametrize("service", UNITS)
def test_a_unit_starts_what_its_container_starts(service):
    settings = dict(read(DOCKER / "systemd" / f"fedlora-{UNITS[service]}.service"))
    command = settings["ExecStart"]
    for there, here in PLACES.items():
        command = command.replace(there, here)
    told, container = words(command), words(SERVICES[service]["command"])
    assert set(told) - {"--health-server-address"} == set(container) - {"--health-server-address"}
    assert settings["NoNewPrivileges"] == "yes" and settings["ProtectSystem"] == "strict"
    assert settings["CapabilityBoundingSet"] == "" and settings["User"] == "fedlora"


@pytest.mark.parametrize("service", ["site-0", "site-0-worker"])
def test_a_container_of_podman_is_that_of_compose(service):
    container = SERVICES[service]
    told = read(DOCKER / "quadlet" / f"fedlora-{UNITS[service]}.container")
    settings = dict(told)
    assert words(settings["Exec"]) == words(container["command"])
    image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", container["image"])
    assert settings["Image"] == f"localhost/{image}" and settings["Pull"] == "never"
    assert settings["ReadOnly"] == settings["NoNewPrivileges"] == "true" and settings["DropCapability"] == "all"
    assert settings["HealthCmd"].split() == container["healthcheck"]["test"][1:]
    mounts = [value.split(":") for name, value in told if name == "Volume"]
    there = [volume.removeprefix("./deployment/").split(":") for volume in container["volumes"]]
    assert [(source.removeprefix("/srv/fedlora/"), place) for source, place, *_ in mounts] == [
        (source, place) for source, place, *_ in there
    ]
    for (*_, how), (_, _, *only) in zip(mounts, there, strict=True):
        assert how.split(",")[0] == "ro" if only == ["ro"] else "ro" not in how


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_units(tmp_path):
    here = str(Path(sys.executable).parent)
    for file in (DOCKER / "systemd").iterdir():
        text = file.read_text().replace("/opt/fedlora/bin/", f"{here}/")
        (tmp_path / file.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "fedlora" in line]
    assert done.returncode == 0 and not said, done.stderr
