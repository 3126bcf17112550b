"""`fedlora site backup`: what a site must not lose, in one file, also while its worker runs.

A worker holds the locks of its ledgers for as long as it is up, so a copy beside it is taken without them. It is
whole all the same:

- ledgers and the log grow by whole lines alone. A copy has their lines up to the last whole one, checked, and a
  head of its own;
- what is bought is copied first, then the runs' ledgers, then the account, in the reverse of the order in which
  they are written: all that a copy holds is paid for in its account;
- every other file is replaced as a whole.

Answers to a round are left out: under masks one is forgotten before a sum of it may be opened, and a copy would
give it again. So are caches, locks and what is not the site's.
"""

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fedlora.deploy import history, sealed
from fedlora.deploy.answers import ANSWERS
from fedlora.deploy.site import Site, load
from fedlora.deploy.state import RUN, SURVEYS
from fedlora.errors import UserError
from fedlora.privacy import chain, ledger

MANIFEST = "backup.json"  # the last file: without it a backup is not whole
ACCOUNT = "ledger/privacy.jsonl"
KEY = "held.key"
_PLAIN = (KEY, SURVEYS, "site.log")  # beside records and runs
_MOST = 2**40  # bytes of a backup


@dataclass(frozen=True)
class Backup:
    """A backup that was written.

    Attributes:
        file: where it is; None where it went elsewhere.
        files: in it.
        rounds: lines of the account in it.
        sealed: whether it is encrypted.
    """

    file: Path | None
    files: int
    rounds: int
    sealed: bool


def backup(file: Path, out: Path | BinaryIO, secret: Path | None = None) -> Backup:
    """Copy a site's state into one file, which its owner alone can read.

    Args:
        file: the site's YAML file.
        out: the file to make, or an open one, such as a pipe.
        secret: a file with a passphrase or key to encrypt it under; None: it is not encrypted.

    Raises:
        UserError: there is no state, a record in it is damaged, or the file cannot be written.
    """
    site, key = load(file), None if secret is None else sealed.read_secret(secret)
    state = site.folder
    if not state.is_dir():
        raise UserError(f"{state}: no such folder: there is nothing to keep yet")
    try:
        return _written(site, out, key) if isinstance(out, Path) else _copy(site, out, key)
    except OSError as error:
        raise UserError(
            f"{error.filename or 'the backup'}: {error.strerror or error}; nothing was kept"
        ) from error


def _written(site: Site, out: Path, key: bytes | None) -> Backup:
    """Copy into a file, which is there whole or not at all."""
    if out.absolute().is_relative_to(site.folder.absolute()):
        raise UserError(f"{out}: lies in the state folder, and would be lost with it; name another place by --out")
    if out.exists():
        raise UserError(f"{out}: is there already; name another file by --out")
    part = out.with_name(f".{out.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            made = _copy(site, stream, key)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return replace(made, file=out)


def _copy(site: Site, to: BinaryIO, key: bytes | None) -> Backup:
    digests: dict[str, str] = {}
    rounds = 0
    with _writing(to, key) as archive:
        for name, data in _contents(site.folder):
            digests[name] = hashlib.sha256(data).hexdigest()
            rounds = data.count(b"\n") if name == ACCOUNT else rounds
            _add(archive, name, data)
        told = {"fedlora": version("fedlora"), "site": site.name, "made": time.time(), "files": digests}
        _add(archive, MANIFEST, json.dumps(told).encode())
    return Backup(None, len(digests), rounds, key is not None)


def unpack(file: Path, to: Path, secret: Path | None = None) -> dict[str, Any]:
    """Write the files of a backup into a folder, each checked; gives what the backup says of itself.

    Args:
        file: the backup.
        to: the folder.
        secret: the file that it was encrypted under.

    Raises:
        UserError: it is no whole backup, or the secret is another.
    """
    digests: dict[str, str] = {}
    told: dict[str, Any] = {}
    try:
        with file.open("rb") as stream:
            source: Any = stream
            if stream.peek(len(sealed.MARK)).startswith(sealed.MARK):  # it may be a pipe, which goes back nowhere
                if secret is None:
                    raise UserError(f"{file}: is encrypted: name the file of its passphrase or key by --secret")
                source = sealed.Opening(file, stream, sealed.read_secret(secret))
            with tarfile.open(fileobj=source, mode="r|") as archive:
                for member in archive:
                    data = _read(archive, member, file)
                    if member.name == MANIFEST:
                        told = json.loads(data)
                        continue
                    digests[member.name] = hashlib.sha256(data).hexdigest()
                    place = to.joinpath(*PurePosixPath(member.name).parts)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as put:
                        put.write(data)
        whole = told["files"] == digests and isinstance(told["site"], str) and isinstance(told["made"], float)
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no whole backup of a site") from error
    except OSError as error:
        raise UserError(f"{error.filename or file}: {error.strerror or error}") from error
    if not whole:
        raise UserError(f"{file}: is no whole backup of a site")
    return told


def records(folder: Path) -> list[str]:
    """The ledgers under a state folder, by their path in it: the account first, then those of runs."""
    found = [file for file in (folder / "runs").glob("*/privacy.*") if file.suffix in (".jsonl", ".head")]
    runs = sorted({f"runs/{file.parent.name}/privacy.jsonl" for file in found if RUN.fullmatch(file.parent.name)})
    account = folder / ACCOUNT
    return [*([ACCOUNT] if account.exists() or chain.head_of(account).exists() else []), *runs]


def _contents(state: Path) -> Iterator[tuple[str, bytes]]:
    """Every file that is kept, by its path in the state folder, in the order in which they are to be read.

    Raises:
        UserError: a record is damaged.
    """
    others = [state / name for name in _PLAIN]
    for run in sorted((state / "runs").glob("*")):
        if RUN.fullmatch(run.name) and run.is_dir() and not run.is_symlink():
            others += sorted(run.rglob("*"))
    for path in others:
        if not _bought(path):
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # of a round that is over by now
            continue
        yield path.relative_to(state).as_posix(), data[: data.rfind(b"\n") + 1] if path.suffix == ".log" else data
    yield from _record(state, history.NAME, history.read(state / history.NAME))
    for name in reversed(records(state)):
        yield from _record(state, name, ledger.verified(state / name))


def _bought(path: Path) -> bool:
    """Whether a file is one that is kept as it is."""
    name = path.name
    left_out = name.startswith((".", ANSWERS)) or name.endswith(".part")
    return not left_out and path.stem != "privacy" and path.is_file() and not path.is_symlink()


def _record(state: Path, name: str, lines: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    if lines:
        yield name, "".join(json.dumps(line) + "\n" for line in lines).encode()
        yield str(Path(name).with_suffix(".head")), f"{len(lines)} {lines[-1]['chain']}\n".encode()


@contextmanager
def _writing(stream: BinaryIO, key: bytes | None) -> Iterator[tarfile.TarFile]:
    to: Any = stream if key is None else sealed.Sealing(stream, key)
    with tarfile.open(fileobj=to, mode="w|") as archive:
        yield archive
    if key is not None:
        to.close()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    archive.addfile(member, io.BytesIO(data))


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    """What a member holds, if it is one that a backup has.

    Raises:
        UserError: it is not.
    """
    parts = PurePosixPath(member.name).parts
    known = member.name in (MANIFEST, *_PLAIN, history.NAME, "history.head", ACCOUNT, "ledger/privacy.head")
    known |= len(parts) > 2 and parts[0] == "runs" and bool(RUN.fullmatch(parts[1]))
    stream = archive.extractfile(member) if member.isfile() and known and ".." not in parts else None
    if stream is None or member.size > _MOST:
        raise UserError(f"{file}: holds {member.name!r:.100}, which no backup of a site does")
    return stream.read()
