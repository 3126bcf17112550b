"""From a scenario to all that a run needs but the model: data, plug-ins, calibrated noise."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedlora import client as clients
from fedlora import engine as engines
from fedlora import starting, suitability
from fedlora import strategy as strategies
from fedlora.data import reading
from fedlora.data import store as datasets
from fedlora.data.cache import cache_folder
from fedlora.engine.setup import Setup
from fedlora.errors import ContractError, SettingError, counted
from fedlora.metrics import contract as metrics
from fedlora.optimizers import steps
from fedlora.privacy import accounting, affordable, calibrated, replay
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import bands, shared
from fedlora.privacy.mechanisms.central import Central
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.mechanisms.statistic import StatisticGaussian
from fedlora.rounds import choice, known_noise
from fedlora.rounds.world import World
from fedlora.scenario import Privacy, Scenario
from fedlora.seeding import Root
from fedlora.tasks import base_model, weights
from fedlora.tasks import contract as tasks
from fedlora.tasks.encoding import encoded

_FEW = 16  # numbers of examples for each of which bands are chosen

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A scenario with everything checked that can be before a model is loaded."""

    scenario: Scenario
    strategy: strategies.Strategy
    client: clients.Client
    data: datasets.Dataset
    setup: Setup


def prepare(scenario: Scenario) -> Prepared:
    """Everything that a run needs but the model and the calibrated noise.

    Raises:
        SettingError: a setting does not fit the data.
    """
    scenario = separated(scenario)
    data, total = scenario.data, scenario.clients.total
    for line in scenario.unused:
        logger.warning("%s", line)
    ready = _prepared(
        scenario,
        lambda encode, key: datasets.prepare(
            data, scenario.task, total, scenario.seed, encode, key, scenario.person
        ),
    )
    return replace(ready, setup=replace(ready.setup, kept=(cache_folder() / "frozen").absolute()))


def separated(scenario: Scenario, at_sites: bool = False) -> Scenario:
    """The scenario with what stands between labels, as `fedlora.data.reading.separated` finds it.

    Args:
        scenario: as it was given.
        at_sites: whether the training rows are there, and only the test rows here.

    Raises:
        SettingError: the rows cannot be read.
    """
    part: Literal["train", "test"] = "test" if at_sites and scenario.data.files else "train"
    if (data := reading.separated(scenario.data, scenario.task, part)) is scenario.data:
        return scenario
    return scenario.model_copy(update={"data": data})


def prepare_server(scenario: Scenario) -> Prepared:
    """The same where clients are sites that keep their examples: the server has the test rows alone.

    Raises:
        SettingError: there are none, or the scenario asks for what sites cannot do.
    """
    suitability.check_sites(strategies.load(scenario.strategy.use, scenario.strategy.options), scenario)
    given, scenario = scenario, separated(scenario, at_sites=True)
    data, total = scenario.data, scenario.clients.total
    every, labels = reading.read_test(data, scenario.task)
    test, validation = reading.set_aside(data, scenario.task, every)

    def hold(encode: datasets.Encode, key: str) -> datasets.Dataset:
        told = (data, scenario.task, total, scenario.seed, encode, key, labels)
        return datasets.hold(*told, test=test, validation=validation)

    ready = _prepared(scenario, hold, labels)
    sent = given.model_dump()  # as it was signed; sites name what stands between labels of their own rows
    return replace(ready, setup=replace(ready.setup, scenario=sent, secret=True))


def prepare_site(
    scenario: Scenario, labels: Sequence[str], rows: reading.Rows, client: int, own: bytes, **placed: Any
) -> Setup:
    """What a site's worker needs, its noise calibrated to the rows that it holds.

    Args:
        scenario: that the server sent.
        labels: that the server sent, in order.
        rows: of the site's own file, with their persons where the scenario protects these.
        client: which client the site is.
        own: a key of the site's own, which it draws the rows from that it holds out.
        placed: fields of `Setup` that are the site's own choice, such as `threads`.

    Raises:
        SettingError: a setting does not fit the rows.
    """
    data, total = scenario.data, scenario.clients.total

    def hold(encode: datasets.Encode, key: str) -> datasets.Dataset:
        return datasets.hold(data, scenario.task, total, own, encode, key, labels, train=rows, client=client)

    ready = _prepared(scenario, hold, labels)
    return replace(noised(ready, accounting.calibrations).setup, secret=ready.client.private, **placed)


def check(scenario: Scenario) -> tuple[strategies.Strategy, clients.Client]:
    """The strategy and the client that a scenario names, all checked that needs neither data nor model.

    Raises:
        SettingError: something is not there, or does not go with the rest.
    """
    strategy = strategies.load(scenario.strategy.use, scenario.strategy.options)
    suitability.check(strategy, scenario)
    client = clients.load(scenario.clients.use, scenario.clients.options)
    clients.check_fused(client, scenario.engine.fused)
    steps.check(client, scenario)
    clients.check_private(client, scenario)
    if scenario.strategy.shrink is not None:
        known_noise.check(strategy, client, scenario, "strategy.shrink")
    if scenario.world is not None:
        World(scenario)  # reads its trace
    task = tasks.find(scenario.task)
    choice.make(scenario, task.metric, task.higher_is_better)
    return strategy, client


def _prepared(
    scenario: Scenario,
    hold: Callable[[datasets.Encode, str], datasets.Dataset],
    labels: Sequence[str] | None = None,
) -> Prepared:
    """Everything that a run needs but the noise, with what `hold` makes of the tokenizer for its data."""
    strategy, client = check(scenario)
    model, data, task = scenario.model, scenario.data, tasks.find(scenario.task)
    reader = task.reader(model.base, model.revision)
    names = list(labels or data.labels or ())

    def encode(rows: reading.Rows) -> datasets.Encoded:
        if task.labelled and not names:  # the training rows come first, and hold every label
            names.extend(reading.label_names(data, rows, scenario.task))
        return encoded(task, scenario.task, reader, rows, names, data.max_length)

    dataset = hold(encode, encoding(scenario.task, task, reader))
    _tell_heads(scenario, task, dataset.labels)
    for metric in metrics.find_all(scenario.metrics, task.target):
        if metric.takes is None:
            metrics.try_out(metric, task.target, dataset.labels)
    if dataset.cut:
        logger.warning(
            "%d of %d test rows are longer than data.max_length (%d tokens) and are judged by what it leaves",
            *(dataset.cut, len(dataset.test), data.max_length),
        )
    setup = Setup(
        scenario=weights.resolved(scenario, dataset).model_dump(),
        dataset=dataset.folder,
        partitions=dataset.partition_folder,
        threads=engines.threads(scenario),
        precision=scenario.engine.precision,
        device=engines.device(scenario),
    )
    return Prepared(scenario=scenario, strategy=strategy, client=client, data=dataset, setup=setup)


def encoding(use: str, task: type[tasks.Task], reader: Any) -> str:
    """Differs where rows would be encoded in another way: by another tokenizer, or by a custom task.

    Args:
        use: the task's name.
        task: of that name.
        reader: as the task gives it.
    """
    made = base_model.encoding_fingerprint(reader)
    return f"{made} {replay.code(task)}" if ":" in use else made


def _tell_heads(scenario: Scenario, task: type[tasks.Task], labels: Sequence[str]) -> None:
    """Say where a head is drawn again, though the start or the base has one.

    Raises:
        SettingError: the start cannot be had, or is of another base.
    """
    model = scenario.model
    if (start := starting.read(scenario, labels)) is not None and start.left_out:
        logger.warning("model.start: its head is not taken over: %s", start.left_out)
    if start is None and model.head != "kept" and task.labelled:
        if other := base_model.other_labels(model.base, model.revision, labels):
            logger.warning(
                "model.base: the head is drawn again: %s is for the labels %s and not for %s in this order "
                "(model.head: kept takes it all the same)",
                *(model.base, starting.few(other), starting.few(labels)),
            )


def noised(ready: Prepared, search: calibrated.Search) -> Prepared:
    """What was prepared with the noise of each client, and its bands."""
    scenario, data = ready.scenario, ready.data
    noise, bands = calibrate(scenario, data, search), banded(scenario, data, search)
    return replace(ready, setup=replace(ready.setup, noise=noise, bands=bands))


def banded(
    scenario: Scenario, data: datasets.Dataset, search: calibrated.Search = accounting.calibrations
) -> dict[int, int] | None:
    """The bands of the noise for each number of examples, or persons, that a client holds; None: independent.

    The arguments are those of `calibrate`.

    Raises:
        SettingError: there are more than steps, or a client has too few examples for as many groups.
    """
    told, asked = scenario.clients, scenario.example_privacy
    if asked is None or asked.bands is None:
        return None
    search = _beside_statistic(scenario, search)
    where = "privacy.bands" if asked is scenario.privacy else "privacy.example.bands"
    sizes, steps = sorted(data.unit_sizes().keys() - {0}), scenario.counted_steps
    if asked.bands == "auto":
        target, delta, accountant = asked.epsilon, asked.delta, asked.accountant
        assert target is not None

        def noise(rate: float, turns: int) -> float:
            return search(target, delta, [rate], turns, accountant)[0]

        rates = {size: min(told.rate(size), 1.0) for size in sizes}
        near = rates if len(sizes) <= _FEW else {size: _rounded_up(rate) for size, rate in rates.items()}
        best = {rate: bands.choose(target, delta, rate, steps, noise) for rate in sorted(set(near.values()))}
        return {size: best[near[size]] for size in sizes}
    if asked.bands > steps:
        raise SettingError(
            where, f"{asked.bands} bands are more than the run's {steps} steps: name fewer, or auto"
        )
    if sizes and (rate := told.rate(sizes[0])) * asked.bands > 1 + 1e-9:
        raise SettingError(
            where,
            f"a client has {counted(sizes[0], asked.protects)}, and a step would take {told.batch(sizes[0])} on "
            f"average from one in {asked.bands} of them: name {max(int(1 / rate), 1)} at most, or auto",
        )
    return dict.fromkeys(sizes, asked.bands)


def statistic(
    scenario: Scenario, search: calibrated.Search = accounting.calibrations, members: int | None = None
) -> Event | None:
    """What the statistic costs each client by which its base is cut; None where there is none, or no privacy.

    Args:
        scenario: of the run.
        search: as in `calibrate`.
        members: clients that share the noise out, where they do; by default all.
    """
    asked, told = scenario.example_privacy, scenario.statistics
    if asked is None or told is None or told.epsilon is None:
        return None
    (noise,) = search(told.epsilon, asked.delta, [told.share], 1, asked.accountant)
    parts = scenario.noise_parts(members or scenario.clients.total)
    part = noise / math.sqrt(parts)
    return StatisticGaussian(noise_multiplier=part, sample_rate=told.share, total=1, sharers=parts).event()


def _beside_statistic(scenario: Scenario, search: calibrated.Search) -> calibrated.Search:
    """A search for the noise of training, which has what the statistic leaves of epsilon."""
    event = statistic(scenario, search)
    return search if event is None else lambda *told: search(*told, accounting.in_sums([event]))


def _rounded_up(rate: float) -> float:
    """To one of eight sampling rates in a decade, so that many clients need few searches."""
    return float(min(10 ** (np.ceil(np.log10(rate) * 8) / 8), 1.0))


def calibrate(
    scenario: Scenario, data: datasets.Dataset, search: calibrated.Search = accounting.calibrations
) -> dict[int, float] | None:
    """The noise multiplier for each number of examples, or persons, that a client holds; None without privacy.

    Calibrated over all the steps that a client can be asked for: every round of the scenario.

    Args:
        scenario: of the run.
        data: that clients hold.
        search: finds the noise; `known` looks among what was found before.
    """
    told, asked = scenario.clients, scenario.example_privacy
    if asked is None:
        return None
    sizes = sorted(data.unit_sizes().keys() - {0})  # 0: held elsewhere
    if asked.delta >= 1 / sizes[-1]:
        logger.warning(
            "privacy.delta: %g is not below 1/%d, one over the %ss of the largest client: at such a delta a "
            "mechanism that gives a whole %s away now and then counts as private; write %.0e or less",
            *(asked.delta, sizes[-1], asked.protects, asked.protects, 0.1 / sizes[-1]),
        )
    if told.batch(sizes[0]) > sizes[0]:
        raise SettingError(
            "clients.batch_size",
            f"a client has {counted(sizes[0], asked.protects)}, and a private batch takes {told.batch_size} of "
            "them on average; lower it, use fewer clients, or raise data.partition.min_examples",
        )
    affordable.check(scenario, sizes)
    rates, steps = [told.rate(size) for size in sizes], scenario.counted_steps
    groups = banded(scenario, data, search) or dict.fromkeys(sizes, 1)
    search = _beside_statistic(scenario, search)
    if asked.noise_multiplier is not None:
        noise = dict.fromkeys(sizes, asked.noise_multiplier)
    else:
        assert asked.epsilon is not None
        noise = {}
        for b in sorted(set(groups.values())):
            mine = [
                (size, min(b * rate, 1.0)) for size, rate in zip(sizes, rates, strict=True) if groups[size] == b
            ]
            found = search(
                asked.epsilon, asked.delta, [rate for _, rate in mine], -(-steps // b), asked.accountant
            )
            noise |= zip((size for size, _ in mine), found, strict=True)
    ExampleGaussian(  # refuses what does not fit the largest noise
        noise_multiplier=max(noise.values()),
        sample_rate=rates[0],
        total=sizes[0],
        quantile=asked.clip.quantile,
        batch_size=told.batch(sizes[0]),
        steps=told.local_steps,
        clip_norm=asked.clip_norm,
        clip=asked.clip.kind,
    )
    return noise if scenario.shares_example_noise is None else _shared(scenario, asked, noise)


def _shared(scenario: Scenario, asked: Privacy, noise: Mapping[int, float]) -> dict[int, float]:
    """The noise of a sum that clients share out: the most that any of them needs.

    Raises:
        SettingError: a part of it does not fit on the grid.
    """
    told, masks, most = scenario.clients, scenario.secure_aggregation, max(noise.values())
    assert masks is not None
    many = scenario.noise_parts(scenario.most_members)
    paces = {told.pace(round, scenario.rounds)[0] for round in range(1, scenario.rounds + 1)}
    rates = told.rates.values() if isinstance(told.lr, dict) else [told.lr]
    try:
        for lr in {pace * rate for pace in (max(paces), min(paces - {0.0}, default=0.0)) for rate in rates}:
            if lr:
                shared.check_grid(shared.deviation(most, asked.clip_norm, lr, told.batch_size, many), masks.range)
    except ContractError as error:
        raise SettingError("secure_aggregation.range", str(error)) from error
    return dict.fromkeys(noise, most)


def known(*told: Any) -> list[float]:
    """As `accounting.calibrations`, searched for once by a user: for simulations and plans."""
    return calibrated.calibrations(cache_folder() / "noise", *told)


def central(scenario: Scenario, root: Root, search: calibrated.Search = accounting.calibrations) -> Central | None:
    """The server's side of client-level privacy, its noise calibrated over every round; None without.

    Args:
        scenario: of the run.
        root: of cohorts and noise.
        search: as in `calibrate`.
    """
    told, asked = scenario.clients, scenario.client_privacy
    if asked is None:
        return None
    if asked.delta >= 1 / told.total:
        logger.warning(
            "privacy.delta: %g is not below 1/%d, one over the clients: at such a delta a mechanism that gives a "
            "whole client away now and then counts as private; write %.0e or less",
            *(asked.delta, told.total, 0.1 / told.total),
        )
    affordable.check(scenario, ())
    rate, rounds, noise = told.cohort_size / told.total, scenario.rounds, asked.noise_multiplier

    def found(rate: float, turns: int) -> float:
        assert asked is not None and asked.epsilon is not None
        return search(asked.epsilon, asked.delta, [rate], turns, asked.accountant)[0]

    if asked.bands == "auto":
        assert asked.epsilon is not None
        b = bands.choose(asked.epsilon, asked.delta, rate, rounds, found, asked.reserve)
    elif (b := asked.bands or 1) > (most := min(rounds, int(1 / rate + 1e-9))):
        why = f"a round takes {told.cohort_size} of {told.total} clients, from one in {b} of them"
        why = why if most < rounds else f"{b} bands are more than the run's {rounds} rounds"
        raise SettingError("privacy.bands", f"{why}: name {most} at most, or auto")
    rate = min(b * rate, 1.0)
    return Central(
        noise_multiplier=found(rate, -(-rounds // b) + asked.reserve) if noise is None else noise,
        sample_rate=rate,
        total=told.total,
        root=root,
        quantile=asked.clip.quantile,
        shared=scenario.shares_noise,
        coefficients=bands.coefficients(b, rounds),
    )
