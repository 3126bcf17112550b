"""Kinds of adapter side by side, by arithmetic alone: nothing is built or drawn."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora import plugins, strategy, suitability
from fedlora.adapter import Layout, Slot
from fedlora.errors import FedloraError
from fedlora.kinds.contract import Kind
from fedlora.scenario import Scenario
from fedlora.strategy import Strategy


def compare(
    scenario: Scenario, own: Strategy, weights: Mapping[str, tuple[int, ...]], noise: float | None
) -> list[dict[str, Any]]:
    """What each built-in kind trains and sends under a scenario's strategy, and what noise it lets through.

    Args:
        scenario: whose kind is set aside.
        own: its strategy, bound.
        weights: of each layer that has a change its shape (out, in).
        noise: standard deviation in a number of the mean of a step; None without privacy.

    Returns:
        For each `kind` the numbers of its `adapter` and of the `head` that a client trains in the first round,
        `bytes_up` of these in float32 (None where they are not what is sent), the `gain` from noise on the numbers
        to the change of all weights at first, and the `noise` there, in Frobenius norm; or the `problem`.
    """
    head = {name: slot for name, slot in own.layout.items() if slot.role == "head"}
    if any(len(slot.shape) == 4 for slot in own.layout.values()):
        return [_of_convolutions(name, own, noise) for name in plugins.names("kinds")]
    return [_line(name, scenario, head, weights, noise) for name in plugins.names("kinds")]


def _of_convolutions(name: str, own: strategy.Strategy, noise: float | None) -> dict[str, Any]:
    """The line of a kind beside convolutions, whose sizes (out, in) does not say: of the scenario's own."""
    if plugins.find("kinds", name) is not type(own.kind):
        can = [other for other in plugins.names("kinds") if plugins.find("kinds", other).convolutions]
        return {"kind": name, "problem": f"not the scenario's; beside convolutions go {', '.join(can)}"}
    told = own.instruct(1, own.initial)
    count = {n: math.prod(own.layout[n].shape) for n in told.train}
    of_head = sum(size for n, size in count.items() if own.layout[n].role == "head")
    moving = {own.layout[n].role for n in told.train}
    gain = math.hypot(*own.kind.noise_gain(own.layout, own.initial, moving).values())
    sent = 4 * sum(count[n] for n in told.send)
    line = {
        "kind": name,
        "adapter": sum(count.values()) - of_head,
        "head": of_head,
        "bytes_up": sent,
        "gain": gain,
    }
    return line if noise is None else {**line, "noise": gain * noise}


def _line(
    name: str, scenario: Scenario, head: Layout, weights: Mapping[str, tuple[int, ...]], noise: float | None
) -> dict[str, Any]:
    adapter = scenario.model.adapter.model_copy(update={"kind": name})
    scenario = scenario.model_copy(update={"model": scenario.model.model_copy(update={"adapter": adapter})})
    made = strategy.load(scenario.strategy.use, scenario.strategy.options)
    try:
        suitability.check(made, scenario)
        kind = suitability.kind_of(made, scenario)
        for module, (out, into) in weights.items():
            kind.check_rank(module, out, into)
        layout = {**_layout(kind, weights), **head}
        first = {n: np.zeros(slot.shape, np.float32) for n, slot in layout.items()}
        made.bind(layout, kind, first, scenario.privacy is not None)
        told = made.instruct(1, first)
    except FedloraError as error:
        return {"kind": name, "problem": str(error)}
    except Exception as error:  # a strategy is anybody's code, and may know no such tensors
        return {"kind": name, "problem": f"{type(error).__name__}: {error}"}
    count = {n: math.prod(layout[n].shape) for n in told.train}
    of_head = sum(count[n] for n in told.train if n in head)
    gains = [kind.gain(out, into) for out, into in weights.values()]
    gain = None if None in gains else math.hypot(*(g or 0.0 for g in gains))
    line = {
        "kind": name,
        "adapter": sum(count.values()) - of_head,
        "head": of_head,
        "bytes_up": 4 * sum(count[n] for n in told.send) if made.trips == 1 else None,
        "gain": gain,
    }
    return line if noise is None else {**line, "noise": None if gain is None else gain * noise}


def _layout(kind: Kind, weights: Mapping[str, tuple[int, ...]]) -> Layout:
    """The tensors of a kind, by their layers and roles."""
    slots = (
        Slot(f"{module}.lora_{role}", kind.beside(role, out, into), role, module, part.trains)
        for module, (out, into) in weights.items()
        for role, part in kind.parts.items()
    )
    return {slot.name: slot for slot in slots}
