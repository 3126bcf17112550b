"""The folder where what is made once of data is kept, and how a part of it is made."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedlora.errors import UserError

_ELSEWHERE = "name a folder that can be written, FEDLORA_CACHE=/some/folder"


def cache_folder() -> Path:
    """Where tokenised data is kept: `$FEDLORA_CACHE`, else `$XDG_CACHE_HOME/fedlora`, else `~/.cache/fedlora`."""
    if given := os.environ.get("FEDLORA_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "fedlora"
    try:
        return Path.home() / ".cache" / "fedlora"
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep tokenised data in: {_ELSEWHERE}") from error


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made once: it appears whole or not at all, also when two runs make it at once.

    Args:
        folder: to make.
        make: writes into a folder that takes its place.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        what = f"{folder.parent}: tokenised data cannot be kept there: {error.strerror or error}"
        raise UserError(f"{what}: {_ELSEWHERE}") from error
    try:
        make(temporary)
        temporary.chmod(0o700)
        temporary.replace(folder)
    except OSError:
        if not folder.exists():  # else another run was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
