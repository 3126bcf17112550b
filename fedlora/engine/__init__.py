"""Where clients run; each engine is a Flower `Grid`."""

import os

from fedlora.engine.base import EVALUATION_CHUNK, Engine
from fedlora.engine.intake import Replies, Report
from fedlora.engine.worker import Description, Setup, Worker
from fedlora.scenario import Scenario

__all__ = [
    "EVALUATION_CHUNK",
    "Description",
    "Engine",
    "Replies",
    "Report",
    "Setup",
    "Worker",
    "in_process",
    "make",
    "precision",
    "threads",
    "workers",
]

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


def workers(scenario: Scenario) -> int:
    """Workers of an engine that may have several: as many as there are cores for, unless asked."""
    if scenario.engine.workers != "auto":
        return scenario.engine.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // threads(scenario), 1), scenario.clients.cohort_size)


def in_process(scenario: Scenario) -> bool:
    """Whether a run without a cluster stays in its own process: as asked, or because it is small."""
    told, clients = scenario.engine, scenario.clients
    work = scenario.rounds * clients.cohort_size * clients.local_steps * clients.batch_size
    return told.kind == "inline" or (told.kind == "auto" and (workers(scenario) == 1 or work < SMALL))


def make(scenario: Scenario, address: str | None = None) -> Engine:
    """The engine that a scenario asks for; `auto` runs small work in this process, other work on Ray.

    Its processes start at once, and wait for `Engine.start`.
    """
    if (asked := scenario.secure_aggregation) is None:
        return _plain(scenario, address)
    from fedlora.engine.secure import SecureEngine

    return SecureEngine(_plain(scenario, address), seed=scenario.seed, asked=asked)


def _plain(scenario: Scenario, address: str | None) -> Engine:
    if scenario.engine.kind == "inline" or (address is None and in_process(scenario)):
        from fedlora.engine.inline import InlineEngine

        return InlineEngine(scenario.clients.total)
    from fedlora.engine.ray import RayEngine

    return RayEngine(
        scenario.clients.total,
        workers=None if address and scenario.engine.workers == "auto" else workers(scenario),
        threads=threads(scenario),
        gpus_per_worker=scenario.engine.gpus_per_worker,
        deadline=scenario.engine.deadline,
        address=address,
    )
