"""`fedlora site personalise`: a run's adapter, trained further on the site's own rows, for the site alone.

It begins from the adapter that the site received at the run's end, trains what the run's strategy trains, and by
the run's own client, learning rate and noise. Nothing of it is sent. It is private training all the same: who is
shown the model, or its answers, learns no more of a row than epsilon says. So the site's account pays for all of
its steps before the first, in one event.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from fedlora import client as clients
from fedlora.adapter import Adapter, Instruction
from fedlora.deploy import ending, loading
from fedlora.deploy.account import Account
from fedlora.deploy.history import ANSWERED, PERSONAL, History
from fedlora.deploy.serving import Serving
from fedlora.deploy.site import Site, load
from fedlora.deploy.state import RUN, State
from fedlora.errors import Refusal, UserError, suggestion
from fedlora.passes import alone
from fedlora.privacy import lock
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import Past
from fedlora.privacy.noise import fresh_key
from fedlora.record import Record
from fedlora.scenario import Scenario

FOLDER = "personalised"  # of a run's files
MOST = 100_000  # steps


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
    state, terms = State(site.folder), site.privacy
    if not 1 <= steps <= MOST:
        raise UserError(f"--steps: should be from 1 to {MOST:,}")
    if terms is None:
        raise UserError(f"{file}: has no privacy section, so there is no budget to train from")
    if not RUN.fullmatch(key) or (words := state.introduction(key)) is None:
        raise UserError(f"{site.folder / 'runs'}: holds no run {key!r}: {suggestion(key, state.runs())}")
    folder = state.of_run(key)
    if (adapter := ending.final(folder)) is None or not (told := Record.open(folder).site_end):
        raise UserError(
            f"{folder}: has no adapter of the run: a site gets it at the end, with receive: adapter in its file"
        )
    held, scenario = lock.hold(site.folder / "lock"), Scenario.model_validate(words["scenario"])
    account = Account(site.folder / "ledger", terms)
    if scenario.example_privacy is None:
        raise UserError(
            f"{key}: trained without differential privacy, so its settings have no noise to train with"
        )
    try:
        run = loading.load(file, folder, site, state, words, site.client, _nobody, int(told["merges"]))
        before = account.epsilon
        made = {**adapter, **_trained(run, site, account, adapter, steps)}
    except Refusal as error:
        raise UserError(f"{key}: {error.own}") from error
    about = run.about(told.get("threshold"))
    ending.export(run, made, int(told["merges"]), about, folder / FOLDER, f"trained further at {site.name}")
    History(site.folder).write(PERSONAL, ANSWERED, run=key, scenario=scenario.name, epsilon_site=account.epsilon)
    del held  # not before
    return Personalised(folder / FOLDER, before, account.epsilon, terms.max_epsilon)


def _trained(run: Serving, site: Site, account: Account, adapter: Adapter, steps: int) -> Adapter:
    """Pay for all steps, and take them; gives the tensors that were trained.

    Raises:
        Refusal: the budget is not enough, or examples could not be bounded one by one.
    """
    worker, scenario = run.worker, run.worker.scenario
    task, told = worker.task, scenario.clients
    train = worker.strategy.instruct(scenario.rounds, adapter).train
    partition = worker.dataset.partition(site.client)
    first = worker.settings(Instruction(round=1, adapter={}, train=train, send=train), partition.units)
    settings = replace(
        first,
        round=scenario.rounds,
        local_steps=steps,
        lr=max(told.lr.values()) if isinstance(told.lr, dict) else told.lr,
        lrs=dict(told.rates),
        pace=(),
        coefficients=(1.0,),
        sharers=None,  # nobody adds noise to what stays here: it is the site's own in full
        range=None,
        share_metrics=False,
    )
    if (event := clients.spends(worker.client, partition.units, settings)) is None:
        raise Refusal("its client adds no noise")
    task.become()
    if unfit := alone.mingle(task, adapter):
        raise Refusal(f"with this adapter examples would not be bounded one by one: {unfit}")
    account.spend(run.key, 0, site.client, event)
    rng = clients.Rng(fresh_key(), settings.round, site.client, past=Past(None))
    return worker.client.fit(task, adapter, partition, settings, rng).adapter


def _nobody(round: int, client: int, event: Event) -> int:
    """Who pays where a run asks for training: none does here."""
    raise Refusal("a run asks for no training here")
