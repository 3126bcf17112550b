"""A run's model at a site, with the site's own rows, ledger, merges and answers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import RecordDict

from fedlora import prepare, seeding
from fedlora.data import reading
from fedlora.data.cells import Taught
from fedlora.deploy import cutting, sources
from fedlora.deploy import site as sites
from fedlora.deploy.answers import Answers
from fedlora.deploy.serving import Serving, Words
from fedlora.deploy.site import FLOOR, Site
from fedlora.deploy.state import State
from fedlora.engine.setup import Setup
from fedlora.engine.worker import Worker
from fedlora.errors import Refusal, SettingError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event
from fedlora.privacy.ledger import Ledger
from fedlora.rounds.checkpoint import Merges
from fedlora.scenario import Scenario

logger = logging.getLogger(__name__)


def load(
    where: Path,
    app: Path,
    site: Site | None,
    state: State,
    words: Words,
    client: int,
    pay: Callable[[int, int, Event], int],
    merged: int | None = None,
    content: RecordDict | None = None,
) -> Serving:
    """Be a worker of a run, with its ledger, and with the merges that are kept here.

    Args:
        where: the site file.
        app: of the Flower app, with the code that came with the run.
        site: what the file says; None in Flower's own simulation.
        state: where the site keeps what it has of the run.
        words: of the introduction.
        client: which client this is.
        pay: as `Worker.pay`.
        merged: how many merges to keep; by default all.
        content: of the message that the introduction came in; None: it is kept here.

    Raises:
        Refusal: the data do not fit, and the log says how; or the base that the server cut does not.
    """
    scenario, key = Scenario.model_validate(words["scenario"]), str(words["run"])
    folder = state.of_run(key)
    folder.mkdir(parents=True, exist_ok=True)
    if site is None or site.accept.own_code:
        sources.only(app)
    try:
        setup = _simulated(scenario) if site is None else _own(scenario, site, state, words, client)
        made = cutting.base(scenario, words, content, folder)
        worker = Worker(replace(setup, personal=folder / "personal", base=made))
    except SettingError as error:
        shown = scenario.located(error)
        if site is not None and error.key.startswith(("data", "privacy.person")):
            shown = sites.located(where, error)
        logger.error("%s", shown, extra={"client": client, "run": key})
        raise Refusal(
            f"its data or machine do not fit the scenario ({error.key}): its log says why", own=str(shown)
        ) from error
    judges = site is not None and scenario.data.client_test_share is not None
    if judges and worker.dataset.held_out(client).units < FLOOR:
        what = "rows" if scenario.person is None else "persons"
        raise Refusal(f"it judges by {FLOOR} {what} of its own at least, and data.client_test_share leaves fewer")
    worker.pay = pay
    merges = Merges(folder / "merges", worker.task.weights)
    count = len(list((folder / "merges").glob("*.safetensors")))
    merges.restore(count if merged is None else merged)
    for change in merges.changes:
        worker.merge(change)
    run = Serving(words, worker, Ledger(folder), merges, Answers(folder, state.key()))
    state.check_rows(run, client)
    return run


def _simulated(scenario: Scenario) -> Setup:
    """Of all clients, in Flower's own simulation."""
    ready = prepare.prepare(scenario)
    setup = prepare.noised(ready, accounting.calibrations).setup
    return replace(setup, secret=ready.client.private, kept=None)


def _own(scenario: Scenario, site: Site, state: State, words: Words, client: int) -> Setup:
    """Of a site's own rows."""
    told, held = site.data.labels, site.data
    if site.privacy is not None:
        scenario = site.privacy.held_to(scenario)
    taught = Taught.of(scenario.data, scenario.task, scenario.person)
    taught = replace(taught, messages=held.messages, prompt=held.prompt, encoding=held.encoding)
    rows, left_out = reading.read_site(held, told, taught)
    if left_out:
        logger.warning("%d rows are left out: their label is not in data.labels", left_out)
    own = seeding.key(state.key(), "held-out", repr(scenario.data.client_test_share))
    placed = {"threads": site.threads, "device": site.device}
    return prepare.prepare_site(scenario, words["labels"], rows, client, own, **placed)
