"""Workers on Ray: how many there is room for, what they are given to do, and who takes the place of a dead one.

A job goes to whichever worker is free. A worker that dies is replaced, and its job runs again; where a node went
with it the others go on alone until there is room for the new one. One that passes the deadline is killed and
replaced, and its job is lost.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.adapter import Change
from fedlora.engine import hardware
from fedlora.engine.actor import Resident
from fedlora.engine.cluster import Cluster
from fedlora.engine.setup import Description, Setup
from fedlora.errors import FedloraError, SettingError

ATTEMPTS = 3  # how often a job is tried before it counts as lost

POLL = 0.5  # seconds between looks at the clock, where there is a deadline

PATIENCE = 120.0  # seconds that a run waits for any worker, where all have died and are replaced

logger = logging.getLogger(__name__)

Job = Callable[[Any], Any]
"""Begins a job on a worker that it is given; gives a reference to its result."""


@dataclass
class Running:
    """A job on a worker."""

    job: int
    worker: int
    began: float
    late: bool = False


class Pool:
    """`workers` actors, each with a resident model; None: as many as there is room for.

    With `gpus_per_worker` `auto` a first one measures what it takes of a GPU, and the others are packed by that.

    Attributes:
        workers: the actors.
        gpus_per_worker: the share of a GPU that each has.
        replaced: how many died, or were killed, and were replaced.
    """

    def __init__(
        self,
        *,
        workers: int | None,
        cohort: int,
        threads: int,
        gpus_per_worker: float | Literal["auto"],
        address: str | None,
    ) -> None:
        self.threads, self.cohort = threads, cohort
        self.packs = gpus_per_worker == "auto"
        self.gpus_per_worker = 1.0 if gpus_per_worker == "auto" else gpus_per_worker
        self.cluster = Cluster(address)
        self.workers: list[Any] = []
        self.replaced = 0
        self._setup: list[Any] = []  # a reference to what workers build
        self._merges: list[Any] = []  # references to what they fold in
        self._coming: dict[Any, int] = {}  # calls that return when a replaced worker has loaded
        try:
            self._connect(workers)
        except FedloraError:
            self.close()
            raise

    def _connect(self, workers: int | None) -> None:
        """Start the actors; their loading goes on in the background."""
        cores = workers * self.threads if workers else max(hardware.cores(), self.threads)
        self._nodes = self.cluster.connect(cores)
        gpus = sum(node.gpus for node in self._nodes)
        if self.packs and not gpus:
            self.packs, self.gpus_per_worker = False, 0.0
        if self.gpus_per_worker and not gpus:
            raise SettingError("engine.gpus_per_worker", f"asks for a GPU, and Ray finds none: {hardware.INSTEAD}")
        self._asked = workers
        self.workers = [self._new_worker() for _ in range(1 if self.packs else self._fitting(workers))]

    def _fitting(self, workers: int | None) -> int:
        """The workers to start, where it is known what each takes.

        Raises:
            SettingError: Ray has no place for them, and would wait for one.
        """
        each, needs = 0, f"{self.threads} cores"
        if self.gpus_per_worker:
            each, needs = hardware.held(self.gpus_per_worker), f"{needs} and {self.gpus_per_worker:g} of a GPU"
        there = hardware.room(self._nodes, each, self.threads)
        if (wanted := workers or max(1, min(there, self.cohort))) > there:
            also = " or engine.gpus_per_worker" if each else " or engine.threads"
            raise SettingError(
                "engine.workers",
                f"{wanted} workers of {needs} each do not fit: Ray has room for {there}; lower it{also}",
            )
        return wanted

    def _pack(self) -> None:
        """Start as many workers as the GPUs hold, by what the first takes of one.

        Raises:
            SettingError: not one fits, or the GPUs are not alike.
        """
        import ray

        kinds = [n.split(":", 1)[1] for n in ray.cluster_resources() if n.startswith("accelerator_type:")]
        if len(kinds) > 1:
            raise SettingError(
                "engine.gpus_per_worker",
                f"auto measures one GPU, and there are several kinds, {', '.join(sorted(kinds))}: write a number",
            )
        workers, share = hardware.pack(
            self._measure(), self._nodes, threads=self.threads, cohort=self.cohort, workers=self._asked
        )
        if share < 1:  # it took a whole GPU
            ray.kill(self.workers.pop())
        self.gpus_per_worker = share
        self.workers += [self._new_worker() for _ in range(workers - len(self.workers))]

    def _measure(self) -> hardware.Measured:
        found: hardware.Measured = self.get(self.call("measured")(self.workers[0]))
        return found

    def _new_worker(self) -> Any:
        import ray

        threads = str(self.threads)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "passive",  # spinning threads on a busy machine cost several times their work
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(
                p or os.getcwd() for p in sys.path
            ),  # one's own clients are found there too
        }
        remote = ray.remote(Resident).options(
            num_cpus=self.threads,
            num_gpus=self.gpus_per_worker,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )
        return remote.remote()

    def load(self, setup: Setup) -> list[Description]:
        """Let the workers build, all of them or as many as the GPUs turn out to hold; what each built."""
        self.tell(setup)
        if self.packs:
            self._pack()
        asked = [self.call("describe")(worker) for worker in self.workers]
        return [self.get(reference) for reference in asked]

    def tell(self, setup: Setup) -> None:
        """What workers build that come from now on."""
        import ray

        self._setup = [ray.put(setup)]

    def merge(self, change: Change) -> None:
        """Workers fold it in before they do anything else."""
        import ray

        self._merges.append(ray.put(change))

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [self.get(self.call("pid")(worker)) for worker in self.workers]

    def call(self, method: str, *arguments: Any) -> Job:
        """A call of a worker's method, to be made on whichever worker is free."""
        return lambda worker: worker.call.remote(self._setup, self._merges, method, *arguments)

    @staticmethod
    def get(reference: Any) -> Any:
        """A result, with our own errors as they were raised."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, FedloraError) else error from None
        except ray.exceptions.RayError as error:
            raise FedloraError(f"a worker died while it started: {str(error).splitlines()[0]}") from error

    def spread(
        self,
        jobs: Sequence[Job],
        lost: Callable[[int, str], Any],
        deadline: float | None = None,
        timed: int = 0,
    ) -> Iterator[Any]:
        """Results of all jobs in their order; each goes to a free worker, and again if that dies.

        Of the first `timed`, one that takes longer than `deadline` seconds is lost at once: it would take as long
        again.

        Raises:
            FedloraError: no worker is left.
        """
        import ray

        results: dict[int, Any] = {}
        waiting: Iterator[int] = iter(range(len(jobs)))
        again: list[int] = []
        attempts = [0] * len(jobs)
        free = [n for n in range(len(self.workers)) if n not in self._coming.values()]
        running: dict[Any, Running] = {}
        due, idle = 0, time.monotonic()
        while due < len(jobs):
            while free and (job := again.pop() if again else next(waiting, None)) is not None:
                number = free.pop(0)
                attempts[job] += 1
                running[jobs[job](self.workers[number])] = Running(job, number, time.monotonic())
            if due in results:
                yield results.pop(due)
                due += 1
                continue
            idle = time.monotonic() if running else idle
            look = None if deadline is None and running and self.cluster.address is None else POLL
            done, _ = ray.wait([*running, *self._coming], num_returns=1, timeout=look)
            self.cluster.look_for_head()
            if not running and time.monotonic() - idle > PATIENCE:
                raise FedloraError("no worker is left, and Ray has room for none: see `ray status`")
            if deadline is not None:
                slow = [r for reference, r in running.items() if reference not in done and r.job < timed]
                self._stop_late(slow, deadline)
            for reference in done:
                told = running.pop(reference, None)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, FedloraError) else error from None
                except ray.exceptions.RayError as error:
                    number = self._coming.pop(reference) if told is None else told.worker
                    late = told is not None and told.late
                    logger.warning(
                        "a worker %s and is replaced",
                        f"took longer than engine.deadline, {deadline:g} s,"
                        if late
                        else f"died: {str(error).splitlines()[0]}",
                    )
                    self._replace(number)
                    if told is None:
                        continue
                    if attempts[told.job] < ATTEMPTS and not late:
                        again.append(told.job)
                        continue
                    why = f"its worker died {attempts[told.job]} times ({type(error).__name__})"
                    results[told.job] = lost(
                        told.job, f"took longer than engine.deadline, {deadline:g} s" if late else why
                    )
                else:
                    if told is None:
                        free.append(self._coming.pop(reference))
                    else:
                        free.append(told.worker)
                        results[told.job] = result

    def _replace(self, number: int) -> None:
        """Another worker for one that died; it is given work when it has loaded."""
        self.replaced += 1
        self.workers[number] = self._new_worker()
        self._coming[self.call("pid")(self.workers[number])] = number

    def _stop_late(self, running: Sequence[Running], deadline: float) -> None:
        """Kill the workers whose jobs have run for longer than the deadline."""
        import ray

        for told in running:
            if time.monotonic() - told.began > deadline and not told.late:
                told.late = True
                ray.kill(self.workers[told.worker])

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        import ray

        for worker in () if self.cluster.gone else self.workers:
            ray.kill(worker)
        self.workers = []
        self.cluster.close()
