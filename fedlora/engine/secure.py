"""Secure aggregation: what leaves an engine is a sum, as a server under SecAgg+ learns it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlora import secure, wire
from fedlora.adapter import Adapter, Change, Instruction, Update
from fedlora.central import CARRIED, CLIP_NORM, COUNT_NOISE, SUM_NOISE, WITHIN
from fedlora.engine.base import Engine
from fedlora.engine.intake import Replies, Report
from fedlora.engine.worker import Description, Setup
from fedlora.errors import ContractError, RoundError
from fedlora.scenario import SecureAggregation
from fedlora.seeding import generator

Draws = Callable[[str], np.random.Generator]  # the random numbers of a client in a round, by purpose


def size(instruction: Instruction) -> int:
    """Numbers in a client's vector: its change, and where the bound adapts whether it was within it."""
    return sum(instruction.adapter[n].size for n in instruction.send) + (COUNT_NOISE in instruction.config)


def to_vector(
    instruction: Instruction, update: Update, members: int, largest: float, draws: Draws
) -> secure.Vector:
    """A client's change in whole steps, before it is masked; with its share of the noise where clients add it.

    Args:
        instruction: that it was sent.
        update: that it made.
        members: clients that are asked for one.
        largest: that a number may change by.
        draws: for rounding and noise.

    Raises:
        ContractError: it does not fit.
    """
    told, bound = instruction.config, float(instruction.config.get(CLIP_NORM, 0.0))
    parts = [(update.adapter[n] - instruction.adapter[n]).ravel() for n in instruction.send]
    stds = [np.full(part.size, float(told.get(SUM_NOISE, 0.0)) * bound) for part in parts]
    if COUNT_NOISE in told:
        parts.append(np.array([update.metrics[WITHIN] * largest]))
        stds.append(np.array([float(told[COUNT_NOISE]) * largest]))
    std = np.concatenate(stds) / math.sqrt(members)
    most = 8 * math.sqrt(members) * std.max(initial=0.0) / largest
    if members + most > secure.MOST:
        raise ContractError(
            f"a sum of {members} clients and their noise does not fit: raise secure_aggregation.range"
        )
    vector = secure.quantise(np.concatenate(parts), largest, draws("rounding"))
    if SUM_NOISE in told:
        vector += secure.noise(std, largest, draws(f"noise {told[SUM_NOISE]!r} {bound!r} {members}"))
    return vector


def mean(instruction: Instruction, made: secure.Sum, largest: float) -> Update:
    """The plain mean of those who sent.

    Raises:
        RoundError: it is no mean of theirs: somebody's shares or masks were wrong.
    """
    sent = len(made.sent)
    values = secure.dequantise(made.total, largest) / sent
    told = instruction.config
    noise = float(told.get(SUM_NOISE, 0.0)) * float(told.get(CLIP_NORM, 0.0))
    noise = max(noise, float(told.get(COUNT_NOISE, 0.0)) * largest)
    if np.abs(values).max(initial=0.0) > largest + 10 * noise / sent:
        raise RoundError("the masks did not come off the sum: a client's shares were wrong")
    adapter: Adapter = {}
    start = 0
    for name in instruction.send:
        before = instruction.adapter[name]
        adapter[name] = (before + values[start : start + before.size].reshape(before.shape)).astype(np.float32)
        start += before.size
    within = {WITHIN: float(values[-1] / largest)} if COUNT_NOISE in told else {}
    carried = {CARRIED: sent / len(made.members)} if SUM_NOISE in told else {}
    return Update(adapter=adapter, weight=float(sent), clients=made.sent, metrics=within | carried)


def replies(
    instruction: Instruction,
    exchange: secure.Exchange,
    reports: dict[int, Report],
    asked: SecureAggregation,
    rng: np.random.Generator,
) -> Replies:
    """The outcome of a round: one update for those who sent, and a report for each client.

    Args:
        instruction: of the round.
        exchange: with clients, which keeps their reports.
        reports: of each client of the cohort.
        asked: the scenario's.
        rng: deals the neighbours out.
    """
    try:
        made = secure.collect(exchange, sorted(reports), rng, asked.survivors)
        update = mean(instruction, made, asked.range)
    except RoundError as error:  # what clients spent counts all the same
        told = (
            replace(r, error=f"{r.error}; {error}" if r.error else str(error), steps=0) for r in reports.values()
        )
        return Replies([], sorted(told, key=lambda r: r.client))
    for client in set(made.sent) & {c for c, r in reports.items() if r.error}:
        reports[client] = replace(reports[client], error=None)  # it went after it had sent: it is in the sum
    return Replies([update], [report for _, report in sorted(reports.items())])


class SecureEngine(Engine):
    """Clients in another engine, and between them and whoever asks the protocol of `fedlora.secure`.

    The engine plays the clients' side: each of them is a `Member` that masks its change before the `Collector`
    sees it. Clients weigh alike, and figures that they would share stay with them. One that fails has dropped
    out after the keys were shared, which is the worst moment to.
    """

    def __init__(self, inner: Engine, *, seed: int, asked: SecureAggregation) -> None:
        """Around an engine.

        Args:
            inner: that runs the clients.
            seed: of rounding, noise and neighbours.
            asked: the scenario's.
        """
        super().__init__(inner.num_clients)
        self.inner, self.seed, self.asked = inner, seed, asked

    def start(self, setup: Setup) -> Description:
        """The inner engine's."""
        self.description = self.inner.start(setup)
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """One update, the plain mean of those who sent, and a report for each client.

        Where too few are left to take the masks off there is none, and every report says so.
        """
        trained = self.inner.train(instruction, cohort, partial_sums=False)
        reports = {r.client: replace(r, metrics={}, bytes_up=0) for r in trained.reports}
        updates = {update.clients[0]: update for update in trained.updates}
        members = {client: secure.Member(client) for client in cohort}
        largest = self.asked.range

        def exchange(what: str, told: Mapping[int, secure.Parts]) -> dict[int, secure.Parts]:
            made: dict[int, secure.Parts] = {}
            for client, parts in told.items():
                if client not in updates and what in (secure.MASKED, secure.REVEAL):
                    continue

                def vector(client: int = client, parts: secure.Parts = parts) -> secure.Vector:
                    def draws(purpose: str) -> np.random.Generator:
                        return generator(self.seed, instruction.round, client, purpose)

                    return to_vector(instruction, updates[client], len(parts["members"]), largest, draws)

                had = reports[client]
                try:
                    made[client] = members[client].answer(what, parts, vector, self.asked.survivors)
                except ContractError as error:
                    reports[client] = replace(had, error=f"{type(error).__name__}: {error}", steps=0)
                    continue
                up, down = (wire.content_bytes(wire.pack_parts(p)) for p in (made[client], parts))
                down *= what != secure.KEYS  # which asks for nothing
                reports[client] = replace(had, bytes_up=had.bytes_up + up, bytes_down=had.bytes_down + down)
            return made

        rng = generator(self.seed, instruction.round, "neighbours")
        return replies(instruction, exchange, reports, self.asked, rng)

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """The inner engine's."""
        return self.inner.evaluate(adapter)

    def beside(self, adapter: Adapter) -> Callable[[], dict[str, float]] | None:
        """The inner engine's."""
        return self.inner.beside(adapter)

    def judge(self, instruction: Instruction, cohort: Sequence[int]) -> dict[str, float]:
        """The inner engine's."""
        return self.inner.judge(instruction, cohort)

    def merge(self, change: Change) -> None:
        """The inner engine's."""
        self.inner.merge(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """The inner engine's."""
        self.inner.export(adapter, folder, merged)

    def close(self) -> None:
        """The inner engine's."""
        self.inner.close()
