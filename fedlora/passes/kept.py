"""Where it is kept what the frozen layers make of each example (`fedlora.passes.prefix`).

In a simulation on disk, memory-mapped: all workers, rounds and runs that have the same base, layers, tokens,
precision and machine share it. At a site in memory alone, where it fits. The examples of a dataset pass in pieces
that depend on the dataset alone, so that no result depends on who asked first.
"""

import contextlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.data.cache import cached
from fedlora.data.store import Dataset, Examples
from fedlora.privacy import replay

if TYPE_CHECKING:
    from fedlora.scenario import Scenario
    from fedlora.tasks.contract import Task

MEMORY = 256 * 2**20  # bytes that are kept in a worker's memory, where there is no folder for them
DISK = 8 * 2**30  # bytes of all folders: the one that was used longest ago goes first
RECENT = 86_400.0  # seconds: a folder that was used within them stays

_TOKENS = {"cpu": 2048, "cuda": 65_536}  # of a pass
_JOB = 64  # passes of a piece of work

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Some passes of one part of a dataset."""

    half: str  # `train`, `test` or `validation`
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be on disk before a run begins.

    Attributes:
        folder: named by all that it depends on.
        shapes: of each part, (tokens, width).
        types: of its numbers.
        pieces: of the work, which workers share.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, int]]
    types: Mapping[str, str]
    pieces: Sequence[Piece]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(int(np.prod(s)) * np.dtype(self.types[half]).itemsize for half, s in self.shapes.items())

    def make(self, passed: Callable[[Path], None]) -> None:
        """Have it made, whole or not at all; nothing where it is there, or has no room.

        Args:
            passed: lets workers fill the arrays in a folder, all pieces.
        """
        if self.folder.exists():
            with contextlib.suppress(OSError):
                os.utime(self.folder)  # it was used
            return
        try:
            fits = _room(self.folder.parent, self.size)
        except OSError:
            fits = False
        if not fits:
            logger.warning("no room for what the frozen layers make of the examples: it is computed each time")
            return

        def write(to: Path) -> None:
            for half, shape in self.shapes.items():
                np.lib.format.open_memmap(to / f"{half}.npy", "w+", np.dtype(self.types[half]), shape)
            passed(to)

        try:
            cached(self.folder, write)
        except OSError as error:
            logger.warning("what the frozen layers make of the examples is not kept: %s", error.strerror or error)


class Kept:
    """What is kept of the examples of a worker's dataset."""

    def __init__(self, task: "Task", dataset: Dataset, root: Path | None, threads: int) -> None:
        """For a loaded model.

        Args:
            task: whose model has layers below the lowest factors.
            dataset: of the run.
            root: of the folders; None: in memory, where it fits.
            threads: of torch, which may decide the last bits.
        """
        self.task, self.dataset, self.root, self.threads = task, dataset, root, threads
        self.width = int(task.model.get_base_model().config.get_text_config().hidden_size)
        self._halves = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
        self._open: dict[str, NDArray[Any]] = {}

    @cached_property
    def folder(self) -> Path | None:
        """Where it is kept; None: in memory."""
        if self.root is None:
            return None
        import torch

        task, blocks = self.task, self.task.prefix.blocks if self.task.prefix else 0
        chip = (
            torch.cuda.get_device_name() if task.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        )
        machine = (platform.machine(), chip, task.device.type, task.precision, self.threads)
        told = (task.base_fingerprint(), blocks, self.dataset.folder.name, replay.versions(), machine)
        return self.root / replay.digest(0, *told)[:32]

    @cached_property
    def wanted(self) -> Wanted | None:
        """What is to be on disk; None where nothing is."""
        if self.folder is None:
            return None
        halves = {half: examples for half, examples in self._halves.items() if len(examples)}
        pieces = [
            Piece(half, start, min(start + _JOB, count))
            for half, examples in halves.items()
            for count in (len(self._passes(examples)),)
            for start in range(0, count, _JOB)
        ]
        return Wanted(
            folder=self.folder,
            shapes={half: (int(examples.offsets[-1]), self.width) for half, examples in halves.items()},
            types={half: self._type(half) for half in halves},
            pieces=pieces,
        )

    def of(self, examples: Examples) -> NDArray[Any] | None:
        """What is kept of some of the dataset's examples, (tokens, width); None where nothing is."""
        half = next((half for half, held in self._halves.items() if held is examples), None)
        if half is None:
            return None
        if half not in self._open:
            if self.folder is None:
                self._in_memory(half, examples)
            elif (file := self.folder / f"{half}.npy").exists():
                self._open[half] = np.load(file, mmap_mode="r", allow_pickle=False)
        return self._open.get(half)

    def fill(self, to: Path, piece: Piece) -> None:
        """Pass some examples through the frozen layers, into the arrays of a folder."""
        array = np.load(to / f"{piece.half}.npy", mmap_mode="r+", allow_pickle=False)
        self._fill(array, piece)
        array.flush()

    def _in_memory(self, half: str, examples: Examples) -> None:
        """Fill an array, if there is room for it."""
        shape = (int(examples.offsets[-1]), self.width)
        size = sum(array.nbytes for array in self._open.values()) + int(np.prod(shape)) * 4
        if size <= MEMORY and len(examples):
            array = np.empty(shape, np.dtype(self._type(half)))
            self._fill(array, Piece(half, 0, len(self._passes(examples))))
            self._open[half] = array

    def _type(self, half: str) -> str:
        """Training goes in its precision, which numpy has not; evaluation in float32."""
        return "uint16" if half == "train" and self.task.precision == "bf16" else "float32"

    def _fill(self, array: NDArray[Any], piece: Piece) -> None:
        import torch

        half = piece.half == "train" and self.task.precision == "bf16"
        examples = self._halves[piece.half]
        for rows in self._passes(examples)[piece.start : piece.stop]:
            out = self.task.below(examples, rows, half)[0].cpu().contiguous()
            flat = (out.to(torch.bfloat16).view(torch.uint16) if half else out.float()).numpy()
            ends = np.cumsum([0, *examples.lengths(rows)])
            for row, start, stop in zip(rows, ends[:-1], ends[1:], strict=True):
                array[examples.offsets[row] : examples.offsets[row + 1]] = flat[start:stop]

    def _passes(self, examples: Examples) -> list[NDArray[np.int64]]:
        """The rows of each pass: like lengths together, about so many tokens."""
        lengths = examples.lengths(np.arange(len(examples)))
        order = np.argsort(lengths, kind="stable")
        which = np.cumsum(lengths[order]) // _TOKENS.get(self.task.device.type, 2048)
        return np.split(order, np.flatnonzero(np.diff(which)) + 1) if len(order) else []


def pays(scenario: "Scenario", dataset: Dataset) -> bool:
    """Whether a run passes over its examples often enough: half of them at least, in the mean."""
    told = scenario.clients
    sizes = dataset.unit_sizes()  # of all who are here
    step = sum(count * told.batch(size) for size, count in sizes.items() if size)
    passes = scenario.rounds * told.local_steps * told.cohort_size / told.total * step
    return 2 * passes >= len(dataset.train)


def _room(root: Path, size: int) -> bool:
    """Whether so many bytes may be kept; folders that nobody used for a day make way."""
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
    if size > DISK or size > 0.5 * shutil.disk_usage(root).free:
        return False
    there = sorted(_folders(root), key=lambda found: found[1])
    held = sum(found[2] for found in there)
    for folder, used, bytes_ in there:
        if held + size <= DISK:
            return True
        if time.time() - used > RECENT:
            shutil.rmtree(folder, ignore_errors=True)
            held -= bytes_
    return held + size <= DISK


def _folders(root: Path) -> Iterator[tuple[Path, float, int]]:
    """Each folder, when it was last used, and its bytes."""
    for folder in root.iterdir():
        try:
            yield folder, folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
        except OSError:  # another run removed it
            continue
