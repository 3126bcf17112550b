"""What a scenario will cost, before anything is trained.

Bytes and epsilon come from a rehearsal (`fedlora.rehearsal`), so they are what the run will count. Time and
memory come from a few steps of one client on this machine, and are estimates. Where a strategy chooses
ranks by what was learnt (FLoRIST), bytes are those of full ranks: the most that it can send.
"""

import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import advice, checking, plugins, prepare, reviewing, statistic_round
from fedlora import engine as engines
from fedlora import scenario as scenarios
from fedlora.client import Setter
from fedlora.compared import compare
from fedlora.data.store import Dataset
from fedlora.engine import Setup
from fedlora.engine.worker import Worker
from fedlora.errors import FedloraError, SettingError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event, in_sums
from fedlora.privacy.ledger import Holder, neighbours
from fedlora.privacy.ledger import unit as unit_of
from fedlora.privacy.mechanisms.bands import error
from fedlora.rehearsal import Rehearsal, Stage
from fedlora.reports.summary import own_epsilon, peer_epsilon, server_epsilon
from fedlora.rounds.progress import Line
from fedlora.scenario import Scenario
from fedlora.tasks.contract import find
from fedlora.tasks.located import at_hand

_EPSILONS = 100  # evaluations of epsilon in a table by round, some 50 ms each
_STEPS = 3  # that are timed
_LOOKED_AT = 10_000  # clients among which the median one is tried
_LONG = 40  # rounds of an alternative that are rehearsed; of more, the rest is as the second half of these


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will cost.

    Attributes:
        scenario, hash, strategy, clients_total: which run.
        rounds: a line for each: `round, clients, bytes_up, bytes_down`, and under privacy `epsilon`, the
            largest over clients, and `epsilon_median`; None in rounds for which it was not worked out.
        bytes_up_total, bytes_down_total: as the run will count them, if no client fails.
        parameters: numbers in the base model, and those that clients train, in the adapter and in the head.
        epsilon, delta, unit: at the end, for each example or person (the largest over clients) or for each client;
            None without privacy.
        person: the column that tells persons; None where these are not protected.
        neighbours: how datasets differ that it does not tell apart, in the ledger's word; None likewise.
        server_epsilon: for each client from the server that sees sums, or for each example or person; None where
            clients share no noise out.
        own_epsilon: for each example or person under its client's own part of the noise alone, where others' is
            counted upon; None elsewhere.
        peer_epsilon: for each client from another that is in all of its rounds under masks; None elsewhere.
        noise_multiplier: the largest over clients, or the server's; None without privacy.
        groups: clients by the number of examples that they hold (`num_examples`), or of persons where these are
            protected (`num_persons`), with what that means for their privacy.
        alternatives: bytes and parameters under each built-in strategy, or the `problem` that it has;
            `exact` is false where only the first of many rounds were rehearsed.
        kinds: a line for each built-in kind of adapter under this strategy (`fedlora.compared.compare`).
        virtual_seconds: that the rounds take in the simulated world; None without one.
        seconds: of the rounds, estimated; None where the model could not be tried here.
        memory_bytes: of a process that trains, estimated; None likewise.
        workers: processes that train side by side.
        stopped: why it will end before its last round; None if it will not.
        signal: signal and noise in the mean of a step (`fedlora.advice.Signal`); None without privacy.
        in_weights: noise in the weights over that of independent rounds; None where the server bands none.
        advice: with `advise` alternatives at the same examples and epsilon, the best ratio first.
        statistics: by which the base is cut, with its epsilon, noise and bytes, and the `seconds` that it and the
            cut take before the first round, estimated; None where there is none.
        frozen_bytes: on disk, of what the layers below all factors make of examples; None where that is not kept.
        warnings: what a privacy reviewer would ask.
    """

    scenario: str
    hash: str
    strategy: str
    clients_total: int
    rounds: Sequence[Line]
    bytes_up_total: int
    bytes_down_total: int
    parameters: Mapping[str, int]
    epsilon: float | None
    server_epsilon: float | None
    own_epsilon: float | None
    peer_epsilon: float | None
    delta: float | None
    unit: str | None
    person: str | None
    neighbours: str | None
    noise_multiplier: float | None
    groups: Sequence[Line]
    alternatives: Sequence[Line]
    kinds: Sequence[Line]
    virtual_seconds: float | None
    seconds: float | None
    memory_bytes: int | None
    workers: int
    stopped: str | None
    signal: Line | None
    in_weights: float | None
    advice: Sequence[Line]
    statistics: Line | None
    frozen_bytes: int | None
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(scenario: Scenario | str | Path, *, overrides: Sequence[str] = (), advise: bool = False) -> Plan:
    """What a scenario will cost, by a rehearsal that trains nothing.

    Args:
        scenario: a loaded one, a file, or the name of one that ships with fedlora.
        overrides: `a.b=value` settings; only with a file or a name.
        advise: look for a batch, local steps, rounds, layers and a rank with less noise for the same epsilon.

    Returns:
        Bytes, epsilon by round, noise, parameters, time and memory.

    Raises:
        UserError: the input is wrong.
    """
    scenario = scenarios.given(scenario, overrides)
    try:
        return _plan(scenario, advise)
    except SettingError as error:
        raise scenario.located(error) from error


def _plan(scenario: Scenario, advise: bool) -> Plan:
    if advise and scenario.privacy is None:
        raise SettingError("privacy", "without this section there is no noise to weigh: leave --advise out")
    ready = prepare.noised(prepare.prepare(scenario), prepare.known)
    setup, noise = ready.setup, ready.setup.noise
    cost = _try(setup, ready) if _can_train(scenario) else None
    metrics = cost.metrics if cost else _expected_metrics(scenario)
    stage = Stage(scenario, setup, ready, metrics)
    real = stage.rehearse(scenario.strategy.use, scenario.strategy.options, scenario.rounds)
    asked = scenario.privacy
    epsilons, each = _epsilons(real.ledger.spent_by, len(real.lines), asked)
    lines = [line | epsilons.get(line["round"], {}) for line in real.lines]
    groups = _groups(scenario, ready.data, setup, real)
    labels = len(ready.data.labels) if find(scenario.task).target in ("class", "many") else 0
    workers = 1 if engines.in_process(scenario) else engines.workers(scenario)
    parameters = {"base": stage.base_parameters(), **_trained(real)}
    typical = _typical(ready.data)
    noise_of = real.central.noise_multiplier if real.central else noise[typical] if noise else 0.0
    bands = real.central.bands if real.central else (setup.bands or {}).get(typical, 1)
    signal = advice.signal(scenario, real, noise_of, typical, bands)

    def seconds(made: Scenario, share: float) -> float | None:
        """Of an alternative's rounds: in proportion to examples and layers."""
        if cost is None:
            return None
        lines = [{"clients": made.clients.cohort_size}] * made.rounds
        told, before = made.clients, scenario.clients
        work = told.batch(typical) * told.local_steps / (before.batch(typical) * before.local_steps)
        part = replace(
            cost,
            client_seconds=cost.client_seconds * work * share,
            evaluation_seconds=cost.evaluation_seconds * share,
        )
        return part.run(made, lines, workers) + each * made.rounds

    def rehearse(made: Scenario) -> Rehearsal:
        return Stage(made, setup, ready, metrics).rehearse(made.strategy.use, made.strategy.options, 2)

    spent = prepare.statistic(scenario, prepare.known)
    statistic, told = statistic_round.planned(ready, spent), scenario.clients
    return Plan(
        scenario=scenario.name,
        hash=scenario.hash,
        strategy=scenario.strategy.use,
        clients_total=scenario.clients.total,
        rounds=lines,
        bytes_up_total=sum(line["bytes_up"] for line in lines) + (statistic["bytes_up"] if statistic else 0),
        bytes_down_total=sum(line["bytes_down"] for line in lines),
        parameters=parameters,
        epsilon=lines[-1]["epsilon"] if epsilons else None,
        server_epsilon=server_epsilon(scenario, real.ledger.events),
        own_epsilon=own_epsilon(scenario, real.ledger.events),
        peer_epsilon=peer_epsilon(scenario, real.ledger.events.get(None, ())),
        delta=asked.delta if asked else None,
        unit=asked.protects if asked else None,
        person=asked.person if asked else None,
        neighbours=neighbours(asked.protects) if asked else None,
        noise_multiplier=real.central.noise_multiplier if real.central else max(noise.values()) if noise else None,
        groups=groups,
        alternatives=[_alternative(name, stage) for name in plugins.names("strategies")],
        kinds=compare(scenario, real.strategy, real.engine.description.weights, signal.noise if signal else None),
        virtual_seconds=lines[-1].get("virtual_seconds") if lines else None,
        seconds=cost.run(scenario, lines, workers) + each * len(lines) if cost else None,
        memory_bytes=cost.memory_bytes if cost else None,
        workers=workers,
        stopped=real.stopped,
        signal=signal.to_json() if signal else None,
        in_weights=_in_weights(
            asked, bands, noise_of, told.cohort_size / told.total, scenario.rounds, asked.reserve
        )
        if asked and real.central and bands > 1
        else None,
        advice=advice.advise(scenario, signal, real, ready.data.unit_sizes(), typical, rehearse, seconds)
        if signal and advise
        else [],
        frozen_bytes=cost.frozen_bytes if cost else None,
        statistics=statistic,
        warnings=[
            *filter(None, [statistic_round.words(scenario, spent)]),
            *reviewing.warnings(scenario, groups, parameters, labels, signal),
            *checking.remarks(scenario),
        ],
    )


def _can_train(scenario: Scenario) -> bool:
    """Whether a client can be tried here: the weights are on this machine, and a GPU if one is asked for."""
    import torch

    gpu = scenario.engine.gpus_per_worker in (0, "auto") or torch.cuda.is_available()
    return gpu and at_hand(scenario.model.base, scenario.model.revision)


def _expected_metrics(scenario: Scenario) -> Mapping[str, float]:
    """What a built-in client's update reports beside its tensors."""
    return {"train_loss": 0.0} if scenario.privacy is None or scenario.privacy.share_metrics else {}


def _alternative(name: str, stage: Stage) -> Line:
    """What a built-in strategy with its default options would send."""
    rounds = stage.scenario.rounds
    try:
        loop = stage.rehearse(name, {}, min(rounds, _LONG))
    except FedloraError as error:
        return {"strategy": name, "problem": str(error)}
    rest = max(rounds - _LONG, 0) / (_LONG // 2)
    totals = {}
    for way in ("bytes_up", "bytes_down"):
        sizes = [line[way] for line in loop.lines]
        totals[f"{way}_total"] = sum(sizes) + round(rest * sum(sizes[_LONG // 2 :]))
    return {"strategy": name, **totals, "exact": not rest, **_trained(loop)}


def _trained(loop: Rehearsal) -> dict[str, int]:
    """Numbers that clients train in some round, in the adapter and in the head."""
    layout, rounds = loop.strategy.layout, range(1, min(len(loop.lines), 2) + 1)
    names = {n for r in rounds for n in loop.strategy.trains(r, layout) if layout[n].trainable}
    count = {n: int(np.prod(layout[n].shape)) for n in names}
    head = sum(size for n, size in count.items() if layout[n].role == "head")
    return {"adapter": sum(count.values()) - head, "head": head}


def _epsilons(
    spent: Mapping[Holder, Sequence[tuple[int, Event]]], rounds: int, asked: scenarios.Privacy | None
) -> tuple[dict[int, Line], float]:
    """Epsilon after each round, or after some where there are many; and the seconds that a round's take."""
    if asked is None:
        return {}, 0.0
    spent = {holder: events for holder, events in spent.items() if unit_of(holder) == asked.unit}
    if not spent:
        return {}, 0.0
    kinds = len({tuple(event for _, event in events) for events in spent.values()})
    step = -(-rounds * kinds // _EPSILONS)
    table, began = {}, time.perf_counter()
    for round in sorted({1, rounds, *range(step, rounds, step)}):
        each = [
            accounting.epsilon(in_sums(e for r, e in events if r <= round), asked.delta, asked.accountant)
            for events in spent.values()
        ]
        table[round] = {"epsilon": max(each), "epsilon_median": statistics.median(each)}
    return table, (time.perf_counter() - began) / len(table)


def _groups(scenario: Scenario, data: Dataset, setup: Setup, loop: Rehearsal) -> list[Line]:
    """Clients that hold equally many examples, or persons where they are protected, from the fewest.

    Without privacy only how many they are.

    Where noise is banded also its `bands`, and `in_weights`: the noise in the weights, as the root mean square
    over the steps, over that of DP-SGD at the same epsilon.
    """
    asked, noise, groups = scenario.example_privacy, setup.noise, []
    most: dict[int, float] = {}  # epsilon, by the number of examples or persons
    for client, events in loop.ledger.events.items():
        if asked is not None and isinstance(client, int):
            size, spent = data.units(client), accounting.epsilon(in_sums(events), asked.delta, asked.accountant)
            most[size] = max(most.get(size, 0.0), spent)
    counted_by = "num_examples" if data.persons is None else "num_persons"
    for size, clients in data.unit_sizes().items():
        line: Line = {counted_by: size, "clients": clients}
        if asked is not None and noise is not None:
            line |= {
                "sample_rate": min(scenario.clients.rate(size), 1.0),
                "noise_multiplier": noise[size],
                "epsilon": most.get(size, 0.0),
            }
            if setup.bands is not None:
                b, rate = setup.bands[size], scenario.clients.rate(size)
                steps = (scenario.rounds + asked.reserve) * scenario.clients.local_steps
                line |= {"bands": b, "in_weights": _in_weights(asked, b, noise[size], rate, steps)}
        groups.append(line)
    return groups


def _in_weights(asked: scenarios.Privacy, b: int, sigma: float, rate: float, steps: int, spare: int = 0) -> float:
    """Noise in the weights of b bands over that of independent steps at the same epsilon.

    Args:
        asked: what is promised.
        b: of the noise.
        sigma: noise multiplier at these bands.
        rate: with which independent steps, or rounds, take an example, or a client.
        steps: of the run; of a client, with those in reserve.
        spare: rounds in reserve, where the noise is the server's.
    """
    if b == 1:
        return 1.0
    if (target := asked.epsilon) is None or asked.noise_multiplier is not None:
        event = Event(
            noise_multiplier=sigma, sample_rate=min(b * rate, 1.0), steps=steps, clip_norm=asked.clip_norm, bands=b
        )
        target = accounting.epsilon([event], asked.delta, asked.accountant)
    (plain,) = prepare.known(target, asked.delta, [min(rate, 1.0)], steps + spare, asked.accountant)
    return sigma * error(b, steps) / (plain * error(1, steps))


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What a client cost here.

    Attributes:
        client_seconds: of a client in a round.
        evaluation_seconds: of the test set.
        memory_bytes: the most that this process held.
        metrics: what its update reported.
        frozen_bytes: on disk, of what the frozen layers make of the examples; None where that is not kept.
    """

    client_seconds: float
    evaluation_seconds: float
    memory_bytes: int
    metrics: Mapping[str, float]
    frozen_bytes: int | None

    def run(self, scenario: Scenario, lines: Sequence[Line], workers: int) -> float:
        """Seconds of all rounds."""
        evaluations = -(-len(lines) // scenario.eval_every)
        waves: int = sum(-(-line["clients"] // workers) for line in lines)
        return waves * self.client_seconds + evaluations * self.evaluation_seconds / workers


def _try(setup: Setup, ready: prepare.Prepared) -> _Cost:
    """Time a few steps of the client with the median number of examples, and a piece of the test set."""
    worker, data = Worker(setup), ready.data
    told = worker.scenario.clients
    typical = _typical(data)
    median = next(c for c in range(data.num_clients) if data.units(c) == typical)
    whole = told.batch(typical)
    batch = min(whole, 2 * told.micro_batch_size)
    instruction = worker.strategy.instruct(1, dict(worker.task.initial), worker.scenario.ranks(1))
    alone = {"secure_aggregation": None}  # a part of the noise is for one step
    for steps in (1, _STEPS):  # the first is slower: memory is got, kernels are chosen
        fewer = told.model_copy(update={"local_steps": steps, "batch_size": batch, "sample_rate": None})
        worker.settings = Setter(worker.scenario.model_copy(update={"clients": fewer, **alone}), setup.noise)
        replies = worker.train(instruction, [median], False)
        if replies.reports[0].error is not None:
            raise SettingError("clients.use", f"a client that was tried failed: {replies.reports[0].error}")
    rows, began = min(len(data.test), engines.EVALUATION_CHUNK), time.perf_counter()
    worker.evaluate(worker.task.initial, "test", 0, rows)
    evaluation = (time.perf_counter() - began) * (len(data.test) + len(data.validation)) / rows
    step = replies.reports[0].seconds / _STEPS * whole / batch
    wanted = worker.kept.wanted if worker.kept is not None else None
    return _Cost(
        client_seconds=step * told.local_steps,
        evaluation_seconds=evaluation,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        metrics=replies.updates[0].metrics,
        frozen_bytes=wanted.size if wanted else None,
    )


def _typical(data: Dataset) -> int:
    """Examples of the median client, or persons where they are protected."""
    return statistics.median_high([data.units(c) for c in range(min(data.num_clients, _LOOKED_AT))])
