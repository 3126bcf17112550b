"""What workers run on: the device, its precision, and how many of them a GPU holds.

Ray counts GPUs in ten-thousandths. A share of `floor(10000 / n) / 10000` is one that n workers have on a GPU and
no more than n; 1/6 is not, as Ray rounds it up.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fedlora.errors import SettingError

MARGIN = 0.1  # of a GPU's free memory, which several workers on it leave: merges, fragments, longer answers

CONTEXT = 2**29  # bytes that CUDA and its kernels take for each process, which torch does not count

UNITS = 10_000  # that Ray counts a GPU in

MOST = 100  # workers on a GPU: Ray's units tell the shares of more than that no longer apart

INSTEAD = "write 0, or auto, which takes one where it is"

LOWER = "lower clients.micro_batch_size, data.max_length, or engine.workers where several share it"


class Node(NamedTuple):
    """A machine."""

    gpus: int
    cores: int


class Measured(NamedTuple):
    """A GPU and a worker on it, in bytes."""

    free: int  # of the GPU, but for what others than this worker hold
    worker: int  # the most that the worker held


def device(asked: str) -> str:
    """A torch device, for `auto` a GPU where there is one.

    Raises:
        SettingError: a GPU is asked for, and there is none.
    """
    import torch

    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError("engine.gpus_per_worker", f"asks for a GPU, and torch finds none: {INSTEAD}")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def precision(asked: str, device: str) -> str:
    """The precision of training, for `auto` bfloat16 where the hardware multiplies it."""
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            flags = next((line.split() for line in stream if line.startswith("flags")), [])
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(workers: int) -> float:
    """The share of a GPU of each of at most `MOST` workers on it, which Ray places and no more."""
    return UNITS // workers / UNITS


def held(share: float) -> int:
    """Workers that Ray places on a GPU, each with a share of it, at most 1."""
    return UNITS // max(round(share * UNITS), 1)


def room(nodes: Sequence[Node], each: int, threads: int) -> int:
    """Workers that nodes have cores for, at most `each` on a GPU; 0 of them use none."""
    return sum(min(node.gpus * each if each else node.cores, node.cores // threads) for node in nodes)


def pack(
    found: Measured, nodes: Sequence[Node], *, threads: int, cohort: int, workers: int | None = None
) -> tuple[int, float]:
    """How many workers to start, and the share of a GPU that each takes.

    As many as memory and cores allow and as there are clients for, evenly over the GPUs. Several on one leave
    `MARGIN` of it free; one by itself may take all.

    Args:
        found: of one of the GPUs, which are alike.
        nodes: with GPUs or without.
        threads: of a worker, each on a core.
        cohort: clients of a round.
        workers: as many as that, if they fit; None: as said.

    Raises:
        SettingError: none fits, or not as many as asked, with what to lower.
    """
    if found.worker > found.free:
        raise SettingError(
            "clients.micro_batch_size",
            f"a worker takes {_gib(found.worker)}, and {_gib(found.free)} of its GPU are free: lower it, or "
            "data.max_length",
        )
    most = min(max(int(found.free * (1 - MARGIN)) // found.worker, 1), MOST)
    if not (there := room(nodes, most, threads)):
        raise SettingError("engine.threads", f"no node with a GPU has {threads} cores for a worker: lower it")
    if workers is not None and workers > there:
        raise SettingError(
            "engine.workers",
            f"{workers} of {_gib(found.worker)} do not fit: a GPU has {_gib(found.free)}, and memory and cores "
            f"suffice for {there}; lower it, or clients.micro_batch_size",
        )
    wanted = workers or min(there, cohort)
    return wanted, share(next(n for n in range(1, most + 1) if room(nodes, n, threads) >= wanted))


def measure(rehearse: Callable[[], None]) -> Measured:
    """What a worker takes of its GPU at most, by trying; it has loaded, and serves clients as before.

    Args:
        rehearse: what a worker does at most.
    """
    import torch

    rehearse()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    return Measured(
        free=free + torch.cuda.memory_reserved() + CONTEXT,
        worker=torch.cuda.max_memory_reserved() + CONTEXT,
    )


@contextlib.contextmanager
def on_gpu(what: str) -> Iterator[None]:
    """Say what to lower where a GPU is too small.

    Args:
        what: has no room on it.

    Raises:
        SettingError: it has not.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingError("engine.gpus_per_worker", f"the GPU is too small for {what}: {LOWER}") from error


def reason(error: Exception) -> str:
    """What is reported of a client that failed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"OutOfMemoryError: the GPU is full: {LOWER}"
    return f"{type(error).__name__}: {error}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def settle() -> None:
    """Set what libraries read once, before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # rows have a length of their own each: at 1,024, gigabytes in time
    keep_memory()


def keep_memory() -> None:
    """Keep what a step frees for the next one: else glibc gives it back, and each step pays for pages again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        adjust = ctypes.CDLL(None).mallopt
        adjust(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the most it takes
        adjust(-1, 2**30)  # M_TRIM_THRESHOLD
