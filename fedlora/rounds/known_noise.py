"""How much noise a round's mean change carries, where that is public.

Of clients k with weights w_k, whose changes carry noise of standard deviation t_k in each number

    mean = sum_k w_k change_k / W,   W = sum_k w_k:   sqrt(sum_k (w_k t_k)^2) / W

with `w_k t_k` as the client says it of its settings and the event that it paid (`fedlora.Client.noise`). Where
clients are protected whole it is the server's own noise, `z C / n`. No private row is looked at: noise multiplier,
clipping norm, sampling rate and steps are in the ledger, and learning rates in the scenario.
"""

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedlora.adapter import Instruction, Layout, Update
from fedlora.client import Client, Setter
from fedlora.engine.replies import Report
from fedlora.errors import SettingError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.central import CLIP_NORM, Central
from fedlora.scenario import Scenario
from fedlora.strategy import Strategy
from fedlora.suitability import has_mean, means

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnownNoise:
    """The noise in the means of a run.

    Attributes:
        scenario: of the run.
        client: how its clients train.
        layout: of the adapter.
        central: the server's noise, where clients are protected whole.
    """

    scenario: Scenario
    client: Client
    layout: Layout
    central: Central | None = None

    def of(self, told: Instruction, updates: Sequence[Update], reports: Iterable[Report]) -> dict[str, float]:
        """Standard deviation of the noise in each number of the mean change, by tensor that was sent.

        Args:
            told: to the clients of the round.
            updates: that were averaged.
            reports: of these clients, and perhaps of others.
        """
        if self.central is not None:
            return dict.fromkeys(told.send, self.central.deviation(told.round, told.config[CLIP_NORM]))
        if self.scenario.example_privacy is None:
            return dict.fromkeys(told.send, 0.0)
        events = {report.client: report.event for report in reports}
        paid = [event for u in updates for c in u.clients if (event := events[c]) is not None]
        weight = sum(update.weight for update in updates)
        roles = {
            role: self._by_role(told, paid, role) / weight for role in {self.layout[n].role for n in told.send}
        }
        return {name: roles[self.layout[name].role] for name in told.send}

    def _by_role(self, told: Instruction, paid: Iterable[Event], role: str) -> float:
        settings = Setter(self.scenario, None)(told, 1)
        if self.scenario.secure_aggregation is not None:
            settings = replace(settings, share_metrics=False)  # a sum weighs clients alike
        counts: dict[Event, int] = {}
        for event in paid:
            counts[event] = counts.get(event, 0) + 1
        return math.sqrt(sum(n * self.client.noise(settings, e, role) ** 2 for e, n in counts.items()))


def make(
    strategy: Strategy, client: Client, scenario: Scenario, layout: Layout, central: Central | None
) -> KnownNoise | None:
    """The noise in the means of a run, where the scenario asks for it; a line says so where it is not known.

    Raises:
        SettingError: it is not, and something depends on it.
    """
    shrinks = scenario.strategy.shrink is not None
    if not (shrinks or scenario.diagnostics):
        return None
    try:
        check(strategy, client, scenario, "strategy.shrink" if shrinks else "diagnostics")
    except SettingError as error:
        if shrinks:
            raise
        logger.warning("noise_to_signal is null: %s", error)
        return None
    return KnownNoise(scenario=scenario, client=client, layout=layout, central=central)


def check(strategy: Strategy, client: Client, scenario: Scenario, key: str) -> None:
    """Make sure that the noise in a run's means will be known.

    Args:
        strategy: of the run.
        client: how its clients train.
        scenario: of the run.
        key: that asks for it.

    Raises:
        SettingError: it will not.
    """
    use, asked = scenario.strategy.use, scenario.example_privacy
    if not has_mean(strategy):
        raise SettingError(key, f"what {use} makes is no mean, whose noise is known: take one of {means()}")
    if scenario.compression is not None and scenario.compression.up is not None:
        raise SettingError(key, "compression.up changes what clients send: leave one of them out")
    if scenario.world is not None and scenario.world.concurrency is not None:
        raise SettingError(key, "world.concurrency mixes changes of several rounds: leave one of them out")
    if asked is None or scenario.client_privacy is not None:
        return
    adapter = scenario.model.adapter
    if adapter.rank(1) < adapter.r or scenario.clients.unequal_ranks(adapter.r):
        raise SettingError(key, "with ranks below the server's, numbers have noise of their own: leave one out")
    bands = 1 if asked.bands is None else 2
    event = Event(noise_multiplier=1.0, sample_rate=1.0, steps=1, clip_norm=1.0, bands=bands)
    probe = copy.copy(strategy)
    probe.private = client.private  # which its words may depend on
    told = Instruction(round=1, adapter={}, train=(), send=(), config=probe.config(1))
    client.noise(Setter(scenario, None)(told, 1), event, "head")
