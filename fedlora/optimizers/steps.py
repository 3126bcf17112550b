"""Whether clients can step as a scenario asks."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from fedlora import plugins
from fedlora.adapter import Layout
from fedlora.client import Client, Setter, Settings
from fedlora.errors import ContractError, SettingError, suggestion
from fedlora.optimizers.contract import Steps, find, grouped
from fedlora.rounds.server import check_rates
from fedlora.scenario import Scenario
from fedlora.strategy import Strategy


def check(client: Client, scenario: Scenario) -> None:
    """Make sure that a client can step as a scenario asks, as far as its class and options show.

    Raises:
        SettingError: it cannot.
    """
    told = scenario.clients
    asked = {"optimizer": told.optimizer, "schedule": told.schedule, "lr": told.lr if told.rates else None}
    for key, value in asked.items():
        if value is not None and not client.hooked:
            raise SettingError(
                f"clients.{key}",
                f"{plugins.called(type(client))} does not step by `self.optimizer`, which makes what is asked for "
                "here: leave it out, or see fedlora.client.Client.hooked",
            )
    if told.optimizer is None:
        return
    if type(client).optimizer is not Client.optimizer:
        raise SettingError(
            "clients.optimizer", f"{plugins.called(type(client))} makes an optimiser of its own: leave it out"
        )
    if "lr" in (told.optimizer.model_extra or {}):
        raise SettingError("clients.optimizer.lr", "the learning rate is clients.lr")
    cls = find(told.optimizer.kind)
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr")]
    for name in told.optimizer.model_extra or {}:
        if name not in known:
            raise SettingError(
                f"clients.optimizer.{name}",
                f"{told.optimizer.kind} has no option {name!r}: {suggestion(name, known)}",
            )


def check_steps(client: Client, layout: Layout, names: Sequence[str], settings: Settings) -> None:
    """Try a step of the optimiser on tensors of such shapes.

    Raises:
        SettingError: it refuses its options or the shapes, or needs more than gradients.
    """
    import torch

    parameters = [torch.nn.Parameter(torch.zeros(layout[name].shape)) for name in names]
    try:
        optimizer = client.optimizer(grouped(layout, names, parameters, settings), settings)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        steps = Steps(optimizer, names, parameters, settings)
        steps.take(0)
        steps.kept()
    except (TypeError, ValueError, RuntimeError, ContractError) as error:
        kind = settings.optimizer.get("kind", "sgd")
        raise SettingError("clients.optimizer", f"{kind} cannot step here: {error}") from error


def check_bound(client: Client, strategy: Strategy, scenario: Scenario) -> None:
    """Make sure that clients can step as asked on the tensors of a bound strategy.

    Raises:
        SettingError: they cannot, or a role has no learning rate.
    """
    told, layout = scenario.clients, strategy.layout
    if told.optimizer is None and not told.rates:
        return
    names = {n for round in (1, 2) for n in strategy.trains(round, layout) if layout[n].trainable}
    check_rates("clients.lr", told.lr, layout, names)
    instruction = strategy.instruct(1, strategy.initial)
    settings = replace(Setter(scenario, None)(instruction, 0), train=tuple(sorted(names)))
    check_steps(client, layout, settings.train, settings)
