"""`docker/prepare`: keys, certificates and compose files, made in a copy of docker/ and made again."""

import gzip
import os
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "openssl", "ssh-keygen"))), reason="needs bash, openssl and ssh-keygen"
)


@pytest.fixture
def docker(tmp_path):
    """A copy of docker/ alone."""
    folder = tmp_path / "docker"
    folder.mkdir()
    for name in ("prepare", "compose.yaml"):
        shutil.copy(DOCKER / name, folder / name)
    return folder


def prepare(docker, *arguments, path=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDLORA_")}
    environment |= {"PATH": path} if path else {}
    return subprocess.run([docker / "prepare", *arguments], capture_output=True, text=True, env=environment)


def made(docker, *arguments):
    done = prepare(docker, *arguments)
    assert done.returncode == 0, done.stderr
    return docker / "deployment"


def refused(docker, *arguments, **options):
    """The one line of a refusal, which writes nothing."""
    before = contents(docker)
    done = prepare(docker, *arguments, **options)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert contents(docker) == before
    (line,) = done.stderr.splitlines()
    return line


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keys(deployment):
    return {file.stem: file.read_text() for file in (deployment / "server" / "keys").iterdir()}


def names(deployment):
    command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in"]
    told = subprocess.check_output([*command, deployment / "server" / "certs" / "server.crt"], text=True)
    return {name.strip() for name in told.splitlines()[1].split(",")}


def test_it_can_be_run_again_and_changes_nothing(docker):
    deployment = made(docker, "--sites", "2", "--host", "fl.example.org", "--host", "192.0.2.7")
    before = contents(deployment)
    assert set(keys(deployment)) == {"site-0", "site-1"}
    assert made(docker) == deployment and contents(deployment) == before
    kept = {"DNS:localhost", "DNS:superlink", "DNS:fl.example.org", "IP Address:127.0.0.1", "IP Address:192.0.2.7"}
    assert names(deployment) == kept
    key = (deployment / "server" / "certs" / "server.key").read_text()
    made(docker, "--host", "other.example.org")
    assert names(deployment) == kept | {"DNS:other.example.org"}
    assert (deployment / "server" / "certs" / "server.key").read_text() == key
    config = tomllib.loads((deployment / "flwr" / "config.toml").read_text())
    assert config["superlink"]["compose"]["address"] == "127.0.0.1:8000"


def test_sites_come_and_go_and_no_number_is_given_twice(docker):
    deployment = made(docker, "--sites", "2")
    first = keys(deployment)
    assert refused(docker, "--sites", "1") == (
        "docker/prepare: --sites 1: there are 2 (0 1); docker/prepare --remove-site K takes one away"
    )
    assert "no site 2" in refused(docker, "--remove-site", "2")
    made(docker, "--add-site")
    assert set(keys(deployment)) == {"site-0", "site-1", "site-2"}
    done = prepare(docker, "--remove-site", "1")
    assert done.returncode == 0 and "up registered" in done.stdout
    assert set(keys(deployment)) == {"site-0", "site-2"} and (deployment / "site-1" / "state").is_dir()
    services = yaml.safe_load((deployment / "compose.yaml").read_text())["services"]
    assert {s for s in services if s.startswith("site")} == {"site-0", "site-0-worker", "site-2", "site-2-worker"}
    made(docker, "--sites", "3")
    assert set(keys(deployment)) == {"site-0", "site-2", "site-3"}
    assert keys(deployment)["site-0"] == first["site-0"]


def test_what_to_do_next_is_for_the_machines_that_there_are(docker):
    compose = "docker compose -f docker/deployment/compose.yaml"
    alone = prepare(docker, "--sites", "2").stdout.splitlines()
    assert f"  {compose} up --detach --wait" in alone and not any("restart" in line for line in alone)
    (docker.parent / "pyproject.toml").write_text("")  # as in a checkout
    assert f"  {compose} up --build --detach --wait" in prepare(docker, "--add-site").stdout.splitlines()
    _, first, *others = prepare(docker, "--host", "fl.example.org").stdout.splitlines()
    assert first.startswith(f"  {compose} restart superlink server") and "certificate has other names" in first
    assert others[0] == f"  {compose} up --build --detach --wait superlink server"
    assert others[1].startswith(f"  {compose} up registered")
    again = prepare(docker).stdout
    assert "restart" not in again and "-f docker/compose.yaml" not in again


def test_the_scenario_of_a_demo_names_the_test_rows_as_the_server_sees_them(docker, tmp_path):
    """With a `fedlora` that writes what `split` does."""
    (tool := tmp_path / "bin" / "fedlora").parent.mkdir()
    lines = ["#!/bin/sh", 'mkdir -p "$4/site-0"', 'cd "$4"', "touch site-0/train.csv site-0/site.yaml test.csv"]
    tool.write_text("\n".join([*lines, 'echo "    test: $PWD/test.csv" > scenario.yaml']) + "\n")
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = prepare(docker, "--demo", "mine.yaml", path=path)
    assert done.returncode == 0 and "submit docker/deployment/split/scenario.yaml --super" in done.stdout
    made = docker / "deployment"
    assert (made / "split" / "scenario.yaml").read_text() == "    test: /data/test.csv\n"
    assert (made / "server" / "data" / "test.csv").exists() and len([*(made / "split").iterdir()]) == 2


def test_a_site_s_own_public_key_stays(docker):
    deployment = made(docker, "--sites", "2")
    own = deployment / "server" / "keys" / "site-1.pub"
    own.write_text("ecdsa-sha2-nistp384 AAAA their own\n")
    made(docker)
    assert own.read_text() == "ecdsa-sha2-nistp384 AAAA their own\n"
    assert "was not made here" in refused(docker, "--rotate", "site", "1")


def test_keys_and_certificates_are_rotated_under_the_same_names(docker):
    deployment = made(docker, "--sites", "2", "--host", "fl.example.org")
    before, held = contents(deployment), names(deployment)
    made(docker, "--rotate", "site", "1")
    now = contents(deployment)
    changed = {str(p.relative_to(deployment)) for p in now if now[p] != before[p]}
    certs = {f"site-1/certs/{name}" for name in ("node.key", "node.key.pub", "executor.secret")}
    assert changed == {*certs, "server/keys/site-1.pub"}
    assert now[deployment / "site-1" / "certs" / "node.key.pub"] == now[deployment / "server/keys/site-1.pub"]
    before = now
    made(docker, "--rotate", "server")
    now = contents(deployment)
    changed = {str(p.relative_to(deployment)) for p in now if now[p] != before[p]} - {"ca/ca.srl"}
    assert changed == {f"server/certs/{name}" for name in ("server.key", "server.crt", "executor.secret")}
    assert names(deployment) == held
    (deployment / "ca" / "ca.key").unlink()
    assert "ca.key is not here" in refused(docker, "--rotate", "server")
    made(docker)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--sites", "x"), "--sites: 'x' is no number"),
        (("--sites",), "--sites: needs a value"),
        (("--sites", "0"), "--sites: a federation has one at least"),
        (("--host", "a b"), "--host: 'a b' is no name"),
        (("--wide",), "--wide: no such option"),
        (("--rotate", "all"), "--rotate: 'all' is neither"),
        (("--rotate", "site"), "--rotate site: needs the number"),
        (("--rotate", "server"), "there is nothing yet"),
        (("--remove-site", "0"), "--remove-site: there is no site 0; there are: none"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(docker, arguments, what):
    assert refused(docker, *arguments).startswith(f"docker/prepare: {what}")


def test_a_demo_without_fedlora_makes_nothing(docker, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("env", "bash", "dirname", "openssl", "ssh-keygen"):
        (tools / name).symlink_to(shutil.which(name))
    assert "needs fedlora on the PATH" in refused(docker, "--demo", path=str(tools))


def test_help_is_the_head_of_the_file(docker):
    done = prepare(docker, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Make what a deployment needs") and "--rotate site K" in done.stdout
    assert "set -euo" not in done.stdout


def test_the_files_it_writes_are_the_one_that_ships(docker):
    deployment = made(docker, "--sites", "3", "--host", "fl.example.org")
    shipped = (DOCKER / "compose.yaml").read_text()
    if (user := os.getuid()) != 0:
        shipped = shipped.replace("-10001:10001", f"-{user}:{os.getgid()}")
    whole = yaml.safe_load((deployment / "compose.yaml").read_text())
    there = yaml.safe_load(shipped.replace("./deployment/", "./").replace("context: ..", "context: ../.."))
    assert whole == there
    services = there["services"]
    for k in range(3):
        alone = yaml.safe_load((deployment / f"site-{k}" / "compose.yaml").read_text())
        node = services[f"site-{k}"]
        del node["depends_on"]
        told = {f"site-{k}": node, f"site-{k}-worker": services[f"site-{k}-worker"]}
        text = yaml.safe_dump(told).replace(f"./site-{k}/", "./")
        text = text.replace("FEDLORA_SUPERLINK:-superlink:8000", "FEDLORA_SUPERLINK:-fl.example.org:8000")
        assert alone["services"] == yaml.safe_load(text)
        assert alone["networks"] == {"fleet": {}, f"inner-{k}": {"internal": True}}


def test_what_is_packed_for_a_site_is_its_own_and_has_no_rows(docker, tmp_path):
    deployment = made(docker, "--sites", "2")
    (deployment / "site-1" / "site" / "train.csv").write_text("text,label\n")
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "docker"
    engine.write_text('#!/bin/sh\necho "$@"\n')
    engine.chmod(0o755)
    done = prepare(docker, "--pack", "1", path=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    with tarfile.open(deployment / "site-1.tar.gz") as packed:
        certs = {f"site-1/certs/{name}" for name in ("ca.crt", "executor.secret", "node.key", "node.key.pub")}
        folders = {"site-1/certs", "site-1/site", "site-1/site/state", "site-1/state"}
        assert set(packed.getnames()) == {"site-1/compose.yaml", *certs, *folders}
        assert {(member.uid, member.gid) for member in packed} == {(10001, 10001)}, "whoever packs it"
    version = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["version"]
    images = gzip.decompress((deployment / "images.tar.gz").read_bytes()).decode().split()
    assert images == ["save", f"fedlora:{version}", f"fedlora-flower:{version}"]
    engine.write_text("#!/bin/sh\nexit 1\n")
    said = refused(docker, "--pack", "1", path=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert f"fedlora:{version} or fedlora-flower:{version} is not here: build or load the images first" in said


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", DOCKER / "prepare"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
