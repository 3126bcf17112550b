"""Clients on resident Ray actors: many processes, GPUs, or a cluster.

The round's instruction is put in the object store once. Clients go out in chunks that depend on the
cohort alone, and come back in client order, so that a result does not depend on how many workers ran
it, nor on which of them died. Clients of a chunk whose worker passes the deadline, or dies too often, have failed.

On a cluster workers are spread over the nodes. Each loads the base from a path or the Hub as its own node has it;
the tokenised data, and what stays with clients, are read where this machine put them, in folders that all share.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.adapter import Adapter, Change, Instruction
from fedlora.client import Setter
from fedlora.engine.base import Engine, Figures, by_half, chunks, gathered, named, pieces
from fedlora.engine.pool import Job, Pool
from fedlora.engine.replies import Replies, Report
from fedlora.engine.setup import Description, Setup
from fedlora.errors import FedloraError, SettingError
from fedlora.metrics.contract import Evaluation
from fedlora.passes.kept import Piece
from fedlora.scenario import Scenario

IDLE = 0.1  # of what workers could do in a round: as much must stay idle for evaluation to go beside it

REPLY_BYTES = 64 * 2**20  # of a chunk whose updates are not summed: what the object store holds for each worker


@dataclass
class Beside:
    """An evaluation that the next round takes along."""

    jobs: Sequence[Job]
    parts: list[Evaluation] | None = None  # when they are there


class RayEngine(Engine):
    """Clients on a `Pool` of so many workers; None: as many as there is room for."""

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
        self.deadline, self.cohort = deadline, cohort or num_clients
        self._beside: Beside | None = None
        self.pool = Pool(
            workers=workers,
            cohort=self.cohort,
            threads=threads,
            gpus_per_worker=gpus_per_worker,
            address=address,
        )

    def start(self, setup: Setup) -> Description:
        """Let the workers build, and make sure that they built the same."""
        setup = replace(setup, dataset=setup.dataset.absolute(), partitions=setup.partitions.absolute())
        if setup.device == "auto":
            setup = replace(setup, device="cuda" if self.pool.gpus_per_worker else "cpu")
        descriptions = self.pool.load(setup)
        if len({d.fingerprint for d in descriptions}) != 1:
            raise FedloraError("workers drew different adapters from one seed: their torch versions differ")
        if len({d.precision for d in descriptions}) != 1:
            raise SettingError(
                "engine.precision", "not all workers' hardware multiplies bfloat16: write fp32 or bf16"
            )
        self.description = descriptions[0]
        self.setup = replace(setup, precision=self.description.precision)
        self.pool.tell(self.setup)
        self.keep(self._fill)
        return self.description

    def _fill(self, to: Path, pieces: Sequence[Piece]) -> None:
        """Let all workers pass the examples through the layers below all factors."""

        def lost(_: int, why: str) -> None:
            raise FedloraError(f"the examples could not be passed through the frozen layers: {why}")

        for _ in self.pool.spread([self.pool.call("fill", to.absolute(), piece) for piece in pieces], lost):
            pass

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run the clients wherever a worker is free, and then what is to be evaluated beside them."""
        import ray

        size = sum(tensor.nbytes for tensor in instruction.adapter.values())
        most = None if partial_sums else max(1, REPLY_BYTES // max(size, 1))
        groups = chunks(cohort, most, self.setup.scenario["engine"]["fused"])
        told = ray.put(instruction)  # one broadcast
        beside, self._beside = self._beside, None

        def lost(job: int, why: str) -> Any:
            return self._lost(instruction, groups[job], why) if job < len(groups) else _not_evaluated(job, why)

        results = self.pool.spread(
            [
                *(self.pool.call("train", told, group, partial_sums) for group in groups),
                *(beside.jobs if beside else ()),
            ],
            lost,
            self.deadline,
            timed=len(groups),
        )
        parts = itertools.islice(results, len(groups))
        replies = gathered(parts if partial_sums else map(_own, parts), partial_sums)
        if beside:
            beside.parts = list(results)
        return replies

    def evaluate(self, adapter: Adapter) -> Figures:
        """Loss and metrics on the test set."""
        return self._figures(self.pool.spread(self._evaluation(adapter), _not_evaluated))

    def beside(self, adapter: Adapter) -> Callable[[], Figures] | None:
        """At the end of a round workers have nothing left to do where its pieces do not go up in them."""
        groups = len(chunks(range(self.cohort), fused=self.setup.scenario["engine"]["fused"]))
        idle = -groups % len(self.pool.workers)
        if idle < IDLE * (groups + idle):
            return None
        made = self._beside = Beside(self._evaluation(adapter))

        def figures() -> Figures:
            if made.parts is None:  # no round has taken it along
                self._beside, made.parts = None, list(self.pool.spread(made.jobs, _not_evaluated))
            return self._figures(made.parts)

        return figures

    def _evaluation(self, adapter: Adapter) -> list[Job]:
        """The pieces of an evaluation."""
        import ray

        told = ray.put(adapter)
        return [self.pool.call("evaluate", told, *piece) for piece in pieces(self.description)]

    def _figures(self, parts: Iterable[Evaluation]) -> Figures:
        """What the pieces of an evaluation come to."""
        found = by_half(self.description, parts)
        (made,) = self.pool.spread([self.pool.call("figures", found)], _not_evaluated)
        return named(made)

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """Loss and metrics of clients' own models."""
        import ray

        def lost(_: int, why: str) -> dict[int, Figures]:
            raise FedloraError(f"clients' own models could not be evaluated: {why}")

        told = ray.put(instruction)
        jobs = [self.pool.call("judge", told, piece, test) for piece in chunks(cohort)]
        return {client: figures for part in self.pool.spread(jobs, lost) for client, figures in part.items()}

    def merge(self, change: Change) -> None:
        """Workers fold it in before they do anything else."""
        self.pool.merge(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter."""

        def lost(_: int, why: str) -> None:
            raise FedloraError(f"the adapter could not be exported: {why}")

        files: dict[str, bytes]
        (files,) = self.pool.spread([self.pool.call("exported", adapter, merged)], lost)
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self.pool.close()

    def _lost(self, instruction: Instruction, cohort: Sequence[int], why: str) -> Replies:
        """Reports of clients whose workers kept dying; what they may have spent counts."""
        from fedlora import client as clients
        from fedlora.data.store import Dataset

        scenario = Scenario.model_validate(self.setup.scenario)
        client = clients.load(scenario.clients.use, scenario.clients.options)
        data = Dataset.open(self.setup.dataset, self.setup.partitions)
        settings = Setter(scenario, self.setup.noise, self.setup.bands)
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
                    event=client.spends(n := data.units(c), settings(instruction, n, c)),
                    error=why,
                )
                for c in cohort
            ],
        )


def _not_evaluated(job: int, why: str) -> Any:
    raise FedloraError(f"the test set could not be evaluated: {why}")


def _own(replies: Replies) -> Replies:
    """Replies with tensors of their own, so that the object store need not hold a whole round's."""
    updates = [
        replace(u, adapter={n: t.copy() for n, t in u.adapter.items()}, moments=u.moments.copy())
        for u in replies.updates
    ]
    return Replies(updates, replies.reports)
