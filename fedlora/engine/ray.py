"""Clients on resident Ray actors: many processes, GPUs, or a cluster.

The round's instruction is put in the object store once. Clients go out in chunks that depend on the
cohort alone, and come back in client order, so that a result does not depend on how many workers ran
it. A worker that dies is replaced, and its chunk runs again; where a node went with it the others go on
alone until there is room for the new one. One that passes the deadline is killed and replaced, and the clients
of its chunk have failed.

On a cluster workers are spread over the nodes. Each loads the base from a path or the Hub as its own node has it;
the tokenised data, and what stays with clients, are read where this machine put them, in folders that all share.
"""

import importlib
import itertools
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.adapter import Adapter, Change, Instruction
from fedlora.client import Setter
from fedlora.engine import hardware
from fedlora.engine.base import EVALUATION_CHUNK, Engine, chunks, gathered, summed
from fedlora.engine.replies import Replies, Report
from fedlora.engine.setup import Description, Setup
from fedlora.engine.worker import Worker
from fedlora.errors import FedloraError, SettingError, UserError
from fedlora.scenario import Scenario

ATTEMPTS = 3  # how often a chunk is tried before its clients count as failed

POLL = 0.5  # seconds between looks at the clock, where there is a deadline

PATIENCE = 120.0  # seconds that a run waits for any worker, where all have died and are replaced

IDLE = 0.1  # of what workers could do in a round: as much must stay idle for evaluation to go beside it

SILENCE = 15.0  # seconds for which a cluster's head may not answer; Ray itself ends this process after 60

REPLY_BYTES = 64 * 2**20  # of a chunk whose updates are not summed: what the object store holds for each worker

LAST_WORDS = (
    "fedlora: the run's process ended without a word, as it does where all of Ray dies on its machine; what was "
    "finished is saved: go on with --resume"
)

logger = logging.getLogger(__name__)


@dataclass
class Running:
    """A job on a worker."""

    job: int
    worker: int
    began: float
    late: bool = False


@dataclass
class Beside:
    """An evaluation that the next round takes along."""

    jobs: Sequence[Callable[[Any], Any]]
    parts: list[dict[str, float]] | None = None  # of the sums, when they are there


class Resident:
    """The actor.

    It imports while the run is still being prepared. Its worker is built by a call, so that what goes
    wrong then is told as it was raised.
    """

    def __init__(self) -> None:
        for module in ("torch", "transformers.models.auto", "peft"):
            importlib.import_module(module)
        self.worker: Worker | None = None

    def call(self, setup: Sequence[Any], merges: Sequence[Any], method: str, *arguments: Any) -> Any:
        """The result of a worker's method, on the base with all merges so far in it.

        Args:
            setup: a reference to it, inside a sequence so that it is fetched once and not for each call.
            merges: references to them.
            method: of `Worker`, or of this class.
            arguments: of the method.

        Raises:
            UserError: a folder that all nodes share is not here.
        """
        import ray

        if self.worker is None:
            told: Setup = ray.get(setup[0])
            _shared(told.dataset, told.partitions)
            self.worker = Worker(told)
        if method == "train" and (personal := self.worker.setup.personal) is not None:
            _shared(personal.parent)
        for reference in merges[self.worker.merged :]:
            self.worker.merge(ray.get(reference))
        return getattr(self if method in ("exported", "measured") else self.worker, method)(*arguments)

    def measured(self) -> hardware.Measured:
        """What the worker takes of its GPU."""
        assert self.worker is not None
        return self.worker.measure()

    def exported(self, adapter: Adapter, merged: Change | None) -> dict[str, bytes]:
        """The files that an export writes, by name: the run's folder may be on another machine."""
        assert self.worker is not None
        with tempfile.TemporaryDirectory() as name:
            self.worker.export(adapter, folder := Path(name) / "adapter", merged)
            return {file.name: file.read_bytes() for file in folder.iterdir()}


def _shared(*folders: Path) -> None:
    for folder in folders:
        if not folder.exists():
            raise UserError(
                f"{folder}: is not on {platform.node()}, a node of the cluster: let FEDLORA_CACHE and --out name "
                "folders that all nodes share"
            )


class RayEngine(Engine):
    """`workers` actors, each with a resident model; None: as many as there is room for.

    With `gpus_per_worker` `auto` a first one measures what it takes of a GPU, and the others are packed by that.
    """

    def __init__(
        self,
        num_clients: int,
        *,
        workers: int | None,
        cohort: int | None = None,
        threads: int = 1,
        gpus_per_worker: float | Literal["auto"] = 0.0,
        deadline: float | None = None,
        address: str | None = None,
    ) -> None:
        super().__init__(num_clients)
        self.deadline = deadline
        self.threads, self.cohort = threads, cohort or num_clients
        self.packs = gpus_per_worker == "auto"
        self.gpus_per_worker = 1.0 if gpus_per_worker == "auto" else gpus_per_worker
        self.address = address
        self.workers: list[Any] = []
        self.merges: list[Any] = []
        self.replaced = 0
        self._coming: dict[Any, int] = {}  # calls that return when a replaced worker has loaded
        self._beside: Beside | None = None
        self._mine = False
        self._closed: Callable[[], object] = lambda: None
        self._looked = 0.0  # for the cluster's head, when last
        self._silent: float | None = None  # since when it has not answered
        try:
            self._connect(workers)
        except FedloraError:
            self.close()
            raise

    def _connect(self, workers: int | None) -> None:
        """Start Ray or join a cluster, and start the actors; their loading goes on in the background."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        import ray

        if not ray.is_initialized():
            self._mine, self._closed = True, _witness(self)
            options: dict[str, Any] = (
                {"address": self.address}
                if self.address
                else {
                    "address": "local",  # and not whatever cluster runs here
                    "num_cpus": workers * self.threads if workers else max(hardware.cores(), self.threads),
                    "include_dashboard": False,
                    "object_store_memory": 512 * 2**20,
                }
            )
            before = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"cannot reach Ray at {self.address or 'this machine'}: {error}") from error
            except SystemExit as stop:  # what Ray makes of a SIGTERM while it starts
                raise KeyboardInterrupt from stop
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)  # Ray's own prints where it was in the code
        held = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._nodes = [hardware.Node(int(has.get("GPU", 0)), int(has.get("CPU", 0))) for has in held]
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
        found: hardware.Measured = self._get(self._call("measured")(self.workers[0]))
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

    def start(self, setup: Setup) -> Description:
        """Let the workers build, and make sure that they built the same."""
        import ray

        setup = replace(setup, dataset=setup.dataset.absolute(), partitions=setup.partitions.absolute())
        if setup.device == "auto":
            setup = replace(setup, device="cuda" if self.gpus_per_worker else "cpu")
        self.setup, self._setup = setup, [ray.put(setup)]
        if self.packs:
            self._pack()
        asked = [self._call("describe")(worker) for worker in self.workers]
        descriptions = [self._get(reference) for reference in asked]
        if len({d.fingerprint for d in descriptions}) != 1:
            raise FedloraError("workers drew different adapters from one seed: their torch versions differ")
        if len({d.precision for d in descriptions}) != 1:
            raise SettingError(
                "engine.precision", "not all workers' hardware multiplies bfloat16: write fp32 or bf16"
            )
        self.description = descriptions[0]
        self.setup = replace(setup, precision=self.description.precision)
        self._setup = [ray.put(self.setup)]  # for those that come later
        return self.description

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [self._get(self._call("pid")(worker)) for worker in self.workers]

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run the clients wherever a worker is free, and then what is to be evaluated beside them."""
        import ray

        size = sum(tensor.nbytes for tensor in instruction.adapter.values())
        most = None if partial_sums else max(1, REPLY_BYTES // max(size, 1))
        pieces = chunks(cohort, most, self.setup.scenario["engine"]["fused"])
        told = ray.put(instruction)  # one broadcast
        beside, self._beside = self._beside, None

        def lost(job: int, why: str) -> Any:
            return self._lost(instruction, pieces[job], why) if job < len(pieces) else _not_evaluated(job, why)

        results = self._spread(
            [
                *(self._call("train", told, piece, partial_sums) for piece in pieces),
                *(beside.jobs if beside else ()),
            ],
            lost,
            self.deadline,
            timed=len(pieces),
        )
        parts = itertools.islice(results, len(pieces))
        replies = gathered(parts if partial_sums else map(_own, parts), partial_sums)
        if beside:
            beside.parts = list(results)
        return replies

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """Loss and metric on the test set."""
        return self._figures(self._spread(self._evaluation(adapter), _not_evaluated))

    def beside(self, adapter: Adapter) -> Callable[[], dict[str, float]] | None:
        """At the end of a round workers have nothing left to do where its pieces do not go up in them."""
        pieces = len(chunks(range(self.cohort), fused=self.setup.scenario["engine"]["fused"]))
        idle = -pieces % len(self.workers)
        if idle < IDLE * (pieces + idle):
            return None
        made = self._beside = Beside(self._evaluation(adapter))

        def figures() -> dict[str, float]:
            if made.parts is None:  # no round has taken it along
                self._beside, made.parts = None, list(self._spread(made.jobs, _not_evaluated))
            return self._figures(made.parts)

        return figures

    def _evaluation(self, adapter: Adapter) -> list[Callable[[Any], Any]]:
        """The pieces of an evaluation."""
        import ray

        told, count = ray.put(adapter), self.description.test_examples
        starts = range(0, count, EVALUATION_CHUNK)
        return [self._call("evaluate", told, a, min(a + EVALUATION_CHUNK, count)) for a in starts]

    def _figures(self, parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """What the pieces of an evaluation come to."""
        figures: dict[str, float]
        (figures,) = self._spread([self._call("figures", summed(parts))], _not_evaluated)
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

        files: dict[str, bytes]
        (files,) = self._spread([self._call("exported", adapter, merged)], lost)
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._mine:
            ray.shutdown()
            self._mine = False
        self._closed()

    def _spread(
        self,
        jobs: Sequence[Callable[[Any], Any]],
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
            look = None if deadline is None and running and self.address is None else POLL
            done, _ = ray.wait([*running, *self._coming], num_returns=1, timeout=look)
            self._look_for_head()
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

    def _look_for_head(self) -> None:
        """Make sure that the head of a joined cluster is there.

        Raises:
            UserError: it has not answered for a while.
        """
        import ray

        if self.address is None or (now := time.monotonic()) - self._looked < 1.0:
            return
        self._looked = now
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            self._silent = None
        except OSError as error:
            self._silent = self._silent or now
            if now - self._silent > SILENCE:
                self.workers, self._mine = [], False  # there is nobody to let go
                raise UserError(
                    f"the head of the Ray cluster at {self.address} is gone ({error.strerror or error}); what was "
                    "finished is saved: start a cluster, and go on with --resume"
                ) from error

    def _replace(self, number: int) -> None:
        """Another worker for one that died; it is given work when it has loaded."""
        self.replaced += 1
        self.workers[number] = self._new_worker()
        self._coming[self._call("pid")(self.workers[number])] = number

    def _stop_late(self, running: Sequence[Running], deadline: float) -> None:
        """Kill the workers whose jobs have run for longer than the deadline."""
        import ray

        for told in running:
            if time.monotonic() - told.began > deadline and not told.late:
                told.late = True
                ray.kill(self.workers[told.worker])

    def _lost(self, instruction: Instruction, cohort: Sequence[int], why: str) -> Replies:
        """Reports of clients whose workers kept dying; what they may have spent counts."""
        from fedlora import client as clients
        from fedlora.data.store import Dataset

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
                    event=client.spends(n := data.num_examples(c), settings(instruction, n, c)),
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


def _witness(engine: object) -> Callable[[], object]:
    """A process that says a line if this one ends at once: Ray's core ends it so, and no hook of Python's runs.

    Returns:
        Lets it go; so do the end of the engine and an orderly end of this process.
    """
    told = ["sh", "-c", 'read -r closed || echo "$0" >&2', LAST_WORDS]
    witness = subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    return weakref.finalize(engine, witness.communicate, b"closed\n")


def _not_evaluated(job: int, why: str) -> Any:
    raise FedloraError(f"the test set could not be evaluated: {why}")


def _own(replies: Replies) -> Replies:
    """Replies with tensors of their own, so that the object store need not hold a whole round's."""
    updates = [replace(u, adapter={n: t.copy() for n, t in u.adapter.items()}) for u in replies.updates]
    return Replies(updates, replies.reports)
