"""From a scenario to a finished run folder, in four steps: prepare, start, run, finish."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora import engine as engines
from fedlora import scenario as scenarios
from fedlora import starting, statistic_round, suitability
from fedlora.adapter import Adapter, Change, fingerprint
from fedlora.baselines import derive
from fedlora.client import Setter
from fedlora.engine.setup import Description
from fedlora.errors import SettingError, UserError
from fedlora.exporting import About, describe, replaced
from fedlora.optimizers import steps
from fedlora.prepare import Prepared, central, check, known, noised, prepare, separated
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import fresh_key
from fedlora.privacy.replay import versions
from fedlora.reports import card, trackers
from fedlora.reports.console import Display, default_display
from fedlora.reports.summary import summary_of
from fedlora.reports.trackers import Tracked
from fedlora.rounds import choice, known_noise, server
from fedlora.rounds import folder as folders
from fedlora.rounds.checkpoint import Merges
from fedlora.rounds.diagnostics import Diagnostics
from fedlora.rounds.loop import Loop
from fedlora.rounds.progress import Progress
from fedlora.rounds.shrink import Shrinker
from fedlora.rounds.stopping import signals, stopping, undisturbed
from fedlora.rounds.turning import Turning
from fedlora.run import Run
from fedlora.scenario import Scenario
from fedlora.schedules import contract as schedules
from fedlora.tasks import located


def simulate(
    scenario: Scenario | str | Path,
    *,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    ray_address: str | None = None,
    display: Display | None = None,
    watch: Callable[[engines.Engine], engines.Engine] | None = None,
) -> Run:
    """Run a scenario to its end.

    Args:
        scenario: a loaded one, a file, or the name of one that ships with fedlora.
        overrides: `a.b=value` settings; only with a file or a name.
        baseline: run this one of the scenario instead: `pooled`, `pooled_private` or `alone`.
        out: the run folder, by default `runs/<name>-<hash>`.
        resume: go on from the folder's checkpoint.
        ray_address: of a running Ray cluster to join.
        display: shown how the run goes; by default a progress bar in a notebook, and nothing elsewhere.
        watch: puts a custom engine around the one that runs the clients, to see what passes.

    Returns:
        The run. After Ctrl-C its summary says `stopped`, and holds what was finished.

    Raises:
        UserError: the input is wrong; nothing was written.
        RoundError: too few clients of a round replied, in every attempt at it.
    """
    scenario = scenarios.given(scenario, overrides)
    try:
        scenario = separated(scenario)
    except SettingError as error:
        raise scenario.located(error) from error
    if baseline is not None:
        scenario = derive(scenario, baseline)
    folder = Path(out) if out else Path("runs") / f"{scenario.name}-{scenario.hash}"
    folders.check(folder, scenario, resume)
    if resume and (ended := folders.ended(folder, scenario)) is not None:
        (display or default_display()).note(f"{folder} has ended after round {ended}; nothing to do")
        return Run.open(folder)
    shown = Tracked(display or default_display(), folder)
    try:
        trackers.check(scenario.trackers)
        shown.stage("starting")
        check(scenario)  # what can be refused at once, before processes start
        made = engines.make(scenario, ray_address)
        with signals(signal.default_int_handler), contextlib.closing(watch(made) if watch else made) as engine:
            shown.stage("reading and tokenising the data")  # while workers import
            ready = prepare(scenario)
            shown.stage("calibrating the noise")
            ready = noised(ready, known)
            return carry_out(ready, engine, folder, resume, shown)
    except SettingError as error:
        raise scenario.located(error) from error
    finally:
        shown.close()


def carry_out(ready: Prepared, engine: engines.Engine, folder: Path, resume: bool, shown: Display) -> Run:
    """Run what was prepared on an engine, from its first round, or the checkpoint's, to a finished folder.

    Raises:
        UserError: the input is wrong, or the disk is full or no longer to be written.
    """
    try:
        begun = start(ready, engine, folder, resume, shown)
        now, stopped = run(begun, shown)
        return finish(begun, now, stopped)
    except OSError as error:
        if not (folder / "scenario.yaml").exists():
            raise
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{what}; what was finished is saved: mend that, and go on with --resume") from error


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run whose workers have loaded the model and whose folder is there.

    Attributes:
        ready: what it was prepared with.
        engine: where its clients run.
        folder: of the run.
        found: what the workers built.
        now: where it stands.
        loop: that takes it from there, round by round.
    """

    ready: Prepared
    engine: engines.Engine
    folder: Path
    found: Description
    now: Progress
    loop: Loop


def start(ready: Prepared, engine: engines.Engine, folder: Path, resume: bool, shown: Display) -> Begun:
    """Load the model on the engine's workers, and make the folder, or go on with what it holds.

    Raises:
        UserError: the model does not load, or the folder is another run's.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    scenario, strategy, setup = ready.scenario, ready.strategy, ready.setup
    whole = central(scenario, fresh_key() if setup.secret else scenario.seed, known)
    if strategy.personal or strategy.trips > 1 or scenario.feeds_back or scenario.clients.keeps_state:
        setup = replace(setup, personal=folder.absolute() / "personal")
    begun = {
        "data": ready.data.fingerprint,
        "inputs": dict(ready.data.inputs),
        "base": located.fingerprint(scenario.model.base, scenario.model.revision),
    }
    if (saved := starting.read(scenario, ready.data.labels)) is not None:
        begun["saved"] = fingerprint(saved.saved.tensors)
    if resume:
        folders.check_beginning(folder, begun)
    if scenario.compress is not None:
        _bound(ready, statistic_round.tried(setup))
        ready = statistic_round.cut(ready, engine, folder, begun, shown.stage)
        setup = replace(setup, base=ready.setup.base)
    shown.stage("loading the model")
    found = engine.start(setup)
    stage = _bound(ready, found)
    turning = None
    if (scheduled := schedules.load(scenario.model.adapter.schedule)) is not None:
        scheduled.bind(found.layout, found.kind, scenario.seed, found.weights)
        turning = Turning(schedule=scheduled, scenario=scenario)
    asked = scenario.strategy.shrink
    shrinker = None if asked is None else Shrinker(strength=asked.strength, layout=found.layout)
    now = Progress(round=0, adapter=dict(found.initial), bytes_up=statistic_round.bytes_up(setup.base))
    origin = {
        "scenario": scenario.model_dump(mode="json"),
        # What decides the last bits of a result beside the scenario.
        "versions": {**versions(), "precision": found.precision, "device": found.device},
        **begun,
        **({"start": fingerprint(found.initial)} if scenario.model.begins else {}),
    }
    if resume:
        now, record = folders.restore(folder, scenario, strategy, now, origin, stage)
    else:
        if setup.base is None:
            folders.create(folder, scenario, ready.data, origin)
        record = Ledger(folder)
    merges = Merges(folder / "merges", found.weights)
    merges.restore(now.merges)
    for change in merges.changes:
        engine.merge(change)
    budget = Budget(
        scenario=scenario,
        client=ready.client,
        settings=Setter(scenario, setup.noise, setup.bands),
        data=ready.data,
        central=whole,
        ledger=record,
        repeatable=not setup.secret,
    )
    loop = Loop(
        scenario=scenario,
        strategy=strategy,
        engine=engine,
        data=ready.data,
        budget=budget,
        ledger=record,
        merges=merges,
        central=whole,
        server=stage,
        turning=turning,
        noise=known_noise.make(strategy, ready.client, scenario, found.layout, whole),
        shrinker=shrinker,
        diagnostics=Diagnostics(layout=found.layout, kind=found.kind) if scenario.diagnostics else None,
        folder=folder,
        choice=choice.make(scenario, found.metric, found.higher_is_better),
        origin=origin,
        on_round=shown.round,
    )
    return Begun(ready=ready, engine=engine, folder=folder, found=found, now=now, loop=loop)


def _bound(ready: Prepared, found: Description) -> server.ServerOptimizer | None:
    """The server's steps, if it takes any, once the strategy knows what the workers built.

    Raises:
        SettingError: the two do not fit.
    """
    scenario, strategy = ready.scenario, ready.strategy
    strategy.bind(found.layout, found.kind, found.initial, ready.client.private)
    suitability.check_bound(strategy)
    steps.check_bound(ready.client, strategy, scenario)
    return server.make(scenario.strategy.server, found.layout, strategy.held, scenario.rounds)


def run(begun: Begun, shown: Display) -> tuple[Progress, str | None]:
    """All rounds; where it stands after them, and why it stopped before the last, if it did."""
    now = begun.now
    shown.begin(begun.ready.scenario, begun.found.metric, now.round)
    try:
        with stopping() as asked:
            begun.loop.stop = asked
            now = begun.loop.run(now)
    except KeyboardInterrupt:
        return now, f"interrupted after round {now.round}"
    return now, now.last.pop("stopped", None)


def finish(begun: Begun, now: Progress, stopped: str | None) -> Run:
    """Write adapter, summary and card."""
    ready, found, folder = begun.ready, begun.found, begun.folder
    with undisturbed():
        if stopped is not None and now.round and found.metric not in now.last:
            if ready.strategy.tested:
                now.last.update(begun.loop.tested(now.round, now.adapter))
            elif not ready.strategy.personal:
                now.last.update(begun.loop.evaluated(now))
        chosen, merges = begun.loop.choice, begun.loop.merges
        best = now.best if chosen is not None and chosen.keeps else None
        about = About.of(ready.scenario, ready.data.labels, best.figures if best else now.last)
        about = replace(about, base=str(made), revision=None) if (made := ready.setup.base) else about
        final = best or now
        _export(begun.engine, final.adapter, folder / "adapter", merges.total(final.merges), about)
        if now.round and not (stopped or "").startswith("interrupted"):
            now.bytes_down += begun.engine.conclude(now.round, final.adapter, final.merges, about.threshold)
        summary = summary_of(ready, now, found, begun.loop.ledger, stopped, chosen)
        if (turning := begun.loop.turning) is not None and now.round:
            summary |= _prefixes(begun, turning, final.adapter, about)
        summary["verdicts"] = [asdict(verdict) for verdict in Run(folder, summary).verdicts()]
        folders.write_json(folder / "summary.json", summary)
        card.write(folder, ready, summary)
    return Run(folder, summary)


def _prefixes(begun: Begun, turning: Turning, adapter: Adapter, about: About) -> dict[str, Any]:
    """The figures of the model cut to each rank of a client, with its adapter in `prefixes/`."""
    ranks = turning.scenario.ranks(turning.scenario.rounds)
    if not turning.schedule.unequal or len(ranks) == 1:
        return {}
    told = {}
    for rank in ranks:
        cut, metric = turning.prefix(adapter, rank), begun.found.metric
        figures = begun.engine.evaluate(cut)
        told[str(rank)] = {key: figures[key] for key in ("loss", metric)}
        _export(begun.engine, cut, begun.folder / "prefixes" / f"rank-{rank}", {}, about)
    return {"prefixes": told}


def _export(engine: engines.Engine, adapter: Adapter, folder: Path, merged: Change, about: About) -> None:
    """Write an adapter to a folder, in the place of what is there."""

    def write(new: Path) -> None:
        engine.export(adapter, new, merged or None)
        describe(new, about)

    folder.parent.mkdir(exist_ok=True)
    replaced(folder, write)
