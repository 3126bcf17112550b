"""Atomic save and load of what a run needs to go on: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is written beside the last one and takes its name; its manifest, with a checksum of every file, is
written last, so that its existence means that the rest is whole. The one before is kept: where the newest is
damaged a run goes on from that. No random state is in it, as all randomness is derived from the seed, the
round and the client.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import factors, traffic
from fedlora.adapter import Adapter, Change
from fedlora.errors import UserError
from fedlora.returned import finite, plain

_MANIFEST = "manifest.json"
_FILES = {"adapter.safetensors", "strategy.safetensors", "state.json"}
# Before the names of such tensors, beside the strategy's.
_UNDER_WAY, _BEST, _MOMENTS = "under_way/", "best/", "clients.moments/"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round.

    Attributes:
        round: the last one that finished.
        adapter: every tensor of the layout.
        strategy: what `Strategy.state` gave: arrays and JSON values by name.
        under_way: tensors of updates that have not arrived yet, where rounds are not in step.
        best: the adapter of the best round so far, where one is kept.
        moments: of each tensor, where clients' optimisers begin at their mean.
        words: JSON values of the loop, such as the totals so far.
        origin: what it belongs to, as JSON values: the resolved scenario, the versions, the ledger's position.
    """

    round: int
    adapter: Adapter
    strategy: Mapping[str, Any]
    words: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)
    under_way: Adapter = field(default_factory=dict)
    best: Adapter = field(default_factory=dict)
    moments: Adapter = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Make this the checkpoint in `folder`, and keep the one before beside it as `.old`.

    At every moment one whole checkpoint is there.
    """
    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    arrays = {k: v for k, v in checkpoint.strategy.items() if isinstance(v, np.ndarray)}
    state = {
        "round": checkpoint.round,
        "strategy": {k: plain(v) for k, v in checkpoint.strategy.items() if k not in arrays},
        "words": finite(checkpoint.words),
        "origin": dict(checkpoint.origin),
    }
    write_tensors(new / "adapter.safetensors", checkpoint.adapter)
    apart = ((_UNDER_WAY, checkpoint.under_way), (_BEST, checkpoint.best), (_MOMENTS, checkpoint.moments))
    for prefix, tensors in apart:
        arrays |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    write_tensors(new / "strategy.safetensors", arrays)
    _write(new / "state.json", json.dumps(state).encode())
    sums = {p.name: _digest(p) for p in sorted(new.iterdir())}
    _write(new / _MANIFEST, json.dumps(sums).encode())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)


def load(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a line in the log says where that is not the last that was saved.

    Returns:
        None where none was ever finished.

    Raises:
        UserError: those that are there are damaged.
    """
    new, old = _beside(folder)
    for place in (folder, new, old):
        if (found := _whole(place)) is not None:
            if place != folder:
                told = "is damaged" if folder.exists() else "is missing"
                logger.warning("%s: %s; going on after round %d, from %s", folder, told, found.round, place.name)
            return found
    if folder.exists() or old.exists():
        raise UserError(f"{folder}: no whole checkpoint to resume from; start again in another folder with --out")
    return None


def _beside(folder: Path) -> tuple[Path, Path]:
    """The checkpoint that is being written, and the one before the last."""
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _whole(folder: Path) -> Checkpoint | None:
    """The checkpoint in one folder; None where any of it is not as it was written."""
    try:
        if (folder / _MANIFEST).stat().st_size > 4096:
            return None
        sums = json.loads((folder / _MANIFEST).read_bytes())
        if set(sums) != _FILES or any(_digest(folder / name) != sums[name] for name in _FILES):
            return None
        state = json.loads((folder / "state.json").read_bytes())
        words, origin, values = (dict(state[key]) for key in ("words", "origin", "strategy"))
        if type(state["round"]) is not int:
            return None
        arrays = read_tensors(folder / "strategy.safetensors")
        under_way, best, moments = (
            {n.removeprefix(prefix): arrays.pop(n) for n in list(arrays) if n.startswith(prefix)}
            for prefix in (_UNDER_WAY, _BEST, _MOMENTS)
        )
        return Checkpoint(
            round=state["round"],
            adapter=read_tensors(folder / "adapter.safetensors"),
            strategy={**values, **arrays},
            words=words,
            origin=origin,
            under_way=under_way,
            best=best,
            moments=moments,
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(file.read_bytes())
    except (SafetensorError, KeyError, OverflowError) as error:
        raise ValueError(f"no safetensors file: {error}") from error


def write_tensors(file: Path, arrays: Mapping[str, NDArray[Any]], mode: int = 0o666) -> None:
    """Write tensors as safetensors, and wait until they are on disk.

    Args:
        file: to write.
        arrays: by name.
        mode: of a new file, less what the process takes from all of its files.

    Raises:
        OSError: they could not be written, where `safetensors.numpy.save_file` has an error of its own.
    """
    from safetensors.numpy import save

    _write(file, save(_rows_first(arrays)), mode)


def _rows_first(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same in C order: safetensors writes a transposed array's memory as it lies, under its shape."""
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _write(path: Path, data: bytes, mode: int = 0o666) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        try:
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
        except OSError as error:
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"{folder}: another run has begun there meanwhile: name another folder") from error
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


class Personal:
    """What stays with each client of a simulation: a file for each client and round.

    The file of a round is written before the round is known to have counted, and a run may go on from the
    checkpoint before the last. So `load` names the round, and three files are kept: a round that is run again
    starts from what it started from. Nobody but their owner can read them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: int, before: int) -> Adapter:
        """The tensors of a client after its last round before the one given; none before its first."""
        rounds = [r for r in self._rounds(client) if r < before]
        return read_tensors(self._file(client, rounds[-1])) if rounds else {}

    def save(self, client: int, round: int, tensors: Adapter) -> None:
        """Keep a client's tensors; drops those of three rounds ago."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{client}.{round}.part"
        part.unlink(missing_ok=True)  # of an interruption: its mode would stay
        write_tensors(part, tensors, 0o600)
        part.replace(self._file(client, round))
        for old in [r for r in self._rounds(client) if r < round][:-2]:
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
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(len(self.changes))
        part = file.with_suffix(".part")
        written = {m: (factors.single(left), factors.single(right)) for m, (left, right) in change.items()}
        write_tensors(part, {f"{m}/{i}": side for m, pair in written.items() for i, side in enumerate(pair)})
        part.replace(file)
        self._add(written)
        return written

    def restore(self, count: int) -> None:
        """Read the first merges of an interrupted run.

        Raises:
            UserError: one is missing or broken.
        """
        for number in range(count):
            try:
                sides = read_tensors(self._file(number))
                modules = sorted({name.rsplit("/", 1)[0] for name in sides})
                self._add({module: (sides[f"{module}/0"], sides[f"{module}/1"]) for module in modules})
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{self._file(number)}: cannot be read ({error}); the run cannot go on") from error

    def bytes_since(self, count: int) -> int:
        """What a client that has the first `count` merges is sent: the rest, or the dense change if less."""
        dense = sum(4 * int(np.prod(shape)) for shape in self.shapes.values())
        missed = sum(self._bytes[count:])
        return min(missed, dense)

    def total(self, count: int | None = None) -> Change:
        """The first merges, or all, as one change."""
        changes = self.changes[:count]
        modules = {module for change in changes for module in change}
        return {
            m: factors.stack([(1.0, *change[m]) for change in changes if m in change]) for m in sorted(modules)
        }

    def _add(self, change: Change) -> None:
        self.changes.append(change)
        sides = {f"{m}/{i}": side for m, pair in change.items() for i, side in enumerate(pair)}
        self._bytes.append(traffic.arrays_bytes({name: side.shape for name, side in sides.items()}))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number + 1:05d}.safetensors"
