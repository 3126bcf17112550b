"""Where clients run; each engine is a Flower `Grid`."""

from fedlora.engine import hardware
from fedlora.engine.base import EVALUATION_CHUNK, Engine
from fedlora.engine.replies import Replies, Report
from fedlora.engine.setup import Description, Setup
from fedlora.engine.worker import Worker
from fedlora.scenario import Scenario

__all__ = [
    "EVALUATION_CHUNK",
    "Description",
    "Engine",
    "Replies",
    "Report",
    "Setup",
    "Worker",
    "device",
    "in_process",
    "make",
    "threads",
    "workers",
]

_TYPICAL = 1000  # examples of a client, before it is known how many there are
SMALL = 3000  # examples trained on in a run: below that, starting processes costs more than it saves


def threads(scenario: Scenario) -> int:
    """Torch threads of a worker. One unless asked: then no result depends on how many cores there are."""
    return 1 if scenario.engine.threads == "auto" else scenario.engine.threads


def device(scenario: Scenario) -> str:
    """The torch device that workers are asked to use."""
    asked = scenario.engine.gpus_per_worker
    return asked if asked == "auto" else "cuda" if asked else "cpu"


def workers(scenario: Scenario) -> int:
    """Workers of an engine that may have several: as many as there are cores for, unless asked."""
    if scenario.engine.workers != "auto":
        return scenario.engine.workers
    return min(max(hardware.cores() // threads(scenario), 1), scenario.clients.cohort_size)


def in_process(scenario: Scenario) -> bool:
    """Whether a run without a cluster stays in its own process: as asked, or because it is small."""
    told, clients = scenario.engine, scenario.clients
    work = scenario.rounds * clients.cohort_size * clients.local_steps * clients.batch(_TYPICAL)
    return told.kind == "inline" or (told.kind == "auto" and (workers(scenario) == 1 or work < SMALL))


def make(scenario: Scenario, address: str | None = None) -> Engine:
    """The engine that a scenario asks for; `auto` runs small work in this process, other work on Ray.

    Its processes start at once, and wait for `Engine.start`.
    """
    if (asked := scenario.secure_aggregation) is None:
        return _plain(scenario, address)
    from fedlora.engine.secure import SecureEngine

    plain = _plain(scenario, address)
    return SecureEngine(plain, seed=scenario.seed, asked=asked, most=scenario.most_members)


def _plain(scenario: Scenario, address: str | None) -> Engine:
    if scenario.engine.kind == "inline" or (address is None and in_process(scenario)):
        from fedlora.engine.inline import InlineEngine

        return InlineEngine(scenario.clients.total)
    from fedlora.engine.ray import RayEngine

    told = scenario.engine
    by_room = told.workers == "auto" and (address or told.gpus_per_worker)
    return RayEngine(
        scenario.clients.total,
        workers=None if by_room else workers(scenario),
        cohort=scenario.clients.cohort_size,
        threads=threads(scenario),
        gpus_per_worker=told.gpus_per_worker,
        deadline=scenario.engine.deadline,
        address=address,
    )
