"""A run at a site: the worker that trains for it, what was paid and merged, and its part in secure aggregation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlora.adapter import Instruction
from fedlora.deploy.answers import Answers
from fedlora.engine.replies import Report
from fedlora.engine.worker import Worker
from fedlora.errors import ContractError
from fedlora.exporting import About
from fedlora.privacy.accounting import Event, epsilon, in_sums
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms.central import CLIP_NORM, COUNT_NOISE, SUM_NOISE
from fedlora.privacy.mechanisms.shared import EXAMPLE_NOISE, MEMBERS
from fedlora.rounds.checkpoint import Merges
from fedlora.schedules import contract as schedules

Words = Mapping[str, Any]


@dataclass
class Serving:
    """The run that a node's model is loaded for."""

    words: Words  # of its introduction
    worker: Worker
    ledger: Ledger
    merges: Merges
    answers: Answers
    ended: bool = False  # whether its server says so: its model is the first to go

    @property
    def key(self) -> str:
        """What its files are under."""
        return str(self.words["run"])

    @property
    def keeps(self) -> bool:
        """Whether an answer is kept to be given again; never where its part of the noise would enter two sums."""
        told = self.worker.scenario
        return told.example_privacy is not None and told.shares_example_noise is None

    @property
    def merges_now(self) -> bool:
        """Whether anything is merged into the base of the run: not before it is cut, nor by most strategies."""
        worker, told = self.worker, self.worker.scenario
        schedule = schedules.load(told.model.adapter.schedule)
        whole = told.compress is not None and worker.setup.base is None
        return not whole and (worker.strategy.merges or (schedule is not None and schedule.merges))

    def event(self, instruction: Instruction, client: int) -> Event | None:
        """What an instruction costs the client's examples; None without privacy."""
        held = self.worker.dataset.units(client)
        return self.worker.client.spends(held, self.worker.settings(instruction, held))

    def check(self, instruction: Instruction) -> None:
        """Make sure that the server asks for nothing that would take noise out of a sum, before it is paid for.

        Nor for training on a base that is not the run's yet.

        No word about whole clients is heeded where there is no promise to them. Where the noise of examples is
        shared out, the tensors and the words are those of the strategy that the site has too.

        Raises:
            ContractError: it asks for something else.
        """
        worker, told = self.worker, self.worker.scenario
        if told.compress is not None and worker.setup.base is None:
            raise ContractError("the base of the run is to be cut before anybody trains")
        strange = set() if told.client_privacy else {CLIP_NORM, SUM_NOISE, COUNT_NOISE} & set(instruction.config)
        if told.shares_example_noise is not None:
            own = worker.strategy.instruct(instruction.round, worker.task.initial)
            strange |= set(instruction.config) - {*own.config, EXAMPLE_NOISE, MEMBERS}
            if (set(instruction.train), set(instruction.send)) != (set(own.train), set(own.send)):
                raise ContractError("the server asks for other tensors than the run's strategy trains and sends")
        if strange:
            raise ContractError(f"the server says {min(strange)}, and the run has none")

    def spent(self, client: int) -> tuple[Event, ...]:
        """What the client's examples have lost in this run, those on equal terms together."""
        return self.ledger.events.get(client, ())

    def epsilon(self, client: int) -> float | None:
        """The same as epsilon, as the scenario counts it; None without privacy."""
        asked = self.worker.scenario.example_privacy
        return None if asked is None else epsilon(in_sums(self.spent(client)), asked.delta, asked.accountant)

    def about(self, threshold: float | None) -> About:
        """What an adapter of the run was trained on; `threshold` is from which probability on it gives a label."""
        made = About.of(self.worker.scenario, self.worker.dataset.labels, {"threshold": threshold})
        cut = self.worker.setup.base
        return made if cut is None else replace(made, base=str(cut.absolute()), revision=None)

    def line(self, report: Report, round: int, client: int) -> dict[str, Any]:
        """A round as a site saw it, which `fedlora watch` shows; only the server knows the metric."""
        return {
            "round": round,
            "clients": int(report.error is None),
            "failures": int(report.error is not None),
            "loss": None,
            "train_loss": None,
            self.worker.task.metric: None,
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "epsilon": self.epsilon(client),
            "seconds": report.seconds,
        }
