"""`fedlora check`: what is wrong with a scenario that can be said without torch, a model or the Hub."""

from collections.abc import Callable

from fedlora import client, strategy, suitability
from fedlora.data import reading
from fedlora.errors import SettingError
from fedlora.scenario import Scenario
from fedlora.tasks.base_model import find_base
from fedlora.tasks.contract import find


def notes(scenario: Scenario) -> list[str]:
    """What is no mistake, and good to know, a sentence each."""
    asked, server, told = scenario.example_privacy, scenario.strategy.server, scenario.clients.optimizer
    if asked is None or asked.bands in (None, 1):
        return []
    others = [] if told is None or told.kind == "sgd" else [f"clients.optimizer: {told.kind}"]
    others += [] if server is None else [f"strategy.server: {server.kind}"]
    if not others:
        return []
    return [
        f"privacy.bands: noise cancels best in plain steps of SGD; under {' and '.join(others)} it protects as "
        "much, and may help less: measure it"
    ]


def problems(scenario: Scenario) -> list[str]:
    """Each problem in a line, with the file and line of its setting; none where all is fine."""

    def of_strategy() -> None:
        made = strategy.load(scenario.strategy.use, scenario.strategy.options)
        suitability.check(made, scenario)
        suitability.kind_of(made, scenario)

    def of_clients() -> None:
        made = client.load(scenario.clients.use, scenario.clients.options)
        client.check_fused(made, scenario.engine.fused)
        client.check_private(made, scenario)

    checks: tuple[Callable[[], object], ...] = (
        lambda: find(scenario.task),
        of_strategy,
        of_clients,
        lambda: find_base(scenario.model.base),
        lambda: reading.check(scenario.data, scenario.task, scenario.clients.total),
    )
    found: list[str] = []
    for check in checks:
        try:
            check()
        except SettingError as error:
            found += scenario.located(error).lines
    return found
