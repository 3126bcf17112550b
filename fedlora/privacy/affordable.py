"""Whether a budget beside noise of its own pays for one round: `privacy.epsilon` and `noise_multiplier`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedlora.errors import SettingError
from fedlora.privacy.accounting import Event, epsilon, in_sums
from fedlora.scenario import Privacy, Scenario

_LIVES = 100  # how often an honest site may have run each round


def check(scenario: Scenario, sizes: Sequence[int]) -> None:
    """Refuse a budget that the first round of every client would pass.

    Args:
        scenario: of the run.
        sizes: examples of clients; none where nobody knows, and then examples are not looked at.

    Raises:
        SettingError: not even the client that spends least may train in one round.
    """
    told = scenario.clients
    if (whole := scenario.client_privacy) is not None:
        _refuse("privacy", whole, told.cohort_size / told.total, 1)
    example, held = scenario.example_privacy, [size for size in sizes if size]
    if example is not None and held:
        key = "privacy" if example is scenario.privacy else "privacy.example"
        _refuse(key, example, min(min(told.rate(size), 1.0) for size in held), told.local_steps)


def _refuse(key: str, asked: Privacy, rate: float, steps: int) -> None:
    if asked.epsilon is None or asked.noise_multiplier is None:
        return
    event = Event(noise_multiplier=asked.noise_multiplier, sample_rate=rate, steps=steps, clip_norm=1.0)
    if (spent := epsilon([event], asked.delta, asked.accountant)) > asked.epsilon * (1 + 1e-9):
        cost = f"epsilon {spent:.3g}" if spent < float("inf") else "more than any epsilon"
        raise SettingError(
            f"{key}.epsilon",
            f"one round under noise_multiplier {asked.noise_multiplier:g} costs {cost}, and the budget is "
            f"{asked.epsilon:g}: nobody could train; leave noise_multiplier out, which is then found, or raise it",
        )


def could_be(events: Iterable[Event], scenario: Scenario) -> bool:
    """Whether an honest site may have paid that in a run; it takes little time to say, whatever the events are."""
    asked, told, events = scenario.example_privacy, scenario.clients, tuple(events)
    if asked is None:
        return not events
    most = scenario.rounds * told.local_steps * _LIVES
    shares = 1 if scenario.shares_example_noise is None else scenario.most_members
    for event in events:
        if _of_statistic(event, scenario, asked):
            continue
        fits = 0 < event.steps <= most and (event.bands == 1 or asked.bands is not None)
        whole = event.noise_multiplier * math.sqrt(event.sharers)
        if not fits or event.sharers > shares or abs((asked.noise_multiplier or whole) / whole - 1) > 1e-12:
            return False
    limit = math.inf if asked.epsilon is None else asked.epsilon * (1 + 1e-6)
    return not events or epsilon(in_sums(events), asked.delta, asked.accountant) <= limit


def _of_statistic(event: Event, scenario: Scenario, asked: Privacy) -> bool:
    """Whether that is what a statistic costs before the first round, however often it was begun."""
    told = scenario.statistics
    if told is None or told.epsilon is None or not 0 < event.steps <= _LIVES:
        return False
    shares = 1 if scenario.shares_example_noise is None else scenario.clients.total
    once = replace(event, steps=1)
    if event.sharers > shares or once != replace(once, sample_rate=told.share, clip_norm=1.0, bands=1):
        return False
    return epsilon(in_sums([once]), asked.delta, asked.accountant) <= told.epsilon * (1 + 1e-6)
