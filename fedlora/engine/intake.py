"""What comes back from clients is not trusted: the one place that says what may be aggregated.

A worker passes each update through `Intake.check` before it is summed with others, and the loop passes the replies
of every engine through `Intake.admit`. A client that is refused is a failure: counted, named with the reason in
`clients.jsonl`, and what it may have spent stays spent.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Instruction, Tensor, Update
from fedlora.engine.replies import Replies, Report
from fedlora.errors import ContractError
from fedlora.optimizers import averaged
from fedlora.scenario import Scenario
from fedlora.strategy import Strategy

ENORMOUS = 1e12  # L2 norm of a tensor that nobody trains: products of such are still finite in float32
FIGURES = 32  # that an update may carry
WORDS = 500  # characters of a reason for failing
FLOAT = np.dtype(np.float32)


class Intake:
    """Decides which updates of a run may be aggregated."""

    def __init__(self, scenario: Scenario, strategy: Strategy, num_examples: Callable[[int], int]) -> None:
        """For a run.

        Args:
            scenario: with the bounds that it sets.
            strategy: bound to its layout.
            num_examples: that a client holds; 0 where the server does not know.
        """
        self.scenario, self.strategy, self.num_examples = scenario, strategy, num_examples
        self._shapes: dict[tuple[tuple[str, ...], int, int], dict[str, tuple[int, ...]]] = {}

    def admit(self, instruction: Instruction, cohort: Sequence[int], replies: Replies) -> Replies:
        """The replies without the updates that may not be used; the reports of their clients say why.

        Args:
            instruction: that was sent.
            cohort: client ids that it was sent to.
            replies: of any engine.

        Raises:
            ContractError: the engine does not say what became of a client.
        """
        reports = {report.client: report for report in replies.reports}
        asked = set(cohort)
        if lost := sorted(asked - set(reports)):
            raise ContractError(f"the engine does not say what became of client {lost[0]}")
        answers = Counter(client for update in replies.updates for client in update.clients)
        updates, refused = [], {c: "was not asked" for c in reports if c not in asked}
        for update in replies.updates:
            try:
                for client in update.clients:
                    if client not in asked:
                        raise ContractError(f"client {client} was not asked")
                    if answers[client] > 1:
                        raise ContractError(f"client {client} answered {answers[client]} times")
                    if reports[client].error is not None:
                        raise ContractError(f"client {client} failed and answered all the same")
                updates.append(self.check(update, instruction))
            except ContractError as error:
                refused |= dict.fromkeys(update.clients, f"{type(error).__name__}: {error}")
        for client, why in refused.items():
            nothing = Report(client=client, num_examples=0, steps=0, bytes_up=0, bytes_down=0, seconds=0.0)
            told = reports.get(client, nothing)
            reports[client] = replace(told, steps=0, error=told.error or why, metrics={})
        short = {c: replace(r, error=r.error[:WORDS]) if r.error else r for c, r in reports.items()}
        return replace(replies, updates=updates, reports=[short[client] for client in sorted(short)])

    def check(self, update: Update, instruction: Instruction) -> Update:
        """An update as it may be used: without the figures that are no finite numbers.

        Args:
            update: of a client, or the mean of several.
            instruction: as the server sent it.

        Raises:
            ContractError: its tensors or second moments are not those asked for, it moved further than
                `clients.max_norm`, or it claims to weigh more than its clients hold.
        """
        told = self.scenario.clients
        rank = self.scenario.rank(update.clients[0], instruction.round)
        check_tensors(update.adapter, self.expected(instruction, rank))
        self._check_weight(update)
        averaged.check(update.moments, len(instruction.moments))
        if told.max_norm is not None:
            moved = _moved(update.adapter, instruction.at(rank).adapter)
            if moved > told.max_norm:
                raise ContractError(f"moved by {moved:.4g}, further than clients.max_norm, {told.max_norm:g}")
        if len(update.metrics) > FIGURES or any(len(name) > FIGURES for name in update.metrics):
            raise ContractError(f"reports more than {FIGURES} figures, or names them at length")
        finite = {name: float(value) for name, value in update.metrics.items() if np.isfinite(value)}
        return update if len(finite) == len(update.metrics) else replace(update, metrics=finite)

    def _check_weight(self, update: Update) -> None:
        """Examples are claimed by the weight; held against what the server knows, or else against a bound."""
        if not (update.weight > 0 and np.isfinite(update.weight)):
            raise ContractError(f"an update's weight is a positive number, not {update.weight}")
        held = [self.num_examples(client) or self.scenario.clients.max_examples for client in update.clients]
        most = sum(number for number in held if number is not None)
        if None not in held and update.weight > most * (1 + 1e-6):
            raise ContractError(f"claims to weigh {update.weight:.15g}, and its examples are {most} at most")

    def expected(self, instruction: Instruction, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what a client of a rank should send, found once by a dry run of the reply."""
        key = (instruction.send, instruction.trip, rank)
        if key not in self._shapes:
            kind, layout = self.strategy.kind, self.strategy.layout
            held = {name: np.zeros(kind.shape(slot, rank), np.float32) for name, slot in layout.items()}
            self._shapes[key] = {n: t.shape for n, t in self.strategy.reply(instruction, held).items()}
        return self._shapes[key]


@np.errstate(over="ignore", invalid="ignore")
def check_tensors(adapter: Adapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those asked for, or that no training makes.

    Args:
        adapter: by name.
        expected: the shape of each tensor that was asked for.

    Raises:
        ContractError: wrong names, shapes or types, or values that are not finite or enormous.
    """
    if set(adapter) != set(expected):
        odd = sorted(set(adapter) ^ set(expected), key=str)[0]
        raise ContractError(f"the update should hold exactly the tensors asked for, and differs in {odd!s:.100}")
    for name, tensor in adapter.items():
        if not isinstance(tensor, np.ndarray) or tensor.dtype != FLOAT:
            raise ContractError(f"{name} holds {getattr(tensor, 'dtype', type(tensor).__name__)}, not float32")
        if tensor.shape != expected[name]:
            raise ContractError(f"{name} has shape {tensor.shape}, not {expected[name]}")
        if _square(tensor.reshape(-1)) < 0.5 * ENORMOUS**2:  # all is well, told by one pass
            continue
        if not np.isfinite(tensor).all():
            raise ContractError(f"{name} holds values that are not finite; a lower learning rate may help")
        if (norm := float(np.linalg.norm(tensor.astype(np.float64)))) > ENORMOUS:
            raise ContractError(f"{name} has norm {norm:.3g}, above {ENORMOUS:g}; a lower learning rate may help")


def _square(flat: Tensor) -> float:
    """The squared norm, not finite where a value is not; without BLAS where that would start threads for it."""
    return float(flat.dot(flat) if flat.size <= 10_000 else np.einsum("i,i->", flat, flat))


def _moved(adapter: Adapter, received: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors of what a client changed; a tensor that it was not sent counts whole."""
    return float(
        np.sqrt(sum(float(((t.astype(np.float64) - received.get(n, 0.0)) ** 2).sum()) for n, t in adapter.items()))
    )
