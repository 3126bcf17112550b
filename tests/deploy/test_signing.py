"""Who submitted a run."""

import subprocess

import pytest

from fedlora.deploy.signing import sign, signed
from fedlora.errors import UserError

SCENARIO = {"name": "a", "seed": 1}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, kind in (("one", "ed25519"), ("two", "ed25519"), ("curve", "ecdsa")):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", folder / name], check=True)
    return folder


@pytest.fixture
def app(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    return tmp_path


def test_a_signature_is_of_a_key_a_scenario_and_the_code(keys, app):
    one, two = ((keys / f"{name}.pub").read_text() for name in ("one", "two"))
    made = sign(keys / "one", SCENARIO, app)
    assert signed(made, [two, one], SCENARIO, app)
    assert not signed(made, [two], SCENARIO, app)
    assert not signed(made, [one], {**SCENARIO, "seed": 2}, app)
    assert not signed("None", [one], SCENARIO, app) and not signed("", [one], SCENARIO, app)
    (app / "mine.py").write_text("x = 2\n")
    assert not signed(made, [one], SCENARIO, app)
    (app / "mine.py").write_text("x = 1\n")
    (app / "more").mkdir()
    (app / "more" / "there.py").write_text("")
    assert not signed(made, [one], SCENARIO, app)


def test_a_key_that_is_none_is_a_line(keys, app, tmp_path):
    with pytest.raises(UserError, match="not an Ed25519 key"):
        sign(keys / "curve", SCENARIO, app)
    with pytest.raises(UserError, match="cannot be read"):
        sign(tmp_path / "none", SCENARIO, app)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="no usable key"):
        sign(tmp_path / "text", SCENARIO, app)
    with pytest.raises(UserError, match="is no ssh public key"):
        signed("", ["hello"], SCENARIO, app)
    with pytest.raises(UserError, match="is not an Ed25519 key"):
        signed("", [(keys / "curve.pub").read_text()], SCENARIO, app)
