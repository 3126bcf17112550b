"""The Flower ServerApp: the round loop of a simulation, with sites behind Flower's grid.

Its run configuration: `scenario`, the name of one that ships with fedlora or the text of one; `name`, of the run
folder to make (default: of the scenario, its hash and Flower's number); `resume`, of one to go on with;
`signature`, of who submitted the run. In place of a scenario: `survey`, the name of one, and `wait` for seconds.
`$FEDLORA_RUNS` is where run folders are (default: `runs`), `$FEDLORA_METRICS_PORT` where Prometheus reads
(default: nowhere), at `$FEDLORA_METRICS_ADDRESS` (127.0.0.1).
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import prepare
from fedlora import scenario as scenarios
from fedlora.deploy import logs, survey
from fedlora.deploy.report import Reported
from fedlora.engine.flower import FlowerEngine
from fedlora.errors import FedloraError, RoundError, SettingError, UserError
from fedlora.reports.console import Display
from fedlora.rounds import folder as folders
from fedlora.scenario import Scenario
from fedlora.simulation import carry_out

sys.dont_write_bytecode = True  # beside the app's sources, all of which are signed

app = ServerApp()

logger = logging.getLogger("fedlora.deploy.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a scenario on the sites of a federation.

    Raises:
        RuntimeError: it failed; what Flower shows as the run's status.
    """
    logs.start("server", logging.StreamHandler())
    shown = Reported()
    try:
        asked = {key: str(value) for key, value in context.run_config.items()}
        if name := asked.get("survey"):
            said = survey.gather(grid, name, float(asked["wait"]), asked.get("signature") or None)
            shown.surveyed([one.to_json() for one in said])
            return
        folder = serve(grid, asked, shown, context.run_id)
    except FedloraError as error:
        shown.failed(str(error))
        logger.error("%s", error)
        raise RuntimeError(str(error)) from None
    shown.finished(folder)


def serve(grid: Grid, asked: dict[str, str], shown: Display, number: int) -> Path:
    """Run a scenario on the sites behind a grid, to its end.

    Args:
        grid: of the run.
        asked: the run configuration.
        shown: how it goes.
        number: of the run, which names its folder where nobody else does.

    Returns:
        The run folder.

    Raises:
        UserError: the scenario, or what the server has of data, is wrong.
        RoundError: no site joined, or none of a round replied.
    """
    scenario = _scenario(asked.get("scenario", ""))
    runs = Path(os.environ.get("FEDLORA_RUNS", "runs"))
    if resumed := asked.get("resume"):
        folder = runs / Path(resumed).name
        try:
            folders.check(folder, prepare.separated(scenario, at_sites=True), resume=True)
        except SettingError as error:
            raise scenario.located(error) from error
    else:
        name = asked.get("name") or f"{scenario.name}-{scenario.hash}-{number}"
        folder = runs / Path(name).name
        folders.check(folder, scenario, resume=False)
    if port := os.environ.get("FEDLORA_METRICS_PORT"):
        from fedlora.deploy.metrics import LOOPBACK, Exported

        shown = Exported(shown, int(port), os.environ.get("FEDLORA_METRICS_ADDRESS") or LOOPBACK)
    try:
        shown.stage("reading and tokenising the server's test data")
        ready = prepare.prepare_server(scenario)
        engine = FlowerEngine(
            grid,
            scenario.clients.total,
            run=folder.name,
            deadline=scenario.engine.deadline,
            signature=asked.get("signature") or None,
            folder=runs,  # a temporary folder may be memory
            note=shown.note,
        )
        with contextlib.closing(engine):
            carry_out(ready, engine, folder, bool(resumed), shown)
    except SettingError as error:
        raise scenario.located(error) from error
    except RoundError as error:
        if not (folder / "checkpoint").exists():
            raise
        raise RoundError(f"{error}; go on with fedlora submit --resume {folder.name}") from error
    return folder


def _scenario(text: str) -> Scenario:
    """A scenario from its text, or the name of one that ships with fedlora."""
    if not text.strip():
        raise UserError("scenario: is missing from the run configuration: give the name or the text of one")
    return scenarios.parse(text) if "\n" in text.strip() else scenarios.load(text.strip())
