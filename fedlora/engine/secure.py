"""Secure aggregation: what leaves an engine is a sum, as a server under SecAgg+ learns it."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora import traffic, wire
from fedlora.adapter import Adapter, Change, Instruction, Update
from fedlora.engine.base import Engine, Figures
from fedlora.engine.replies import Replies, Report
from fedlora.engine.setup import Description, Setup
from fedlora.errors import ContractError, RoundError
from fedlora.privacy import grid, secure
from fedlora.privacy.collector import Sum, collect
from fedlora.privacy.graph import MOST_NEIGHBOURS
from fedlora.privacy.mechanisms.central import CLIP_NORM, COUNT_NOISE, SUM_NOISE, WITHIN
from fedlora.privacy.mechanisms.shared import MEMBERS
from fedlora.privacy.member import Member
from fedlora.privacy.noise import Stream
from fedlora.privacy.replay import Drawn, digest, versions
from fedlora.scenario import SecureAggregation
from fedlora.seeding import stream

_PLAYED = (4, 8, 12)  # clients among whom the protocol is carried out to count its bytes

Draws = Callable[[str], Stream]  # the random numbers of a client in a round, by purpose


def size(instruction: Instruction) -> int:
    """Numbers in a client's vector: its change, and where the bound adapts whether it was within it."""
    return sum(instruction.adapter[n].size for n in instruction.send) + (COUNT_NOISE in instruction.config)


def to_vector(
    instruction: Instruction, update: Update, members: int, most: int, largest: float, draws: Draws
) -> grid.Vector:
    """A client's change in whole steps, before it is masked; with its share of the noise where clients add it.

    Where the change is bounded, it is so after rounding too, and no number of it is refused: what is beyond
    `largest` is cut to it.

    Args:
        instruction: that it was sent.
        update: that it made.
        members: clients that are asked for one.
        most: clients that could be, which decides whether a sum fits; so one more or less does not.
        largest: that a number may change by.
        draws: for rounding and noise.

    Raises:
        ContractError: it does not fit.
    """
    told, bound = instruction.config, float(instruction.config.get(CLIP_NORM, 0.0))
    parts = [(update.adapter[n] - instruction.adapter[n]).ravel().astype(np.float64) for n in instruction.send]
    change = np.concatenate(parts)
    stds = [np.full(change.size, float(told.get(SUM_NOISE, 0.0)) * bound)]
    if told.get(MEMBERS, members) != members:
        raise ContractError("the server said that another number of clients is in the round")
    if CLIP_NORM in told:
        change = _within(np.clip(change, -largest, largest), bound, largest)
    if COUNT_NOISE in told:
        change = np.append(change, update.metrics[WITHIN] * largest)
        stds.append(np.array([float(told[COUNT_NOISE]) * largest]))
    std = np.concatenate(stds)
    grid.check_grid(std, largest, most)
    vector = grid.quantise(change, largest, draws("rounding"))
    if SUM_NOISE in told:
        share = draws(f"noise {told[SUM_NOISE]!r} {bound!r} {members}")
        vector += grid.noise(std / math.sqrt(members), largest, share)
    return vector


def _within(change: NDArray[np.float64], bound: float, largest: float) -> NDArray[np.float64]:
    """The change, shortened so that it is no longer than the bound when it is rounded.

    Raises:
        ContractError: rounding alone may be as long.
    """
    if (left := bound - grid.rounding(change.size, largest)) <= 0:
        raise ContractError("the grid is too coarse for clip_norm: lower secure_aggregation.range")
    norm = float(np.sqrt((change**2).sum()))
    return change * (left / norm) if norm > left else change


def mean(instruction: Instruction, made: Sum, largest: float) -> Update:
    """The plain mean of those who sent.

    Raises:
        RoundError: it is no mean of theirs: somebody's shares or masks were wrong.
    """
    sent = len(made.sent)
    values = grid.dequantise(made.total, largest) / sent
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
    return Update(adapter=adapter, weight=float(sent), clients=made.sent, metrics=within)


def replies(
    instruction: Instruction,
    exchange: secure.Exchange,
    reports: dict[int, Report],
    asked: SecureAggregation,
    rng: Stream,
) -> Replies:
    """The outcome of a round: one update for those who sent, and a report for each client.

    Args:
        instruction: of the round.
        exchange: with clients, which keeps their reports.
        reports: of each client of the cohort.
        asked: the scenario's.
        rng: draws pseudonyms.
    """
    try:
        made = collect(exchange, sorted(reports), rng, asked.survivors)
        update = mean(instruction, made, asked.range)
    except RoundError as error:  # what clients spent counts all the same
        told = (
            replace(r, error=f"{r.error}; {error}" if r.error else str(error), steps=0) for r in reports.values()
        )
        return Replies([], sorted(told, key=lambda r: r.client))
    for client in set(made.sent) & {c for c, r in reports.items() if r.error}:
        reports[client] = replace(reports[client], error=None)  # it went after it had sent: it is in the sum
    carried = len(made.sent) / len(made.members) if SUM_NOISE in instruction.config else 0.0
    return Replies([update], [report for _, report in sorted(reports.items())], carried=carried)


def exchanged(cohort: int) -> tuple[float, float]:
    """Bytes of a round's protocol that a client sends and is sent, for a vector of one number.

    The protocol is carried out among few. With n neighbours a client has n shares to seal, beside each of which it
    says whom it sees, so more neighbours are counted along a parabola; `MOST_NEIGHBOURS` is the most. Each further
    number of a vector adds four bytes to what a client sends.

    Args:
        cohort: clients of the round.
    """
    if cohort <= _PLAYED[-1]:
        return _played(cohort)
    up, down = np.polyfit(_PLAYED, [_played(few) for few in _PLAYED], 2).T  # (2, 3)
    seen = min(cohort, MOST_NEIGHBOURS + 1)
    return float(np.polyval(up, seen)), float(np.polyval(down, seen))


@lru_cache(maxsize=8)
def _played(cohort: int) -> tuple[float, float]:
    """The same by carrying it out."""
    reports = {c: Report(client=c) for c in range(cohort)}
    asked = SecureAggregation(survivors=1.0)
    exchange = played(reports, lambda *_: np.zeros(1, np.uint32), range(cohort), asked, cohort)
    collect(exchange, range(cohort), stream(0, "sizes"), 1.0)
    sent = [(r.bytes_up, r.bytes_down) for r in reports.values()]
    return sum(up for up, _ in sent) / cohort, sum(down for _, down in sent) / cohort


def played(
    reports: dict[int, Report],
    vector: Callable[[int, int], grid.Vector],
    there: Container[int],
    asked: SecureAggregation,
    most: int,
) -> secure.Exchange:
    """The clients' side of the protocol, in this process.

    Args:
        reports: of each client; what the exchanges cost it, and why it failed, goes in there.
        vector: of a client, as one of so many; it is had when it is about to be masked.
        there: who has one; others drop out after the keys were shared.
        asked: the scenario's.
        most: clients that a sum may have.
    """
    members: dict[int, Member] = {}

    def exchange(what: str, told: Mapping[int, secure.Parts]) -> dict[int, secure.Parts]:
        made: dict[int, secure.Parts] = {}
        for client, parts in told.items():
            if client not in there and what in (secure.MASKED, secure.REVEAL):
                continue
            had = reports[client]
            if what == secure.KEYS:
                (name,) = parts["you"]
                members[client] = Member(name)
            try:
                made[client] = members[client].answer(what, parts, partial(vector, client), asked.survivors, most)
            except ContractError as error:
                reports[client] = replace(had, error=f"{type(error).__name__}: {error}", steps=0)
                continue
            up, down = (traffic.content_bytes(wire.pack_parts(p)) for p in (made[client], parts))
            reports[client] = replace(had, bytes_up=had.bytes_up + up, bytes_down=had.bytes_down + down)
        return made

    return exchange


class SecureEngine(Engine):
    """Clients in another engine, and between them and whoever asks the protocol of `fedlora.privacy.secure`.

    The engine plays the clients' side: each of them is a `Member` that masks its change before the `Collector`
    sees it. Clients weigh alike, and figures that they would share stay with them. One that fails has dropped
    out after the keys were shared, which is the worst moment to.
    """

    def __init__(self, inner: Engine, *, seed: int, asked: SecureAggregation, most: int) -> None:
        """Around an engine.

        Args:
            inner: that runs the clients.
            seed: of rounding, noise and pseudonyms.
            asked: the scenario's.
            most: clients that a round may have.
        """
        super().__init__(inner.num_clients)
        self.inner, self.seed, self.asked, self.most = inner, seed, asked, most

    def start(self, setup: Setup) -> Description:
        """The inner engine's."""
        self.description = self.inner.start(setup)
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """One update, the plain mean of those who sent, and a report for each client.

        Where too few are left to take the masks off there is none, and every report says so.

        Raises:
            RoundError: shares of the noise were drawn for another sum, and no epsilon is left for another draw.
        """
        if self.asked.noise == "shared" and SUM_NOISE not in instruction.config:
            instruction = replace(instruction, config={**instruction.config, MEMBERS: len(cohort)})
        trained = self.inner.train(instruction, cohort, partial_sums=False)
        reports = {r.client: replace(r, metrics={}, bytes_up=0) for r in trained.reports}
        updates = {update.clients[0]: update for update in trained.updates}
        made_of = self._digest(instruction, cohort, trained) if SUM_NOISE in instruction.config else ""
        draw = instruction.drawn.get(None, Drawn()).draw(made_of) if made_of else 0

        def draws(client: int, purpose: str) -> Stream:
            nth = draw if made_of else reports[client].draw
            return stream(self.seed, instruction.round, client, purpose, *(("draw", nth) if nth else ()))

        def vector(client: int, among: int) -> grid.Vector:
            told = (updates[client], among, self.most, self.asked.range)
            return to_vector(instruction, *told, partial(draws, client))

        exchange = played(reports, vector, updates, self.asked, self.most)
        rng = stream(self.seed, instruction.round, "pseudonyms")
        return replace(replies(instruction, exchange, reports, self.asked, rng), digest=made_of)

    def _digest(self, instruction: Instruction, cohort: Sequence[int], trained: Replies) -> str:
        """Of all that makes the sum that clients' shares of the noise go into (`fedlora.privacy.replay`)."""
        asked = (list(cohort), dict(instruction.adapter), instruction.send, dict(instruction.config))
        sent = [(u.clients, u.adapter, dict(u.metrics)) for u in trained.updates]
        return digest(self.seed, "shares", versions(), self.asked.model_dump(), asked, sent)

    def evaluate(self, adapter: Adapter) -> Figures:
        """The inner engine's."""
        return self.inner.evaluate(adapter)

    def beside(self, adapter: Adapter) -> Callable[[], Figures] | None:
        """The inner engine's."""
        return self.inner.beside(adapter)

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """The inner engine's."""
        return self.inner.judge(instruction, cohort, test)

    def merge(self, change: Change) -> None:
        """The inner engine's."""
        self.inner.merge(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """The inner engine's."""
        self.inner.export(adapter, folder, merged)

    def close(self) -> None:
        """The inner engine's."""
        self.inner.close()
