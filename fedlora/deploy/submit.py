"""`fedlora submit`: check a scenario, send it to a SuperLink, follow the run, bring its folder back.

It speaks to the SuperLink through Flower's own command line, with the connections of Flower's configuration
(`$FLWR_HOME/config.toml`).
"""

import importlib.util
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora import client as clients
from fedlora import strategy as strategies
from fedlora import suitability
from fedlora.deploy import signing
from fedlora.deploy.report import Follower
from fedlora.errors import RoundError, SettingError, UserError, suggestion
from fedlora.privacy.noise import fresh_key
from fedlora.reports.console import Display
from fedlora.rounds.checkpoint import whole_folder
from fedlora.run import Run
from fedlora.scenario import Scenario
from fedlora.tasks.contract import find

_APP = """\
[project]
name = "fedlora-app"
version = "0.2.0"
description = "A run of fedlora."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "fedlora.deploy.server_app:app"
clientapp = "fedlora.deploy.client_app:app"

[tool.flwr.app.config]
"""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
_PATIENCE = 20  # how often a log that ended too soon is asked for again
_PAUSE = 3.0  # seconds between
_AWAY = "the SuperLink does not answer: asked again every {:g} s, {} times more"


def submit(
    scenario: Scenario,
    superlink: str,
    *,
    out: Path | None = None,
    resume: str | None = None,
    key: Path | None = None,
    display: Display,
) -> Run:
    """Run a scenario on the sites of a SuperLink.

    Args:
        scenario: checked here, and sent with all its defaults.
        superlink: the name of a connection in Flower's configuration.
        out: the folder to bring the run back to, by default `runs/<the server's name for it>`.
        resume: the server's name of a run to go on with.
        key: an ssh key that signs the run, for sites that ask who submits.
        display: shown how it goes.

    Raises:
        UserError: the scenario does not fit, or the SuperLink refused it.
        RoundError: the run failed; the message says where its checkpoint is.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; name another with --out")
    try:
        strategy = strategies.load(scenario.strategy.use, scenario.strategy.options)
        suitability.check(strategy, scenario)
        suitability.check_sites(strategy, scenario)
        clients.load(scenario.clients.use, scenario.clients.options)
    except SettingError as error:
        raise scenario.located(error) from error
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "fedlora-app"
        name = resume or f"{scenario.name}-{scenario.hash}-{fresh_key().hex()[:12]}"
        _make(app, scenario, name, bool(resume), key)
        display.stage(f"sending the run to {superlink}")
        number = start(app, superlink)
    try:
        follower = follow(number, superlink, scenario, display)
    except KeyboardInterrupt:
        _flwr("stop", number, superlink)
        raise
    if follower.failure is not None:
        raise RoundError(f"the run failed on the server: {follower.failure}")
    if follower.name is None:
        raise RoundError(
            f"run {number} ended without a word, as when the SuperLink was killed (flwr log {number} {superlink} "
            f"--show); what was finished is kept: go on with --resume {name}"
        )
    place = out or Path("runs") / Path(follower.name).name  # the server says the name, not the folder
    with whole_folder(place) as new:
        follower.save(new)
    return Run.open(place)


def _make(app: Path, scenario: Scenario, name: str, resume: bool, key: Path | None) -> None:
    """Write the Flower app of a run: its configuration, and the custom code that it names.

    Raises:
        UserError: it is to be signed, and lacks what sites ask a signed run for; or the key cannot be used.
    """
    app.mkdir()
    named = (scenario.strategy.use, scenario.clients.use, scenario.task, scenario.model.adapter.named)
    for use in {*named, *scenario.metrics}:
        if ":" in use:
            _copy_code(use.partition(":")[0], app)
    sent = json.loads(json.dumps(scenario.model_dump()))  # what the server reads, and sites check the signature of
    task = find(scenario.task)
    if key is not None and task.labelled and task.target != "score" and scenario.data.labels is None:
        raise scenario.located(SettingError("data.labels", "a signed run names its labels: write them, in order"))
    config = {"scenario": scenario.to_yaml(), "name": name, "resume": name if resume else ""}
    write_app(app, config, sent, name, key)


def write_app(app: Path, config: dict[str, str], what: Mapping[str, Any], name: str, key: Path | None) -> None:
    """Complete a Flower app by its configuration, signed where there is a key.

    Args:
        app: its folder, with the code that comes along, if any.
        config: that the server reads.
        what: is signed beside the name and the app.
        name: of what is asked.
        key: an ssh key; None: nobody signs.

    Raises:
        UserError: the key cannot be used.
    """
    app.mkdir(exist_ok=True)
    config = {**config, "signature": ""}
    _configure(app, config)
    _leave_what_stays(app)
    if key is not None:
        _configure(app, {**config, "signature": signing.sign(key, what, name, app)})


def _configure(app: Path, config: dict[str, str]) -> None:
    text = _APP + "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in config.items())
    (app / "pyproject.toml").write_text(text, encoding="utf-8")


def _leave_what_stays(app: Path) -> None:
    """Remove what Flower would not send, such as tests: what is signed is what arrives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Flower's pathspec
        from flwr.cli.build import build_fab_from_disk

        with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as fab:
            sent = {app / name for name in fab.namelist()}
    for path in sorted(app.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in sent:
            path.unlink()


def _copy_code(module: str, app: Path) -> None:
    """Put a module that is not installed beside the app; an installed one is expected on every node."""
    top = module.partition(".")[0]
    found = importlib.util.find_spec(top)
    places = [found.origin, *(found.submodule_search_locations or ())] if found else []
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    for place in (Path(p).resolve() for p in places if p):
        if any(place.is_relative_to(there) for there in installed):
            return
        if found is None or found.submodule_search_locations is None:
            shutil.copy(place, app / place.name)
        elif place.is_dir():
            shutil.copytree(
                place, app / top, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True
            )


def start(app: Path, superlink: str) -> str:
    """Send the app; gives the number of the run.

    Raises:
        UserError: the SuperLink refused it, or cannot be reached.
    """
    if not _unknown(superlink) and not _listens(superlink):
        host = _connection(superlink)["address"]
        raise UserError(
            f"--superlink {superlink}: nobody answers at {host}: is the SuperLink up, and its port open?"
        )
    done = _flwr("run", str(app), superlink, "--format", "json")
    told = _json(done.stdout)
    if done.returncode or not told.get("run-id"):
        why = _unknown(superlink) or f"{_reason(told, done)}{_certificate(superlink)}"
        raise UserError(f"--superlink {superlink}: {why}")
    return str(told["run-id"])


def follow(number: str, superlink: str, scenario: Scenario | None, display: Display) -> Follower:
    """Read the run's log until it has ended; a log that breaks off is asked for again, from its beginning.

    Args:
        number: of the run.
        superlink: the name of a connection.
        scenario: of the run; None of a survey.
        display: shown how it goes.
    """
    follower = Follower(scenario, display)
    for attempt in range(_PATIENCE):
        if attempt:
            time.sleep(_PAUSE)
        if not _listens(superlink):  # Flower would start a process to find that out, and say nothing
            display.note(_AWAY.format(_PAUSE, _PATIENCE - attempt - 1))
            continue
        with subprocess.Popen(
            [*_command(), "log", number, superlink, "--stream"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(),
        ) as stream:
            assert stream.stdout is not None
            for line in stream.stdout:
                follower.line(line.rstrip("\n"))
        if follower.ended or (status := _status(number, superlink)) == "finished":
            break
        if status is not None:
            display.stage("the log broke off; asking for it again")
        else:
            display.note(_AWAY.format(_PAUSE, _PATIENCE - attempt - 1))
    return follower


def _status(number: str, superlink: str) -> str | None:
    """Whether a run is `finished`; None where the SuperLink does not answer."""
    told = _json(_flwr("list", superlink, "--run-id", number, "--format", "json").stdout)
    runs = told.get("runs") or [{}]
    status = runs[0].get("status")
    return None if status is None else str(status).partition(":")[0]


def _reason(told: dict[str, Any], done: "subprocess.CompletedProcess[str]") -> str:
    text = str(told.get("error-message") or done.stderr or done.stdout)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:500]


def _connections() -> Path:
    """Flower's file of connections."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"


def _held() -> dict[str, Any]:
    """What Flower's file says of connections, by name; empty where it cannot be read."""
    try:
        held = tomllib.loads(_connections().read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _connection(superlink: str) -> dict[str, Any]:
    """What Flower's file says of a connection; empty where it has none of that name."""
    told = _held().get(superlink)
    return told if isinstance(told, dict) else {}


def _listens(superlink: str) -> bool:
    """Whether anybody listens where a SuperLink should; behind a proxy, or elsewhere, only Flower can tell."""
    told = _connection(superlink)
    host, _, port = str(told.get("address", "")).rpartition(":")
    proxied = urllib.request.getproxies().keys() & {"all", "http" if told.get("insecure") else "https"}
    if not host or not port.isdecimal() or (proxied and not urllib.request.proxy_bypass(host)):
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PAUSE).close()
    except OSError:
        return False
    return True


def _unknown(superlink: str) -> str:
    """What to write where Flower has no connection of that name; empty if it has one."""
    file, held = _connections(), _held()
    if superlink in held:
        return ""
    named = [name for name, told in held.items() if isinstance(told, dict)]
    more = f" ({suggestion(superlink, named)})" if named else ""
    return (
        f"{file} has no connection of that name{more}: write [superlink.{superlink}] there, and below it "
        'address = "HOST:8000" and root-certificates = "/path/to/ca.crt", each on a line of its own'
    )


def _certificate(superlink: str) -> str:
    """What is wrong with the certificate that a SuperLink shows, as Flower does not say; empty if nothing is."""
    try:
        told = _connection(superlink)
        host, _, port = str(told["address"]).rpartition(":")
        context = ssl.create_default_context(cafile=told["root-certificates"])
        with (
            socket.create_connection((host, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return (
            f" Its certificate is not to be trusted: {error.verify_message}; docs/deploy.md says how to renew it"
        )
    except (OSError, KeyError, TypeError, ValueError):
        return ""


def _json(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        told = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _flwr(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*_command(), *arguments], capture_output=True, text=True, env=_environment())


def _command() -> list[str]:
    return [sys.executable, "-c", "from flwr.cli.app import app; app()"]


def _environment() -> dict[str, str]:
    return {**os.environ, **_QUIET}
