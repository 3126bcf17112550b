"""Atomic save and load of what a run needs to go on: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is written beside the last one and renamed over it; its manifest, with a checksum of every
file, is written last, so that its existence means that the rest is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import factors, wire
from fedlora.adapter import Adapter, Change
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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is whole, or not at all; an empty one there gives way.

    Raises:
        UserError: it cannot be made where it should be.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        yield new
        new.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


class Personal:
    """What stays with each client of a simulation: a file for each client and round.

    The file of a round is written before the round is known to have counted. So `load` names the round,
    and the file before the last is kept: a round that is run again starts from what it started from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: int, before: int) -> Adapter:
        """The tensors of a client after its last round before the one given; none before its first."""
        from safetensors.numpy import load_file

        rounds = [r for r in self._rounds(client) if r < before]
        return load_file(self._file(client, rounds[-1])) if rounds else {}

    def save(self, client: int, round: int, tensors: Adapter) -> None:
        """Keep a client's tensors; drops those of two rounds ago."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{client}.{round}.part"
        save_file(_rows_first(tensors), part)
        part.replace(self._file(client, round))
        for old in [r for r in self._rounds(client) if r < round][:-1]:
            self._file(client, old).unlink()

    def save_trip(self, client: int, round: int, tensors: Adapter, weight: float) -> None:
        """Keep what a client trained until the later trips of the round."""
        self.save(client, round, {**tensors, "weight": np.array([weight], np.float64)})

    def load_trip(self, client: int, round: int) -> tuple[Adapter, float]:
        """What the client trained in the first trip of the round, and its weight."""
        tensors = self.load(client, before=round + 1)
        return tensors, float(tensors.pop("weight")[0])

    def _file(self, client: int, round: int) -> Path:
        return self.folder / f"{client}.{round}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        return sorted(int(file.name.split(".")[1]) for file in self.folder.glob(f"{client}.*.safetensors"))


class Merges:
    """All that a run folded into the base, in order: a file for each merge, in the run folder.

    Replaying them gives the base bit for bit, on a worker that starts late and after a restart.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Merges of a run.

        Args:
            folder: of the files.
            shapes: of the weight of each layer, (out, in).
        """
        self.folder, self.shapes = folder, shapes
        self.changes: list[Change] = []
        self._bytes: list[int] = []

    def __len__(self) -> int:
        return len(self.changes)

    def append(self, change: Change) -> Change:
        """Write a merge down before anything uses it; gives it back as it was written, in float32."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(len(self.changes))
        part = file.with_suffix(".part")
        written = {m: (factors.single(left), factors.single(right)) for m, (left, right) in change.items()}
        save_file(
            _rows_first({f"{m}/{i}": side for m, pair in written.items() for i, side in enumerate(pair)}), part
        )
        part.replace(file)
        self._add(written)
        return written

    def restore(self, count: int) -> None:
        """Read the first merges of an interrupted run.

        Raises:
            UserError: one is missing or broken.
        """
        from safetensors.numpy import load_file

        for number in range(count):
            try:
                sides = load_file(self._file(number))
            except Exception as error:  # safetensors raises what its parser does
                raise UserError(f"{self._file(number)}: cannot be read ({error}); the run cannot go on") from error
            modules = sorted({name.rsplit("/", 1)[0] for name in sides})
            self._add({module: (sides[f"{module}/0"], sides[f"{module}/1"]) for module in modules})

    def bytes_since(self, count: int) -> int:
        """What a client that has the first `count` merges is sent: the rest, or the dense change if less."""
        dense = sum(4 * int(np.prod(shape)) for shape in self.shapes.values())
        missed = sum(self._bytes[count:])
        return min(missed, dense)

    def total(self) -> Change:
        """All merges as one change."""
        modules = {module for change in self.changes for module in change}
        return {
            m: factors.stack([(1.0, *change[m]) for change in self.changes if m in change])
            for m in sorted(modules)
        }

    def _add(self, change: Change) -> None:
        self.changes.append(change)
        sides = {f"{m}/{i}": side for m, pair in change.items() for i, side in enumerate(pair)}
        self._bytes.append(wire.arrays_bytes({name: side.shape for name, side in sides.items()}))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number + 1:05d}.safetensors"
