"""Atomic save and load of what a run needs to go on: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is written beside the last one and renamed over it; its manifest, with a checksum of every
file, is written last, so that its existence means that the rest is whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter
from fedlora.errors import UserError

_MANIFEST = "manifest.json"
_FILES = {"adapter.safetensors", "strategy.safetensors", "state.json"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round.

    Attributes:
        round: the last one that finished.
        adapter: every tensor of the layout.
        strategy: what `Strategy.state` gave: arrays and JSON values by name.
        words: JSON values of the loop, such as the totals so far.
    """

    round: int
    adapter: Adapter
    strategy: Mapping[str, Any]
    words: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder`; at every moment one whole checkpoint is there."""
    from safetensors.numpy import save_file

    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    arrays = {k: v for k, v in checkpoint.strategy.items() if isinstance(v, np.ndarray)}
    values = {k: v for k, v in checkpoint.strategy.items() if k not in arrays}
    _write(new / "adapter.safetensors", lambda p: save_file(_rows_first(checkpoint.adapter), p))
    _write(new / "strategy.safetensors", lambda p: save_file(_rows_first(arrays), p))
    state = {"round": checkpoint.round, "strategy": values, "words": dict(checkpoint.words)}
    _write(new / "state.json", lambda p: p.write_text(json.dumps(state)))
    sums = {p.name: _digest(p) for p in sorted(new.iterdir())}
    _write(new / _MANIFEST, lambda p: p.write_text(json.dumps(sums)))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """The newest whole checkpoint.

    Raises:
        UserError: there is none.
    """
    from safetensors.numpy import load_file

    for place in (folder, folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")):
        if _whole(place):
            state = json.loads((place / "state.json").read_text())
            arrays: dict[str, NDArray[Any]] = load_file(place / "strategy.safetensors")
            return Checkpoint(
                round=state["round"],
                adapter=load_file(place / "adapter.safetensors"),
                strategy={**state["strategy"], **arrays},
                words=state["words"],
            )
    raise UserError(f"{folder}: no whole checkpoint to resume from; start again in another folder with --out")


def _whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
        return set(sums) == _FILES and all(_digest(folder / name) == sums[name] for name in _FILES)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _rows_first(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same in C order: safetensors writes a transposed array's memory as it lies, under its shape."""
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _write(path: Path, write: Any) -> None:
    write(path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
