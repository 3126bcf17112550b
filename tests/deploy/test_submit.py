"""What is sent to a SuperLink, and what is checked before."""

import contextlib
import datetime
import ipaddress
import json
import socket
import socketserver
import ssl
import sys
import threading
import tomllib

import pytest

from fedlora import scenario as scenarios
from fedlora.deploy import signing
from fedlora.deploy import submit as module
from fedlora.deploy.submit import submit
from fedlora.errors import RoundError, UserError
from fedlora.reports.console import Silent

OWN = """
from fedlora.strategies.ffa_lora import FFALoRA


class Mine(FFALoRA):
    pass
"""


@pytest.fixture
def tiny(tiny, reviews):
    """With a test set of the server's, as sites keep their rows."""
    return lambda *overrides: tiny(f"data.files.test='{reviews}'", *overrides)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr's pathspec
def test_the_app_holds_the_scenario_the_code_and_the_signature(tiny, tmp_path, monkeypatch):
    import io
    import shutil
    import subprocess
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    (tmp_path / "lab_of_mine").mkdir()
    (tmp_path / "lab_of_mine" / "__init__.py").write_text("")
    (tmp_path / "lab_of_mine" / "mine.py").write_text(OWN)
    (tmp_path / "lab_of_mine" / "test_mine.py").write_text("")
    (tmp_path / "figures_of_mine.py").write_text("def rows(outputs, targets, labels):\n    return 1.0\n")
    (tmp_path / "lab_of_mine" / "data").mkdir()
    (tmp_path / "lab_of_mine" / "data" / "rows.csv").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    told = ("strategy.use=lab_of_mine.mine:Mine", "metrics=[figures_of_mine:rows]", "data.labels=[bad, good]")
    scenario = tiny(*told)
    module._make(tmp_path / "app", scenario, "tiny-1", False, tmp_path / "key")
    told = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert scenarios.parse(told["config"]["scenario"]).hash == scenario.hash and told["config"]["resume"] == ""
    assert (tmp_path / "app" / "lab_of_mine" / "mine.py").read_text() == OWN
    assert sorted(p.name for p in (tmp_path / "app").iterdir()) == [
        "figures_of_mine.py",
        "lab_of_mine",
        "pyproject.toml",
    ]
    sent = json.loads(json.dumps(scenario.model_dump()))
    public = (tmp_path / "key.pub").read_text()
    assert signing.signer(told["config"]["signature"], [public], sent, "tiny-1", tmp_path / "app")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path / "app"))) as fab:  # as a node gets it
        fab.extractall(tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / ".info")
    assert signing.signer(told["config"]["signature"], [public], sent, "tiny-1", tmp_path / "there")
    assert sorted(p.name for p in (tmp_path / "there" / "lab_of_mine").iterdir()) == ["__init__.py", "mine.py"]
    sys.modules.pop("lab_of_mine.mine", None)


def test_a_run_that_is_signed_names_its_labels(tiny, tmp_path):
    with pytest.raises(UserError, match=r"data.labels: a signed run names its labels"):
        module._make(tmp_path / "app", tiny(), "tiny-1", False, tmp_path / "key")


def test_the_app_of_the_docker_folder_is_the_same_but_for_its_configuration(tiny, tmp_path):
    from pathlib import Path

    module._make(tmp_path / "app", tiny(), "tiny-1", False, None)
    sent = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    root = Path(__file__).parents[2]
    there = tomllib.loads((root / "docker" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert sent["components"] == there["components"] and set(sent["config"]) == set(there["config"])
    assert scenarios.load(there["config"]["scenario"]).clients.total == 3


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr's pathspec
def test_flower_builds_the_app_with_all_of_it(tiny, tmp_path):
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    module._make(tmp_path / "app", tiny(), "tiny-1", False, None)
    (tmp_path / "fab.zip").write_bytes(build_fab_from_disk(tmp_path / "app"))
    with zipfile.ZipFile(tmp_path / "fab.zip") as fab:
        assert {"pyproject.toml", ".info/CONTENT"} == set(fab.namelist())


@pytest.mark.parametrize(
    "told, words",
    [
        ("strategy.option=3", r"--set strategy.option=3: .*no option"),
        ("data.files.test=null", r"data.files.test: sites keep their rows: name the server's own file"),
        ("loss={class_weights: balanced}", "loss.class_weights: counts test rows, which sites do not see"),
    ],
)
def test_what_the_server_would_refuse_is_not_sent(told, words, tiny, monkeypatch):
    monkeypatch.setattr(module, "start", lambda *_: pytest.fail("it was sent"))
    with pytest.raises(UserError, match=words) as refused:
        submit(tiny(told), "nowhere", display=Silent())
    assert len(refused.value.lines) == 1


def test_an_unknown_superlink_is_a_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(UserError) as told:
        submit(tiny(), "nowhere", display=Silent())
    start = f"--superlink nowhere: {tmp_path / 'config.toml'} has no connection of that name"
    assert told.value.lines[0].startswith(start) and "write [superlink.nowhere] there" in told.value.lines[0]


def certificates(folder, days):
    """A CA and a certificate of 127.0.0.1 by it that ends in so many days, as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now, keys = datetime.datetime.now(datetime.UTC), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in ("CA", "superlink")]
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for number, (file, end) in enumerate((("ca.crt", 9), ("server.crt", days))):
        made = (
            x509.CertificateBuilder(names[0], names[number], keys[number].public_key(), number + 1)
            .not_valid_before(now - datetime.timedelta(9))
            .not_valid_after(now + datetime.timedelta(end))
            .add_extension(x509.BasicConstraints(number == 0, None), critical=True)
            .add_extension(here, critical=False)
            .sign(keys[0], hashes.SHA256())
        )
        (folder / file).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, *form))


@pytest.mark.parametrize(("days", "words"), [(-1, "not to be trusted: certificate has expired"), (1, None)])
def test_an_expired_certificate_is_told_as_such(tiny, tmp_path, monkeypatch, days, words):
    """A server that shows its certificate and then hangs up: Flower says of both that it is unavailable."""
    certificates(tmp_path, days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")

    class Shows(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError), context.wrap_socket(self.request, server_side=True):
                pass

    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Shows) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = {"address": f"127.0.0.1:{server.server_address[1]}", "root-certificates": str(tmp_path / "ca.crt")}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in there.items())
        (tmp_path / "config.toml").write_text(f'[superlink]\ndefault = "here"\n[superlink.here]\n{lines}')
        with pytest.raises(UserError, match="--superlink here: ") as told:
            submit(tiny(), "here", display=Silent())
        server.shutdown()
    assert "\n" not in str(told.value) and ("certificate" in str(told.value)) == (words is not None)
    assert words is None or words in str(told.value)


def connection(folder, port):
    told = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "config.toml").write_text(told)


@pytest.fixture
def closed():
    """A port where nobody listens."""
    with contextlib.closing(socket.socket()) as there:
        there.bind(("127.0.0.1", 0))
        yield there.getsockname()[1]


def test_a_superlink_that_is_down_is_told_at_once(tiny, tmp_path, monkeypatch, closed):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    connection(tmp_path, closed)
    monkeypatch.setattr(module, "_flwr", lambda *_: pytest.fail("a process is started to find it out"))
    with pytest.raises(UserError) as told:
        submit(tiny(), "here", display=Silent())
    where = f"127.0.0.1:{closed}"
    assert (
        str(told.value) == f"--superlink here: nobody answers at {where}: is the SuperLink up, and its port open?"
    )


def test_a_superlink_that_goes_away_costs_no_process_until_it_is_back(tmp_path, monkeypatch, closed):
    """It is asked for by a connection, and each time that it does not answer is a line."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    connection(tmp_path, closed)
    notes, slept = [], []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:  # it is back, on a port of its own
            server.listen()
            connection(tmp_path, server.getsockname()[1])

    class Told(Silent):
        def note(self, what):
            notes.append(what)

    asked = []
    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module, "_status", lambda *_: asked.append("status") or "finished")
    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", "pass"])
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        follower = module.follow("17", "here", None, Told())
    assert not follower.ended and asked == ["status"] and slept == [3.0] * 3
    said = "the SuperLink does not answer: asked again every 3 s, {} times more"
    assert notes == [said.format(n) for n in (19, 18, 17)]


def test_behind_a_proxy_only_flower_can_tell_whether_a_superlink_is_up(tmp_path, monkeypatch, closed):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    connection(tmp_path, closed)
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    assert not module._listens("here") and module._listens("nowhere")
    monkeypatch.setattr(module.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not module._listens("here"), "a connection without TLS takes http_proxy"
    (tmp_path / "config.toml").write_text((tmp_path / "config.toml").read_text().replace("insecure = true", ""))
    assert module._listens("here")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not module._listens("here")


def test_a_folder_that_is_not_empty_is_not_written_over(tiny, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="--out"):
        submit(tiny(), "nowhere", out=tmp_path, display=Silent())


def test_a_run_that_ends_without_a_word_says_how_to_go_on(tiny, monkeypatch):
    monkeypatch.setattr(module, "start", lambda *_: "17")
    monkeypatch.setattr(module, "_status", lambda *_: "finished")
    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", "print('INFO: nothing of ours')"])
    with pytest.raises(RoundError, match=f"--resume tiny-{tiny().hash}-[0-9a-f]{{12}}$"):
        submit(tiny(), "nowhere", display=Silent())
