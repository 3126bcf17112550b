"""Figures of a site's own rows, exact or noised; the site's account pays for noised ones.

Each row adds its loss, cut to a bound M and divided by it, and 1 where the model is right. A person's rows add
their mean. So one row, or person, that counts for nothing changes the two sums by at most the square root of two
(in the 2-norm), and Gaussian noise of that scale hides it. What leaves is, of n rows or persons that are held out,

    loss = M * (sum of losses + noise) / n,    accuracy = (sum of right ones + noise) / n,

each cut to what it can be. n is public, as the number of rows is. Each row passes the model by itself: what it
adds depends on that row alone, to the last bit. The sums are whole numbers of parts, and what leaves is rounded.

The account pays before a row is read, once for each round of a run. The noise is the operating system's.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedlora import prepare, wire
from fedlora.adapter import Instruction
from fedlora.deploy.account import Account
from fedlora.deploy.serving import Serving
from fedlora.deploy.site import Budget, Figures, Site
from fedlora.deploy.state import State
from fedlora.errors import Refusal, SettingError, UserError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event, added, adds, alone
from fedlora.privacy.noise import Stream

FIGURES = "figures:"  # begins the name of what the account pays for; no run has such a name
NORM = math.sqrt(2)  # of what one row, or person, adds: 1 of losses, and 1 of right ones
METRIC = "accuracy"  # a mean over rows, each from 0 to 1
_FINE = 2**20  # parts of one row
_STEPS = 2**10  # to which a noised sum is rounded

logger = logging.getLogger(__name__)


def event(told: Figures, budget: Budget) -> Event:
    """What an answer costs.

    Raises:
        SettingError: no noise reaches its epsilon.
    """
    noise = accounting.calibrate(told.epsilon, budget.delta, 1.0, 1, budget.accountant)
    return Event(noise_multiplier=noise, sample_rate=1.0, steps=1, clip_norm=NORM)


def noise(site: Site | None, run: Serving) -> float | None:
    """The standard deviation of the accuracy that a run is told; None where it is told none, or an exact one."""
    if site is None or (told := _noised(site, run)) is None:
        return None
    return event(*told).noise_multiplier * NORM / run.worker.dataset.held_out(site.client).units


def admit(site: Site | None, account: Account | None, run: Serving) -> None:
    """Make sure that a run can be told its noised figures to the end, before it costs anything.

    Raises:
        Refusal: its task has none that noise is made for, or the budget is not enough for them and its rounds.
    """
    if site is None or account is None or (told := _noised(site, run)) is None:
        return
    scenario, budget = run.worker.scenario, account.terms
    if (metric := run.worker.task.metric) != METRIC:
        raise Refusal(f"its noised figures are of {METRIC}, and the task {scenario.task} is judged by {metric}")
    if account.paid(run.key):
        return
    times = -(-scenario.rounds // scenario.eval_every)
    each = run.event(Instruction(round=1, adapter={}, train=(), send=()), site.client)
    events, before = [*account.events, *[event(*told)] * times], tuple[Event, ...]()
    if (first := prepare.statistic(scenario)) is not None and not account.measured(run.key):
        events.append(first)
    for one in [each] * scenario.rounds if each is not None else ():
        events.append(alone(adds(before, one)))
        before = added(before, one)
    if accounting.epsilon(events, budget.delta, budget.accountant) > budget.max_epsilon * (1 + 1e-9):
        raise Refusal(
            f"the epsilon that it allows over all runs is not enough for {times} noised evaluations beside "
            f"{scenario.rounds} rounds: raise eval_every, or leave data.client_test_share out"
        )


def judge(
    site: Site | None, account: Account | None, state: State, run: Serving, instruction: Instruction, client: int
) -> RecordDict:
    """Loss and metric of the client's own model on the examples that it holds out.

    A site answers once a round, about rows that it drew itself; asked again it gives the same answer, whatever
    adapter it is asked about.

    Raises:
        Refusal: the scenario holds none out, the site does not report figures, or its budget is not enough.
    """
    worker = run.worker
    if worker.scenario.data.client_test_share is None:
        raise Refusal("the scenario holds no rows out to judge by")
    if site is None:
        return wire.pack_words(worker.judge(instruction, [client])[client])
    told = _noised(site, run)
    if told is None and not site.accept.metrics:
        raise Refusal("it reports no figures of its own rows")

    def found() -> Mapping[str, Any]:
        if told is None or account is None:
            return worker.judge(instruction, [client])[client]
        return _paid(told, account, run, instruction, client)

    said = state.judged(run.key, instruction.round, lambda: dict(found()))
    asked = {"loss", worker.task.metric, *(metric.name for metric in worker.metrics)}
    return wire.pack_words({name: value for name, value in said.items() if name in asked})


def _noised(site: Site, run: Serving) -> tuple[Figures, Budget] | None:
    """By what a site noises the figures of a run; None where it does not."""
    asked = run.worker.scenario.data.client_test_share is not None
    return (site.figures, site.privacy) if asked and site.figures and site.privacy else None


def _paid(
    told: tuple[Figures, Budget], account: Account, run: Serving, instruction: Instruction, client: int
) -> dict[str, float]:
    """Noised loss and accuracy of a round; the account pays before a row is read.

    Raises:
        Refusal: the budget is not enough, or the ledger cannot be written.
    """
    cost, most = event(*told), told[0].most_loss
    try:
        account.spend(FIGURES + run.key, instruction.round, client, cost)
    except (OSError, UserError) as error:
        logger.error("%s", error, extra={"client": client, "round": instruction.round, "run": run.key})
        raise Refusal("its ledger cannot be written: its log says why", own=str(error)) from error
    sums, units = _sums(run, instruction, client, most)
    drawn = Stream.fresh().normal(0.0, cost.noise_multiplier * NORM, 2)
    shares = np.clip(np.rint((sums / _FINE + drawn) * _STEPS) / _STEPS / units, 0.0, 1.0)
    return {"loss": most * float(shares[0]), METRIC: float(shares[1])}


def _sums(run: Serving, instruction: Instruction, client: int, most: float) -> tuple[NDArray[np.int64], int]:
    """The exact sums, of losses and of right ones, in parts of 2^-20, (2,); and of how many rows or persons."""
    worker = run.worker
    held, task = worker.dataset.held_out(client), worker.task
    whose = held.rows if held.persons is None else held.persons
    means: dict[int, list[NDArray[np.float64]]] = {}
    rank = worker.scenario.rank(client, instruction.round)
    adapter = worker.received(instruction.at(rank), client, instruction.round + 1)
    task.become(rank, instruction.draw)
    with ExitStack() as after:
        if task.prefix is not None:
            after.callback(task.prefix.forget())
        for row, unit in zip(held.rows, whose, strict=True):
            found = task.figures(task.evaluation(adapter, held.examples, np.array([row])).sums)
            means.setdefault(int(unit), []).append(_added(found, most))
    parts = [np.floor(np.mean(each, axis=0) * _FINE).astype(np.int64) for each in means.values()]
    return np.sum(parts, axis=0, dtype=np.int64), len(parts)


def _added(found: Mapping[str, float], most: float) -> NDArray[np.float64]:
    """What one row adds, each from 0 to 1; what is no number counts as the worst."""
    loss, right = found["loss"], found[METRIC]
    lost = min(max(loss, 0.0), most) / most if math.isfinite(loss) else 1.0
    return np.array([lost, min(max(right, 0.0), 1.0) if math.isfinite(right) else 0.0])


def rule(site: Site) -> str:
    """What a run may learn of figures, in a sentence for the owner."""
    if site.figures is None or site.privacy is None:
        return "may learn no loss and no figure of these rows (accept.metrics)"
    try:
        std = event(site.figures, site.privacy).noise_multiplier * NORM
    except SettingError as error:
        return f"may learn no figure of these rows: {error.message}"
    units = "rows" if site.privacy.person is None else "persons"
    return (
        f"may learn loss and accuracy of {units} that are held out, noised: of 100 {units} an accuracy to "
        f"{1.96 * std / 100:.2g} either way; each evaluation costs epsilon {site.figures.epsilon:g} (figures)"
    )
