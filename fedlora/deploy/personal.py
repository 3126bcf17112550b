"""A run's adapter, trained further on the site's own rows, for the site alone.

It happens by `fedlora site personalise`, or when a run has ended where the site file says so (`personalise`). It
begins from the adapter that the site received at the run's end, trains what the run's strategy trains, and by the
run's own client, learning rate and noise. Nothing of it is sent. It is private training all the same: who is shown
the model, or its answers, learns no more of a row than epsilon says. So the site's account pays for all of its
steps before the first, in one event of round 0.

A server says when a run has ended, and a run brings its noise. So what a site does by itself it does once a run,
after rounds that it trained, and for no more epsilon than its file says.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora import client as clients
from fedlora.adapter import Adapter, Instruction
from fedlora.deploy import ending, loading
from fedlora.deploy.account import Account
from fedlora.deploy.history import ANSWERED, FAILED, PERSONAL, REFUSED, History
from fedlora.deploy.serving import Serving
from fedlora.deploy.site import MOST_STEPS, Further, Site, load
from fedlora.deploy.state import RUN, State
from fedlora.errors import Refusal, UserError, counted, suggestion
from fedlora.passes import alone
from fedlora.privacy import lock
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.mechanisms.bands import Past
from fedlora.privacy.noise import fresh_key
from fedlora.record import Record
from fedlora.scenario import Scenario

FOLDER = "personalised"  # of a run's files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Personalised:
    """What training further came to.

    Attributes:
        folder: of the adapter.
        before: the site's epsilon in all runs together, before it was paid for.
        after: the same now.
        most: that the site file allows.
    """

    folder: Path
    before: float
    after: float
    most: float


def personalise(file: Path, key: str, steps: int = 50) -> Personalised:
    """Train a run's adapter further on a site's own rows, within the site's budget.

    Args:
        file: the site's YAML file.
        key: name of the run.
        steps: of training.

    Raises:
        UserError: a worker is up, the run's adapter is not here, or the budget is not enough; nothing was trained.
    """
    site = load(file)
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"--steps: should be from 1 to {MOST_STEPS:,}")
    if site.privacy is None:
        raise UserError(f"{file}: has no privacy section, so there is no budget to train from")
    state = State(site.folder)
    if not RUN.fullmatch(key) or state.introduction(key) is None:
        raise UserError(f"{site.folder / 'runs'}: holds no run {key!r}: {suggestion(key, state.runs())}")
    held = lock.hold(site.folder / "lock")
    try:
        account, history = Account(site.folder / "ledger", site.privacy), History(site.folder)
        made = _further(file, site, account, history, key, Further(steps=steps))
    except Refusal as error:
        raise UserError(f"{key}: {error.own}") from error
    del held  # not before
    return made


def at_the_end(file: Path, site: Site, account: Account, history: History, key: str) -> None:
    """Do so when a run has ended, as the site file says; the log and the record of what was asked tell of it.

    Args:
        file: the site's YAML file.
        site: what it says.
        account: of the site.
        history: of what was asked.
        key: name of the run.
    """
    if (told := site.personalise) is None:
        return
    seen: dict[str, str | float] = {"run": key, "client": site.client}
    try:
        if 0 in (paid := account.paid(key)):
            logger.info("it was trained further here before: fedlora site personalise does so again", extra=seen)
            return
        if not paid:
            raise Refusal("no round of it was trained here")
        made = _further(file, site, account, history, key, told)
    except Exception as error:  # whatever it is: the run has ended, and the worker stays up
        known = isinstance(error, Refusal | UserError)
        why = error.own if isinstance(error, Refusal) else str(error) if known else type(error).__name__
        logger.warning("it is not trained further here: %s", why, extra=seen)
        history.write(PERSONAL, REFUSED if known else FAILED, run=key, epsilon_site=account.epsilon, why=why)
        return
    seen["epsilon"] = made.after
    logger.info("trained further by %s: epsilon %.3f before", counted(told.steps, "step"), made.before, extra=seen)


def _further(file: Path, site: Site, account: Account, history: History, key: str, told: Further) -> Personalised:
    """Train, which pays first, and write what came of it.

    Raises:
        UserError: the run's adapter is not here, or the run has no noise.
        Refusal: the budget is not enough, or examples could not be bounded one by one.
    """
    state = State(site.folder)
    folder, words = state.of_run(key), state.introduction(key) or {}
    if (adapter := ending.final(folder)) is None or not (ended := Record.open(folder).site_end):
        raise UserError(
            f"{folder}: has no adapter of the run: a site gets it at the end, with receive: adapter in its file"
        )
    scenario, merges = Scenario.model_validate(words["scenario"]), int(ended["merges"])
    if scenario.example_privacy is None:
        raise UserError(
            f"{key}: trained without differential privacy, so its settings have no noise to train with"
        )
    run = loading.load(file, folder, site, state, words, site.client, _nobody, merges)
    before = account.epsilon
    made = {**adapter, **_trained(run, site, account, adapter, told)}
    about = run.about(ended.get("threshold"))
    ending.export(run, made, merges, about, folder / FOLDER, f"trained further at {site.name}")
    (folder / FOLDER).chmod(0o700)
    history.write(PERSONAL, ANSWERED, run=key, scenario=scenario.name, epsilon_site=account.epsilon)
    return Personalised(folder / FOLDER, before, account.epsilon, account.terms.max_epsilon)


def _trained(run: Serving, site: Site, account: Account, adapter: Adapter, told: Further) -> Adapter:
    """Pay for all steps, and take them; gives the tensors that were trained.

    Raises:
        Refusal: the budget is not enough, or examples could not be bounded one by one.
    """
    worker, scenario = run.worker, run.worker.scenario
    task, asked = worker.task, scenario.clients
    train = worker.strategy.instruct(scenario.rounds, adapter).train
    partition = worker.dataset.partition(site.client)
    first = worker.settings(Instruction(round=1, adapter={}, train=train, send=train), partition.units)
    settings = replace(
        first,
        round=scenario.rounds,
        local_steps=told.steps,
        lr=max(asked.lr.values()) if isinstance(asked.lr, dict) else asked.lr,
        lrs=dict(asked.rates),
        pace=(),
        coefficients=(1.0,),
        sharers=None,  # nobody adds noise to what stays here: it is the site's own in full
        range=None,
        share_metrics=False,
    )
    if (event := clients.spends(worker.client, partition.units, settings)) is None:
        raise Refusal("its client adds no noise")
    if told.epsilon is not None:
        cost = epsilon([event], account.terms.delta, account.terms.accountant)
        if cost > told.epsilon * (1 + 1e-9):
            raise Refusal(
                f"its noise makes {counted(told.steps, 'step')} cost epsilon {cost:.3g}, and personalise.epsilon "
                f"is {told.epsilon:g}"
            )
    task.become()
    if unfit := alone.mingle(task, adapter):
        raise Refusal(f"with this adapter examples would not be bounded one by one: {unfit}")
    account.spend(run.key, 0, site.client, event)
    rng = clients.Rng(fresh_key(), settings.round, site.client, past=Past(None))
    return worker.client.fit(task, adapter, partition, settings, rng).adapter


def _nobody(round: int, client: int, event: Event) -> int:
    """Who pays where a run asks for training: none does here."""
    raise Refusal("a run asks for no training here")
