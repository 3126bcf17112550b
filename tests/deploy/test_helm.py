"""The Helm chart: what it starts is what compose.yaml starts, and Kubernetes knows every field.

Rendered where helm is on the path; checked against Kubernetes' schemas where `kubernetes-validate` is installed.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "helm"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
SERVER = ("--set", "server.enabled=true,server.data=test")
SITE = ("--set", "site.enabled=true,site.name=st-mary,site.superlink=fl.example.org:8000,site.data=rows")
helm = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")


def rendered(*told):
    done = subprocess.run(["helm", "template", "r", CHART, *told], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What a server's release and a site's have, by kind and name."""
    (file := tmp_path_factory.mktemp("helm") / "site.yaml").write_text("name: st-mary\nclient: 0\n")
    made = {}
    for told in (SERVER, (*SITE, "--set-file", f"site.file={file}")):
        code, text, error = rendered(*told)
        assert code == 0, error
        made |= {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(text) if o}
    return made


CONTAINERS = {  # of compose: where they are in the chart
    "superlink": (("StatefulSet", "superlink"), 0),
    "server": (("StatefulSet", "server"), 0),
    "registered": (("Job", "fedlora-registered"), 0),
    "site-0": (("StatefulSet", "fedlora-site-st-mary"), 0),
    "site-0-worker": (("StatefulSet", "fedlora-site-st-mary"), 1),
}


@helm
@pytest.mark.parametrize("service", CONTAINERS)
def test_a_container_is_that_of_compose(service, objects):
    (where, at), there = CONTAINERS[service], COMPOSE[service]
    pod = objects[where]["spec"]["template"]["spec"]
    here = pod["containers"][at]
    args = [a for a in here["args"] if a not in ("python", "/opt/fedlora/reap.py")]
    command = [a for a in shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", there["command"])) if a != "python"]
    flags = {a.partition("=")[0] for a in args if a.startswith("--")}
    assert args[0] == command[0] and flags == {a for a in command if a.startswith("--")}
    assert here["image"] == re.sub(r"\$\{\w+:-(.*)\}", r"\1", there["image"])
    assert here["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    written = {m["mountPath"] for m in here["volumeMounts"] if not m.get("readOnly")}
    assert written <= {"/tmp", "/link", "/runs", "/flwr", "/state"}
    if "healthcheck" in there:
        test = there["healthcheck"]["test"][1:]
        for probe in ("startupProbe", "livenessProbe"):
            assert here[probe]["exec"]["command"] == test
    volumes = {v["name"]: v for v in pod["volumes"]}
    keys = [volumes[m["name"]]["secret"] for m in here["volumeMounts"] if "secret" in volumes.get(m["name"], {})]
    if service in ("server", "site-0-worker"):  # neither the SuperLink's key nor the node's
        assert all({i["key"] for i in secret["items"]} <= {"ca.crt", "executor.secret"} for secret in keys)


@helm
def test_nobody_speaks_to_a_site_and_it_speaks_to_the_superlink_alone(objects):
    policy = objects["NetworkPolicy", "fedlora-site-st-mary"]["spec"]
    assert policy["ingress"] == [] and [p["port"] for rule in policy["egress"] for p in rule["ports"]] == [
        8000,
        53,
        53,
    ]
    assert objects["NetworkPolicy", "fedlora-superlink"]["spec"]["egress"] == []


@helm
def test_base_models_are_fetched_where_that_is_allowed():
    for value, ports in (("1", [53, 53]), ("0", [53, 53, 443])):
        _, text, _ = rendered(*SITE, "--set", "site.file=x", "--set-string", f"hubOffline={value}")
        policy = next(o for o in yaml.safe_load_all(text) if o and o["kind"] == "NetworkPolicy")
        names = policy["spec"]["egress"][1:]
        assert [p["port"] for rule in names for p in rule["ports"]] == ports
        assert names[0]["to"] == [{"namespaceSelector": {}}]


@helm
def test_every_object_is_one_that_kubernetes_knows(objects):
    validate = pytest.importorskip("kubernetes_validate")
    for one in objects.values():
        for release in ("1.27", "1.34"):
            validate.validate(one, release, strict=True)
    subprocess.run(["helm", "lint", "--strict", CHART, *SERVER], check=True, capture_output=True)


@helm
@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("--set", "server.enabled=true"), "server.data: name the PersistentVolumeClaim with the test set"),
        (SITE, "site.file: is missing"),
        ((), "a release is the server, or one site"),
        ((*SERVER, *SITE, "--set", "site.file=x"), "a release is the server, or one site"),
        (("--set", "site.name=St Mary"), "does not match pattern"),
        (("--set", "sites.name=x"), "sites"),
        (("--set", "user=0"), "user"),
    ],
)
def test_what_is_missing_or_wrong_is_said(told, words):
    code, _, error = rendered(*told)
    assert code and words in error


def test_the_chart_has_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart, values = (yaml.safe_load((CHART / f"{name}.yaml").read_text()) for name in ("Chart", "values"))
    assert chart["version"] == chart["appVersion"] == version
    assert values["images"]["fedlora"] == f"fedlora:{version}"
    assert values["images"]["flower"] == f"fedlora-flower:{version}"
    assert set(json.loads((CHART / "values.schema.json").read_text())["properties"]) >= set(values)


def test_the_first_process_gives_the_code_of_its_command_and_passes_signals_on():
    command = [sys.executable, ROOT / "docker" / "reap.py", sys.executable, "-c"]
    assert subprocess.run([*command, "exit(7)"]).returncode == 7
    with subprocess.Popen([*command, "print(flush=True); input()"], stdin=-1, stdout=-1) as started:
        started.stdout.readline()
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=20) == 128 + signal.SIGTERM
