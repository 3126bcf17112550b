"""Baselines of a scenario: what its model could be without privacy, without federation, or without the others.

Each is a scenario of its own, made of another by `derive` and run as any other. With K clients a round that take
batches of b, over as many rounds and local steps, every baseline sees as many examples:

    pooled           one model on all rows, batches of K b, without privacy
    pooled_private   the same under the privacy of the scenario's examples: noise at one place that is trusted
    alone            each client by itself, batches of b, under its own epsilon
"""

from collections.abc import Mapping
from typing import Any

from fedlora import strategy as strategies
from fedlora.errors import SettingError, UserError, suggestion
from fedlora.scenario.baseline import KINDS, configuration
from fedlora.scenario.checks import validate
from fedlora.scenario.data import Sampled
from fedlora.scenario.learning import ServerAdam, ServerMomentum
from fedlora.scenario.sections import Scenario
from fedlora.strategy import Strategy

_LONGEST = 64  # letters of a scenario's name
_OF_MANY = ("secure_aggregation", "compression", "world")  # sections about clients among others
_NONE_LATE = {"min_replies": 1, "retries": 0, "max_norm": None, "max_examples": None}


def derive(scenario: Scenario, kind: str) -> Scenario:
    """The scenario of a baseline.

    Args:
        scenario: that it is a baseline of.
        kind: `pooled`, `pooled_private` or `alone`.

    Raises:
        UserError: the scenario has none of this kind.
    """
    if kind not in KINDS:
        raise UserError(f"baseline: unknown kind {kind!r}: {suggestion(kind, KINDS)}")
    try:
        return _derived(scenario, kind)
    except SettingError as error:
        raise scenario.located(error) from error


def _derived(scenario: Scenario, kind: str) -> Scenario:
    if scenario.baseline is not None:
        raise SettingError("baseline", f"this is a baseline already, {scenario.baseline.kind}: name its original")
    told = scenario.model_dump(mode="json")
    made = strategies.load(scenario.strategy.use, scenario.strategy.options)
    if made.personal:
        raise SettingError(
            "strategy.use",
            f"{scenario.strategy.use} ends with a model for each client, and {kind} is a baseline of one model",
        )
    told |= dict.fromkeys(_OF_MANY)
    told["clients"] |= _NONE_LATE
    told["name"] = f"{scenario.name[: _LONGEST - 1 - len(kind)]}.{kind}"
    told["baseline"] = {"kind": kind, "of": configuration(scenario.model_dump())}
    if kind == "alone":
        _alone(scenario, made, told)
    else:
        _pooled(scenario, told, private=kind == "pooled_private")
    derived, problems = validate(told)
    if derived is None:
        raise SettingError("baseline", f"{kind} cannot be made of this scenario: {problems[0].message}")
    return derived.written_in(scenario._source)


def _pooled(scenario: Scenario, told: dict[str, Any], private: bool) -> None:
    """One client that holds all rows, and takes at once what a cohort took."""
    given, example = scenario.clients, scenario.example_privacy
    told["clients"] |= {"total": 1, "batch_size": given.cohort_size * given.batch_size}
    if given.sample_rate is not None and isinstance(held := scenario.data.partition, Sampled):
        told["clients"]["batch_size"] = given.cohort_size * given.batch(held.examples)
        told["clients"]["sample_rate"] = None
    elif given.sample_rate is not None:
        told["clients"]["sample_rate"] = given.sample_rate * given.cohort_size / given.total
    told["clients"] |= dict.fromkeys(("per_round", "ranks", "tiers"))
    if (schedule := told["model"]["adapter"]["schedule"]) and schedule["kind"] == "nested":
        told["model"]["adapter"]["schedule"] = None  # of ranks, and it has one
    told["engine"]["fused"] = 1
    told["data"]["partition"] = {"kind": "iid"}
    if private:
        if example is None or scenario.client_privacy is not None:
            what = "protects whole clients" if scenario.client_privacy else "has no privacy"
            raise SettingError(
                "privacy", f"pooled_private keeps the privacy of examples, and this scenario {what}: take pooled"
            )
        return
    told["privacy"] = None
    if scenario.statistics is not None:
        told["statistics"]["epsilon"] = None
    if example is None:
        return
    data = scenario.data
    if example.person is not None and (data.files.test if data.files else data.hub and data.hub.test) is None:
        raise SettingError(
            "privacy.person",
            "decides which rows are held out, and pooled would hold out others: name test rows",
        )
    if given.use != "dp_sgd":
        raise SettingError(
            "clients.use", f"how {given.use} would train without privacy is its own to say: take pooled_private"
        )
    told["clients"]["use"] = "sgd"
    if not isinstance(scenario.strategy.server, ServerAdam) and not _scale_free(scenario):
        del told["clients"]["lr"]  # it was for gradients that are clipped


def _scale_free(scenario: Scenario) -> bool:
    """Whether a client's steps do not depend on how long gradients are."""
    return scenario.clients.optimizer is not None and "adam" in scenario.clients.optimizer.kind.lower()


def _alone(scenario: Scenario, made: Strategy, told: dict[str, Any]) -> None:
    """Each client keeps what it trains, and takes the server's steps itself."""
    if scenario.client_privacy is not None:
        raise SettingError("privacy.unit", "protects clients in what is made of many, and alone nothing is made")
    use, options = scenario.strategy.use, scenario.strategy.options
    told["strategy"] = {"use": "alone", "like": {"use": use, **options} if options else use}
    if scenario.model.adapter.named == "auto" and made.builds != Strategy.builds:
        told["model"]["adapter"]["kind"] = made.builds
    given = scenario.clients
    if given.averages_state:
        told["clients"]["optimizer"]["state"] = "kept"  # there are no others
    if (server := scenario.strategy.server) is None:
        return
    if given.optimizer is not None:
        raise SettingError(
            "clients.optimizer",
            f"alone a client takes one kind of steps, and {server.kind} is the server's: leave one out",
        )
    if server.schedule and given.schedule and isinstance(server, ServerMomentum):
        raise SettingError(
            "clients.schedule", "alone a client has one schedule, and strategy.server has one too: leave one out"
        )
    if server.kind == "yogi":
        raise SettingError("strategy.server.kind", "no client takes steps of yogi: alone is for adam and momentum")
    if server.schedule is not None:
        told["clients"]["schedule"] = server.schedule.model_dump(mode="json")
    elif isinstance(server, ServerAdam):
        told["clients"]["schedule"] = None  # Adam takes out how long the server's changes were
    options = server.model_dump(mode="json", exclude={"kind", "lr", "schedule"})
    if isinstance(server, ServerAdam):
        told["clients"] |= {
            "optimizer": {"kind": "adamw", "state": "kept", "correct_noise": False, **options},
            "lr": _times(server.lr, 1 / given.local_steps),  # a round takes it as far as one step of the server
        }
        return
    told["clients"]["lr"] = _times(server.lr, given.lr)
    if server.momentum:
        told["clients"]["optimizer"] = {"kind": "sgd", "state": "kept", **options}


def _times(one: float | Mapping[str, float], other: float | Mapping[str, float]) -> float | dict[str, float]:
    """The product of two learning rates, by role where either is."""
    if isinstance(one, Mapping):
        return {role: rate * (other[role] if isinstance(other, Mapping) else other) for role, rate in one.items()}
    return {role: rate * one for role, rate in other.items()} if isinstance(other, Mapping) else one * other
