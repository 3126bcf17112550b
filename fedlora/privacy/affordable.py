"""Whether a budget beside noise of its own pays for one round: `privacy.epsilon` and `noise_multiplier`."""

from collections.abc import Sequence

from fedlora.errors import SettingError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.scenario import Privacy, Scenario


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
