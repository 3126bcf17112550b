"""Clients on resident Ray actors: many processes, GPUs, or a cluster.

The round's instruction is put in the object store once. Clients go out in chunks that depend on the
cohort alone, and come back in client order, so that a result does not depend on how many workers ran
it. A worker that dies is replaced, and its chunk runs again. One that passes the deadline is killed and
replaced, and the clients of its chunk have failed.
"""

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter, Change, Instruction
from fedlora.engine.base import EVALUATION_CHUNK, Engine, chunks, summed
from fedlora.engine.intake import Replies, Report
from fedlora.engine.worker import Description, Setter, Setup, Worker
from fedlora.errors import FedloraError, UserError
from fedlora.scenario import Scenario

ATTEMPTS = 3  # how often a chunk is tried before its clients count as failed

POLL = 0.5  # seconds between looks at the clock, where there is a deadline

logger = logging.getLogger(__name__)


@dataclass
class Running:
    """A job on a worker."""

    job: int
    worker: int
    ready: Any  # comes when the worker has loaded, and the clock starts
    began: float | None = None
    late: bool = False


class Resident:
    """The actor.

    It imports while the run is still being prepared. Its worker is built by a call, so that what goes
    wrong then is told as it was raised.
    """

    def __init__(self) -> None:
        for module in ("torch", "transformers.models.auto", "peft"):
            importlib.import_module(module)
        self.worker: Worker | None = None

    def call(self, setup: Setup, merges: Sequence[Any], method: str, *arguments: Any) -> Any:
        """The result of a worker's method, on the base with all merges so far in it."""
        import ray

        self.worker = self.worker or Worker(setup)
        for reference in merges[self.worker.merged :]:
            self.worker.merge(ray.get(reference))
        return getattr(self.worker, method)(*arguments)


class RayEngine(Engine):
    """`workers` actors, each with a resident model."""

    def __init__(
        self,
        num_clients: int,
        *,
        workers: int,
        threads: int = 1,
        gpus_per_worker: float = 0.0,
        deadline: float | None = None,
        address: str | None = None,
    ) -> None:
        super().__init__(num_clients)
        self.deadline = deadline
        self.num_workers, self.threads = workers, threads
        self.gpus_per_worker, self.address = gpus_per_worker, address
        self.workers: list[Any] = []
        self.merges: list[Any] = []
        self.replaced = 0
        self._mine = False
        self._connect()

    def _connect(self) -> None:
        """Start Ray or join a cluster, and start the actors; their loading goes on in the background."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        import ray

        if not ray.is_initialized():
            self._mine = True
            options: dict[str, Any] = (
                {"address": self.address}
                if self.address
                else {
                    "num_cpus": max(self.num_workers * self.threads, 1),
                    "include_dashboard": False,
                    "object_store_memory": 512 * 2**20,
                }
            )
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"cannot reach Ray at {self.address or 'this machine'}: {error}") from error
        needs = {"CPU": self.num_workers * self.threads, "GPU": self.num_workers * self.gpus_per_worker}
        for what, need in needs.items():
            if need > (has := ray.cluster_resources().get(what, 0)):
                raise UserError(
                    f"{self.num_workers} workers need {need:g} {what}s, and Ray has {has:g}: lower engine.workers"
                )
        self.workers = [self._new_worker() for _ in range(self.num_workers)]

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
            runtime_env={"env_vars": environment},
        )
        return remote.remote()

    def start(self, setup: Setup) -> Description:
        """Let the workers build, and make sure that they built the same."""
        import ray

        self.setup, self._setup = setup, ray.put(setup)
        asked = [self._call("describe")(worker) for worker in self.workers]
        descriptions = [self._get(reference) for reference in asked]
        if len({d.fingerprint for d in descriptions}) != 1:
            raise FedloraError("workers drew different adapters from one seed: their torch versions differ")
        self.description = descriptions[0]
        return self.description

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [self._get(self._call("pid")(worker)) for worker in self.workers]

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run the clients wherever a worker is free."""
        import ray

        pieces = chunks(cohort)
        told = ray.put(instruction)  # one broadcast
        parts = self._spread(
            [self._call("train", told, piece, partial_sums) for piece in pieces],
            lambda i, why: self._lost(instruction, pieces[i], why),
            self.deadline,
        )
        return Replies([u for p in parts for u in p.updates], [r for p in parts for r in p.reports])

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """Loss and metric on the test set."""
        import ray

        told, count = ray.put(adapter), self.description.test_examples
        starts = range(0, count, EVALUATION_CHUNK)

        def lost(_: int, why: str) -> dict[str, float]:
            raise FedloraError(f"the test set could not be evaluated: {why}")

        parts = self._spread(
            [self._call("evaluate", told, a, min(a + EVALUATION_CHUNK, count)) for a in starts],
            lost,
        )
        figures: dict[str, float] = self._get(self._call("figures", summed(parts))(self.workers[0]))
        return figures

    def judge(self, instruction: Instruction, cohort: Sequence[int]) -> dict[str, float]:
        """Loss and metric of clients' own models."""
        import ray

        def lost(_: int, why: str) -> dict[str, float]:
            raise FedloraError(f"clients' own models could not be evaluated: {why}")

        told = ray.put(instruction)
        sums = summed(self._spread([self._call("judge", told, piece) for piece in chunks(cohort)], lost))
        return {key: value / len(cohort) for key, value in sums.items()}

    def merge(self, change: Change) -> None:
        """Workers fold it in before they do anything else."""
        import ray

        self.merges.append(ray.put(change))

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter."""

        def lost(_: int, why: str) -> None:
            raise FedloraError(f"the adapter could not be exported: {why}")

        self._spread([self._call("export", adapter, folder, merged)], lost)

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._mine:
            ray.shutdown()
            self._mine = False

    def _spread(
        self, jobs: Sequence[Callable[[Any], Any]], lost: Callable[[int, str], Any], deadline: float | None = None
    ) -> list[Any]:
        """Results of all jobs in their order; each goes to a free worker, and again if that dies.

        One that takes longer than `deadline` seconds is lost at once: it would take as long again.
        """
        import ray

        results: dict[int, Any] = {}
        waiting: Iterator[int] = iter(range(len(jobs)))
        again: list[int] = []
        attempts = [0] * len(jobs)
        free = list(range(len(self.workers)))
        running: dict[Any, Running] = {}
        while len(results) < len(jobs):
            while free and (job := again.pop() if again else next(waiting, None)) is not None:
                worker = self.workers[number := free.pop(0)]
                attempts[job] += 1
                ready = None if deadline is None else self._call("pid")(worker)
                running[jobs[job](worker)] = Running(job, number, ready)
            done, _ = ray.wait(list(running), num_returns=1, timeout=None if deadline is None else POLL)
            if deadline is not None:
                self._stop_late([told for reference, told in running.items() if reference not in done], deadline)
            for reference in done:
                told = running.pop(reference)
                job = told.job
                try:
                    results[job] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, FedloraError) else error from None
                except ray.exceptions.RayError as error:
                    why = f"its worker died {attempts[job]} times ({type(error).__name__})"
                    if told.late:
                        why = f"took longer than engine.deadline, {deadline:g} s"
                    logger.warning(
                        "a worker %s and is replaced", why if told.late else f"died: {str(error).splitlines()[0]}"
                    )
                    self.replaced += 1
                    self.workers[told.worker] = self._new_worker()
                    if attempts[job] < ATTEMPTS and not told.late:
                        again.append(job)
                    else:
                        results[job] = lost(job, why)
                free.append(told.worker)
        return [results[i] for i in range(len(jobs))]

    def _stop_late(self, running: Sequence[Running], deadline: float) -> None:
        """Kill the workers whose jobs have run for longer than the deadline, loading not counted."""
        import ray

        for told in running:
            if told.began is None and ray.wait([told.ready], timeout=0)[0]:
                told.began = time.monotonic()
            if told.began is not None and time.monotonic() - told.began > deadline and not told.late:
                told.late = True
                ray.kill(self.workers[told.worker])

    def _lost(self, instruction: Instruction, cohort: Sequence[int], why: str) -> Replies:
        """Reports of clients whose workers kept dying; what they may have spent counts."""
        from fedlora import client as clients
        from fedlora.data import Dataset

        scenario = Scenario.model_validate(self.setup.scenario)
        client = clients.load(scenario.clients.use, scenario.clients.options)
        data = Dataset.open(self.setup.dataset, self.setup.partitions)
        settings = Setter(scenario, self.setup.noise)
        return Replies(
            [],
            [
                Report(
                    client=c,
                    num_examples=data.num_examples(c),
                    steps=0,
                    bytes_up=0,
                    bytes_down=0,
                    seconds=0.0,
                    event=client.spends(n := data.num_examples(c), settings(instruction, n)),
                    error=why,
                )
                for c in cohort
            ],
        )

    def _call(self, method: str, *arguments: Any) -> Callable[[Any], Any]:
        """A call of a worker's method, to be made on whichever worker is free."""
        return lambda worker: worker.call.remote(self._setup, self.merges, method, *arguments)

    @staticmethod
    def _get(reference: Any) -> Any:
        """A result, with our own errors as they were raised."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, FedloraError) else error from None
        except ray.exceptions.RayError as error:
            raise FedloraError(f"a worker died while it started: {str(error).splitlines()[0]}") from error
