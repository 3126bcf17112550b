"""Secure aggregation in simulation: what leaves this engine is a sum, as a server under SecAgg+ would learn it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlora import secure
from fedlora.adapter import Adapter, Change, Instruction, Update
from fedlora.central import WITHIN
from fedlora.engine.base import Engine
from fedlora.engine.intake import Replies, Report
from fedlora.engine.worker import Description, Setup
from fedlora.errors import ContractError, RoundError
from fedlora.seeding import generator


class SecureEngine(Engine):
    """Clients in another engine, and between them and whoever asks the protocol of `fedlora.secure`.

    The engine plays the clients' side: each of them is a `Member` that masks its change before the `Collector`
    sees it. Clients weigh alike, and figures that they would share stay with them. One that fails has dropped
    out after the keys were shared, which is the worst moment to.
    """

    def __init__(self, inner: Engine, *, seed: int, largest: float, share: float) -> None:
        """Around an engine.

        Args:
            inner: that runs the clients.
            seed: of the rounding.
            largest: that a number may change by.
            share: of the clients that must stay.
        """
        super().__init__(inner.num_clients)
        self.inner, self.seed, self.largest, self.share = inner, seed, largest, share

    def start(self, setup: Setup) -> Description:
        """The inner engine's."""
        self.description = self.inner.start(setup)
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """One update, the plain mean of those who sent, and a report for each client.

        Where too few are left to take the masks off there is none, and every report says so.
        """
        replies = self.inner.train(instruction, cohort, partial_sums=False)
        reports = {report.client: replace(report, metrics={}) for report in replies.reports}
        vectors: dict[int, secure.Vector] = {}
        for update in replies.updates:
            (client,) = update.clients
            try:
                vectors[client] = self._vector(instruction, update)
            except ContractError as error:
                reports[client] = replace(reports[client], error=f"{type(error).__name__}: {error}", steps=0)
        if not vectors:
            return Replies([], list(reports.values()))
        try:
            total = self._protocol(instruction.round, cohort, vectors, reports)
        except RoundError as error:  # what clients spent counts all the same
            return Replies([], [replace(r, error=r.error or str(error), steps=0) for r in reports.values()])
        mean = secure.dequantise(total, self.largest) / len(vectors)
        adapter: Adapter = {}
        start = 0
        for name in instruction.send:
            before = instruction.adapter[name]
            adapter[name] = (before + mean[start : start + before.size].reshape(before.shape)).astype(np.float32)
            start += before.size
        within = {WITHIN: float(mean[-1] / self.largest)} if len(mean) > start else {}
        update = Update(
            adapter=adapter, weight=float(len(vectors)), clients=tuple(sorted(vectors)), metrics=within
        )
        return Replies([update], list(reports.values()))

    def _vector(self, instruction: Instruction, update: Update) -> secure.Vector:
        """A client's change as integers; under client-level privacy with whether it was within the bound."""
        parts = [(update.adapter[n] - instruction.adapter[n]).ravel() for n in instruction.send]
        if WITHIN in update.metrics:
            parts.append(np.array([update.metrics[WITHIN] * self.largest]))
        rng = generator(self.seed, instruction.round, update.clients[0], "rounding")
        return secure.quantise(np.concatenate(parts), self.largest, rng)

    def _protocol(
        self,
        round: int,
        cohort: Sequence[int],
        vectors: Mapping[int, secure.Vector],
        reports: dict[int, Report],
    ) -> secure.Vector:
        around = secure.neighbours(cohort, generator(self.seed, round, "neighbours"))
        needed = secure.threshold(len(next(iter(around.values()))), self.share)
        members = {c: secure.Member(c) for c in cohort}
        keys = {c: m.keys for c, m in members.items()}
        sealed = {c: m.share({o: keys[o] for o in around[c]}, needed) for c, m in members.items()}
        masked = {
            c: members[c].mask(vectors[c], {o: sealed[o][c] for o in around[c] if o != c}) for c in sorted(vectors)
        }
        shares = {}
        for client in masked:
            sent = [o for o in around[client] if o in masked]
            if len(sent) >= needed:
                shares[client] = members[client].reveal(sent, [o for o in around[client] if o not in masked])
        for client, report in reports.items():
            plain = 4 * len(next(iter(masked.values()))) if client in masked else 0
            up = sum(map(len, keys[client])) + sum(map(len, sealed[client].values())) + plain
            up += sum(map(len, shares.get(client, {}).values()))
            down = sum(len(k) for o in around[client] for k in keys[o])
            down += sum(len(sealed[o][client]) for o in around[client] if o != client)
            reports[client] = replace(report, bytes_up=up, bytes_down=report.bytes_down + down)
        return secure.Collector(around, keys, needed).total(masked, shares)

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """The inner engine's."""
        return self.inner.evaluate(adapter)

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
