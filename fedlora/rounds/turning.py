"""What a schedule of the adapter does in a round: what is asked, what the answers mean, and what comes after."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fedlora.adapter import Adapter, Change, Instruction, Tensor, Update
from fedlora.rounds.progress import Progress
from fedlora.rounds.server import ServerOptimizer
from fedlora.scenario import Scenario
from fedlora.schedules.contract import Schedule
from fedlora.schedules.levels import levelled, part

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Turning:
    """A schedule in the round loop.

    Attributes:
        schedule: bound to its layout.
        scenario: of the run.
    """

    schedule: Schedule
    scenario: Scenario

    def asked(self, told: Instruction, layers: Collection[str] | None = None, after: bool = False) -> Instruction:
        """An instruction, cut to what trains in its round.

        Args:
            told: of the strategy, to all ranks.
            layers: that train as the run has them; None: all.
            after: whether it is for clients' own models after the round, with all tensors.
        """
        told = replace(told, draw=self.schedule.draw(told.round + after))
        told = replace(told, adapter=told.ranked.get(self.scenario.ranks(told.round)[-1], told.adapter))
        layers = layers if (own := self.schedule.layers(told.round)) is None else own
        if layers is None or after:
            return told
        layout = self.schedule.layout
        still = {n for n, slot in layout.items() if slot.role != "head" and slot.module not in layers}
        cut = {rank: _without(still, adapter) for rank, adapter in told.ranked.items()}
        return replace(
            told,
            adapter=_without(still, told.adapter),
            ranked=cut,
            train=tuple(n for n in told.train if n not in still),
            send=tuple(n for n in told.send if n not in still),
            keep=tuple(n for n in told.keep if n not in still),
        )

    def meant(self, round: int, before: Mapping[str, Tensor], updates: list[Update]) -> list[Update]:
        """The updates of a round, at the server's rank."""
        ranks = self.scenario.ranks(round)
        if not self.schedule.unequal or ranks == [self.schedule.kind.r]:
            return updates

        def rank(update: Update) -> int:
            return ranks[0] if len(ranks) == 1 else self.scenario.rank(update.clients[0], round)

        return levelled(self.schedule.kind, self.schedule.layout, before, updates, rank)

    def turned(
        self, round: int, adapter: Adapter, now: Progress, server: ServerOptimizer | None
    ) -> tuple[Adapter, Change]:
        """The adapter as its schedule has it after a round, and what is merged into the base."""
        made = self.schedule.after(round, adapter)
        now.moments = {name: moment for name, moment in now.moments.items() if name not in made.anew}
        if made.layers is not None:
            now.layers = sorted(made.layers)
            logger.info("from now on %d layers train: %s", len(now.layers), ", ".join(now.layers))
        if server is not None:
            server.forget(made.anew)
        return {**(now.adapter if self.schedule.measures(round) else adapter), **made.adapter}, made.base

    def prefix(self, adapter: Adapter, rank: int) -> Adapter:
        """The first numbers of each tensor that trains, as many as a rank has."""
        kind, layout = self.schedule.kind, self.schedule.layout
        return {name: tensor[part(kind.shape(layout[name], rank))] for name, tensor in adapter.items()}


def _without(names: Collection[str], adapter: Adapter) -> Adapter:
    return {name: tensor for name, tensor in adapter.items() if name not in names}
