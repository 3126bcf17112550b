"""Who submitted a run."""

import importlib.machinery
import os
import py_compile
import subprocess
import sys

import pytest

from fedlora.deploy.signing import sign, signer
from fedlora.errors import UserError

SCENARIO = {"name": "a", "seed": 1}
RUN = "a-1"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, kind in (("one", "ed25519"), ("two", "ed25519"), ("curve", "ecdsa")):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", folder / name], check=True)
    return folder


@pytest.fixture
def app(tmp_path):
    (app := tmp_path / "app").mkdir()
    (app / "mine.py").write_text("x = 1\n")
    (app / "pyproject.toml").write_text('[tool.flwr.app.config]\nscenario = "a"\nsignature = ""\n')
    return app


def test_a_signature_is_of_a_key_a_scenario_and_the_code(keys, app):
    one, two = ((keys / f"{name}.pub").read_text() for name in ("one", "two"))
    made = sign(keys / "one", SCENARIO, RUN, app)
    assert signer(made, [two, one], SCENARIO, RUN, app)
    assert not signer(made, [two], SCENARIO, RUN, app)
    assert not signer(made, [one], {**SCENARIO, "seed": 2}, RUN, app)
    assert not signer("None", [one], SCENARIO, RUN, app) and not signer("", [one], SCENARIO, RUN, app)
    (app / "mine.py").write_text("x = 2\n")
    assert not signer(made, [one], SCENARIO, RUN, app)
    (app / "mine.py").write_text("x = 1\n")
    (app / "more").mkdir()
    (app / "more" / "there.py").write_text("")
    assert not signer(made, [one], SCENARIO, RUN, app)


def test_a_key_that_is_none_is_a_line(keys, app, tmp_path):
    with pytest.raises(UserError, match="not an Ed25519 key"):
        sign(keys / "curve", SCENARIO, RUN, app)
    with pytest.raises(UserError, match="cannot be read"):
        sign(tmp_path / "none", SCENARIO, RUN, app)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="no usable key"):
        sign(tmp_path / "text", SCENARIO, RUN, app)
    with pytest.raises(UserError, match="is no ssh public key"):
        signer("", ["hello"], SCENARIO, RUN, app)
    with pytest.raises(UserError, match="is not an Ed25519 key"):
        signer("", [(keys / "curve.pub").read_text()], SCENARIO, RUN, app)


def public(keys):
    return [(keys / "one.pub").read_text()]


def test_a_signature_is_of_one_run(keys, app):
    made = sign(keys / "one", SCENARIO, RUN, app)
    assert signer(made, public(keys), SCENARIO, RUN, app)
    assert not signer(made, public(keys), SCENARIO, "a-2", app)


@pytest.mark.parametrize(
    "add",
    [
        lambda app: (app / "mine.so").write_bytes(b""),
        lambda app: (app / "notes.txt").write_text(""),
        lambda app: (app / "__pycache__").mkdir(),
        lambda app: (app / ".hidden").write_text(""),
        lambda app: (app / "other.py").symlink_to("mine.py"),
        lambda app: (app / "there").symlink_to(app.parent),
        lambda app: os.mkfifo(app / "pipe"),
        lambda app: (app / "pyproject.toml").write_text("[tool.flwr.app.components]\nclientapp = 'mine:app'\n"),
        lambda app: (app / "mine.py").unlink(),
    ],
)
def test_every_entry_of_an_app_is_signed(keys, app, add):
    made = sign(keys / "one", SCENARIO, RUN, app)
    add(app)
    assert not signer(made, public(keys), SCENARIO, RUN, app)


def test_nothing_with_links_is_signed(keys, app):
    (app / "there").symlink_to(app.parent)
    with pytest.raises(UserError, match="there: what is signed holds files and folders, and no links"):
        sign(keys / "one", SCENARIO, RUN, app)


def test_the_signature_is_not_of_itself_and_outlasts_flower_s_packing(keys, app):
    made = sign(keys / "one", SCENARIO, RUN, app)
    text = f'# written anew\n[tool.flwr.app.config]\nsignature = "{made}"\nscenario = "a"\n'
    (app / "pyproject.toml").write_text(text)
    assert signer(made, public(keys), SCENARIO, RUN, app)
    (app / "pyproject.toml").write_text(text.replace('"a"', '"b"'))
    assert not signer(made, public(keys), SCENARIO, RUN, app)


IMPORT = """
import importlib, sys
from pathlib import Path
from fedlora.deploy import sources
sources.only(Path(sys.argv[1]))
for name in sys.argv[2:]:
    try:
        print(importlib.import_module(name).said)
    except ImportError:
        print("nothing")
"""


def test_only_sources_are_imported_from_an_app(app):
    """Neither an unchecked compiled file beside the source, nor one alone, nor a library, in no folder of it."""
    for folder in (app, app / "part"):
        folder.mkdir(exist_ok=True)
        (folder / "code.py").write_text("said = 'somebody else'")
        cached = folder / "__pycache__" / f"good.{sys.implementation.cache_tag}.pyc"
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(folder / "code.py", cached, invalidation_mode=unchecked)
        py_compile.compile(folder / "code.py", folder / "alone.pyc")
        (folder / f"library{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"")
        (folder / "good.py").write_text("said = 'the source'")
        (folder / "code.py").unlink()
    before = sorted(app.rglob("*"))
    names = [f"{part}{name}" for part in ("", "part.") for name in ("good", "alone", "library")]
    told = subprocess.run([sys.executable, "-c", IMPORT, app, *names], check=True, capture_output=True, text=True)
    assert told.stdout.split("\n")[:-1] == ["the source", "nothing", "nothing"] * 2
    assert sorted(app.rglob("*")) == before
