"""Who submitted a run: an ssh key signs the scenario and the code that travels with it.

Flower's SuperLink takes a run from whoever reaches it. A site that names `accept.submitters` trains only for a
run that one of those keys signed, whatever the server says.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.errors import UserError

_CONTEXT = b"fedlora run 1\n"  # what is signed is for nothing else


def sign(key_file: Path, scenario: Mapping[str, Any], app: Path) -> str:
    """The signature of a run.

    Args:
        key_file: an Ed25519 private key of OpenSSH, without a passphrase.
        scenario: resolved.
        app: folder of the Flower app, whose Python files are signed too.

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
    return base64.b64encode(key.sign(_message(scenario, app))).decode()


def signed(signature: str, keys: Iterable[str], scenario: Mapping[str, Any], app: Path) -> bool:
    """Whether one of some public keys, as in an `.pub` file, made a signature of a run.

    Raises:
        UserError: a key is none.
    """
    message = _message(scenario, app)
    for text in keys:
        try:
            key = load_ssh_public_key(text.encode())
        except Exception as error:  # as above
            raise UserError(f"accept.submitters: {text:.30}... is no ssh public key: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(f"accept.submitters: {text:.30}... is not an Ed25519 key")
        try:
            key.verify(base64.b64decode(signature), message)
        except (InvalidSignature, ValueError):
            continue
        return True
    return False


def _message(scenario: Mapping[str, Any], app: Path) -> bytes:
    files = sorted(file for file in app.rglob("*.py") if file.is_file())
    code = {str(f.relative_to(app)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return _CONTEXT + json.dumps({"scenario": scenario, "code": code}, sort_keys=True).encode()
