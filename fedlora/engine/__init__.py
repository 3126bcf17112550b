"""Where clients run; each engine is a Flower `Grid`."""

import os

from fedlora.engine.base import Engine
from fedlora.engine.worker import Description, Replies, Report, Setup, Worker
from fedlora.scenario import Scenario

__all__ = ["Description", "Engine", "Replies", "Report", "Setup", "Worker", "make", "precision", "threads"]

SMALL = 3000  # examples trained on in a run: below that, starting processes costs more than it saves


def threads(scenario: Scenario) -> int:
    """Torch threads of a worker. One unless asked: then no result depends on how many cores there are."""
    return 1 if scenario.engine.threads == "auto" else scenario.engine.threads


def precision(scenario: Scenario) -> str:
    """The precision of training: bfloat16 where the hardware multiplies it, unless asked otherwise."""
    if scenario.engine.precision != "auto":
        return scenario.engine.precision
    if scenario.engine.gpus_per_worker:
        return "bf16"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            flags = next((line.split() for line in stream if line.startswith("flags")), [])
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def make(scenario: Scenario, address: str | None = None) -> Engine:
    """The engine that a scenario asks for; `auto` runs small work in this process, other work on Ray.

    Its processes start at once, and wait for `Engine.start`.
    """
    told, clients = scenario.engine, scenario.clients
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(max(cores // threads(scenario), 1), clients.cohort_size)
    workers = most if told.workers == "auto" else told.workers
    work = scenario.rounds * clients.cohort_size * clients.local_steps * clients.batch_size
    alone = address is None and (workers == 1 or work < SMALL)
    if told.kind == "inline" or (told.kind == "auto" and alone):
        from fedlora.engine.inline import InlineEngine

        return InlineEngine(clients.total)
    from fedlora.engine.ray import RayEngine

    return RayEngine(
        clients.total,
        workers=workers,
        threads=threads(scenario),
        gpus_per_worker=told.gpus_per_worker,
        address=address,
    )
