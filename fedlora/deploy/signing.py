"""Who submitted a run: an ssh key signs the scenario, the run's name, and every file that travels with it.

Flower's SuperLink takes a run from anyone who reaches it. A site that names `accept.submitters` trains only for a
run that one of those keys signed, whatever the server says. The labels are part of the scenario (`data.labels`),
and the name holds a signature to one run: under another name it is worth nothing.
"""

import base64
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlora.errors import UserError

_CONTEXT = b"fedlora run 2\n"  # what is signed is for nothing else


def sign(key_file: Path, scenario: Mapping[str, Any], name: str, app: Path) -> str:
    """The signature of a run.

    Args:
        key_file: an Ed25519 private key of OpenSSH, without a passphrase.
        scenario: resolved.
        name: of the run.
        app: folder of the Flower app, all of which is signed too.

    Raises:
        UserError: the key cannot be used.
    """
    try:
        key = load_ssh_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"{key_file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # cryptography has an exception for each way in which a key is none
        raise UserError(f"{key_file}: no usable key ({error}); make one by ssh-keygen -t ed25519 -N ''") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{key_file}: not an Ed25519 key; make one by ssh-keygen -t ed25519 -N ''")
    return base64.b64encode(key.sign(_message(scenario, name, app))).decode()


def signer(signature: str, keys: Iterable[str], scenario: Mapping[str, Any], name: str, app: Path) -> str | None:
    """Which of some public keys, as in an `.pub` file, made a signature of a run; None where none did.

    Raises:
        UserError: a key is none.
    """
    try:
        message = _message(scenario, name, app)
    except UserError:
        return None
    for text in keys:
        key = public_key(text)
        try:
            key.verify(base64.b64decode(signature), message)
        except (InvalidSignature, ValueError):
            continue
        return text
    return None


def fingerprint(text: str) -> str:
    """A public key as `ssh-keygen -l` prints it, with its comment.

    Raises:
        UserError: it is none.
    """
    raw = public_key(text).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(raw)).digest()).decode().rstrip("=")
    return " ".join([f"SHA256:{digest}", *text.split()[2:]])


def public_key(text: str) -> Ed25519PublicKey:
    """A public key as in an `.pub` file.

    Raises:
        UserError: it is none.
    """
    try:
        key = load_ssh_public_key(text.encode())
    except Exception as error:  # as above
        raise UserError(f"accept.submitters: {text:.30}... is no ssh public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"accept.submitters: {text:.30}... is not an Ed25519 key")
    return key


def code(app: Path) -> str:
    """A digest of the programs of an app: it is the same where two apps differ in their configuration alone."""
    try:
        told = {path: what for path, what in _contents(app) if path != "pyproject.toml"}
    except UserError:
        return str(app)  # nobody's but its own
    return _digest(json.dumps(dict(sorted(told.items()))).encode())


def _message(scenario: Mapping[str, Any], name: str, app: Path) -> bytes:
    told = {"scenario": scenario, "run": name, "app": dict(sorted(_contents(app)))}
    return _CONTEXT + json.dumps(told, sort_keys=True).encode()


def _contents(app: Path) -> Iterator[tuple[str, str]]:
    """What each file and folder of an app is, by its path in it, so that none can be added.

    Of `pyproject.toml` it is what is in it that counts, without the signature: Flower rewrites the file.

    Raises:
        UserError: there is something else, whose contents are nobody's to sign.
    """
    for folder, folders, files in os.walk(app):
        for path in (Path(folder, entry) for entry in (*folders, *files)):
            inside = path.relative_to(app).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise UserError(f"{path}: what is signed holds files and folders, and no links")
            if path.is_dir():
                yield inside, "folder"
            elif inside == "pyproject.toml":
                yield inside, _digest(_settings(path.read_bytes()))
            else:
                yield inside, _digest(path.read_bytes())


def _settings(text: bytes) -> bytes:
    """The settings of an app without its signature, and without those that Flower leaves out."""
    try:
        told = tomllib.loads(text.decode())
        flower = told.get("tool", {}).get("flwr", {})
        flower.pop("federations", None)
        flower.get("app", {}).get("config", {}).pop("signature", None)
        return json.dumps(told, sort_keys=True, default=str).encode()
    except (AttributeError, ValueError):
        return text


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
