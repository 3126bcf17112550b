"""`fedlora sweep`: many runs of one scenario on Ray Tune, and what looking for the best of them cost.

Each trial is a run in a folder named after its settings. So a sweep that was killed goes on when it is started
again: finished runs are read, interrupted ones resume from their checkpoint, and random draws repeat, because
they come from the sweep's seed.
"""

import fcntl
import gc
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedlora import scenario, selecting
from fedlora.baselines import derive
from fedlora.engine.cluster import begin, place
from fedlora.errors import ScenarioError, SettingError, UserError, suggestion
from fedlora.privacy.together import total_epsilon
from fedlora.reports.baselines import kind_of
from fedlora.reports.comparison import Comparison
from fedlora.reports.console import Silent
from fedlora.reports.groups import final
from fedlora.reports.page import save
from fedlora.returned import finite
from fedlora.rounds.choice import directions
from fedlora.run import Run
from fedlora.scenario import Int, PositiveInt, Scenario, Section
from fedlora.scenario.baseline import KINDS
from fedlora.searching import Draw, Select, StopEarly, Values
from fedlora.simulation import simulate
from fedlora.tasks.contract import find

_GRID = "grid"  # the points of the grid are one axis to Ray Tune, so that they run in the order of the file
_BASELINE = "baseline"  # a key of the search that is no setting: the run is this baseline of its point's scenario
_CHECKED = 1000  # points of the grid that are checked before the first run starts

Settings = Mapping[str, Any]  # of one run, by dotted key


class Sweep(Section):
    """What to try."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    scenario: str  # a file, or the name of one that ships with fedlora
    settings: dict[str, Any] = Field(default_factory=dict)  # the same in every run, such as  rounds: 10
    # A list is a grid, every one of its values; of keys joined by commas, a list of lists, a value for each key.
    search: dict[str, Values] = Field(min_length=1)
    samples: PositiveInt = 1  # draws of what is random, each with the whole grid
    seed: Int = 0  # of the draws
    metric: str | None = None  # the figure to choose the best by, such as macro_f1; null: the task's own
    stop_early: StopEarly | None = None
    select: Select | None = None  # the best run alone leaves, of a random number of runs
    parallel: PositiveInt | Literal["auto"] = "auto"  # runs at once, each in a process of its own; auto: the cores

    @field_validator("search", mode="before")
    @classmethod
    def _lists(cls, search: object) -> object:
        for key, given in search.items() if isinstance(search, dict) else ():
            if given == [] or not isinstance(given, list | dict):
                raise PydanticCustomError(
                    "search",
                    f"{key} should be a list of values, or {{draw: uniform, low: 0.1, high: 1}}, not {given!r}",
                )
            count = len(_keys(key))
            if count > 1 and not (
                isinstance(given, list) and all(isinstance(v, list) and len(v) == count for v in given)
            ):
                raise PydanticCustomError("search", f"{key} should be a list of lists, each of {count} values")
            if _BASELINE in (names := _keys(key)):
                at = names.index(_BASELINE)
                told = [given] if isinstance(given, dict) else [v[at] if count > 1 else v for v in given]
                if wrong := [v for v in told if v not in (None, *KINDS)]:
                    what = f"baseline should be null or one of {', '.join(KINDS)}, and is {wrong[0]!r}"
                    raise PydanticCustomError("search", what)
        return search

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if self.samples > 1 and all(isinstance(given, list) for given in self.search.values()):
            raise PydanticCustomError("samples", "samples counts random draws, and no key draws: leave it out")
        if self.select is not None and (why := selecting.refuses(self.search, self.stop_early)):
            raise PydanticCustomError("select", "with select {why}", {"why": why})
        return self

    def points(self) -> Iterator[Settings]:
        """Every point of the grid; what is random at its lower end."""
        values = [given if isinstance(given, list) else [given.low] for given in self.search.values()]
        for point in itertools.product(*values):
            yield dict(zip(self.search, point, strict=True))

    def drawn(self, folder: Path) -> Self:
        """The sweep as it is run: itself, or with `select` the runs that were drawn, over one partition."""
        if self.select is None:
            return self
        points = [*map(spread_out, self.points())]
        rows = selecting.drawn(points, self.select.mean, folder)
        first = self.original(points[0])
        held = {} if first.data.partition.seed is not None else {"data.partition.seed": first.seed}
        search: dict[str, Any] = {", ".join(rows[0]): [[*row.values()] for row in rows]}
        changed = {"search": search, "settings": self.settings | held, "select": None}
        return self.model_copy(update=changed)

    def run(self, point: Settings) -> Scenario:
        """The scenario of a run, which stays in its own process.

        Raises:
            ScenarioError: the settings do not describe one.
        """
        kind = spread_out(point).get(_BASELINE)
        made = self.original(point)
        return made if kind is None else derive(made, kind)

    def original(self, point: Settings) -> Scenario:
        """The same, or where the run is a baseline, what it is a baseline of."""
        settings = {key: value for key, value in (self.settings | spread_out(point)).items() if key != _BASELINE}
        return scenario.load(
            self.scenario, [*(f"{key}={json.dumps(v)}" for key, v in settings.items()), "engine.kind=inline"]
        )


def _keys(key: str) -> list[str]:
    """The settings that a key of the search stands for."""
    return [part.strip() for part in key.split(",")]


def spread_out(point: Settings) -> dict[str, Any]:
    """A point of the search by single settings."""
    single: dict[str, Any] = {}
    for key, value in point.items():
        keys = _keys(key)
        single.update(zip(keys, value, strict=True) if len(keys) > 1 else [(key, value)])
    return single


@dataclass(frozen=True)
class Outcome:
    """A sweep that has come to its end.

    Attributes:
        folder: where its runs, `comparison.html` and `sweep.json` are.
        comparison: of its runs.
        summary: what `sweep.json` holds.
    """

    folder: Path
    comparison: Comparison
    summary: Mapping[str, Any]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        made = self.comparison
        none = "none has learnt" if any(group.final() for group in made.groups) else "none was measured"
        return [
            *(*made.table().text(""), "", *made.legend(), *made.notes),
            f"best: {self.summary['best'] or none}",
            f"page: {self.folder / 'comparison.html'}",
        ]


def load(file: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and check all of it, with every point of its grid.

    Args:
        file: a path, or the name of a sweep that ships with fedlora.
        overrides: `a.b=value`, which join its `settings`.

    Raises:
        ScenarioError: with one line for every problem.
    """
    try:
        text = scenario.find(file, scenario.SWEEPS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{file}: cannot be read: {error}") from error
    raw, lines, problems = scenario.read(text, str(file))
    source = scenario.Source(str(file), lines, {})
    if problems:
        raise ScenarioError(*(f"{source.where(p.path)}: {p.message}" for p in problems))
    try:
        made = Sweep.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(*(_told(source, detail["loc"], detail) for detail in error.errors())) from error
    given = scenario.values(overrides)
    written = [
        *(("settings", key) for key in made.settings.keys() - given),
        *(("search", key) for key in made.search),
    ]
    made = made.model_copy(update={"settings": made.settings | given})
    found: dict[str, None] = {}
    for point in itertools.islice(made.points(), _CHECKED):
        try:
            made.run(point)
        except UserError as error:
            for line in error.lines:
                for section, key in written:
                    if line.startswith(tuple(f"--set {k}=" for k in _keys(key))):
                        line = f"{source.where((section, key))}: {line.removeprefix('--set ')}"
                found[line] = None
    if found:
        raise ScenarioError(*found)
    try:
        judged_by(made, made.run(next(made.points())))
        if made.select is not None:
            selecting.check([*map(made.run, made.points())])
    except SettingError as error:
        raise ScenarioError(f"{source.where((error.key,))}: {error.key}: {error.message}") from error
    return made


def judged_by(asked: Sweep, point: Scenario) -> tuple[str, bool]:
    """The figure that a sweep chooses by, and whether more of it is better.

    Raises:
        SettingError: its runs have no such figure.
    """
    task = find(point.task)
    name, known = asked.metric or task.metric, directions(point, task.metric, task.higher_is_better)
    if name not in known:
        raise SettingError("metric", f"an evaluation here has no {name!r}: {suggestion(name, known)}")
    return name, known[name]


def _told(source: scenario.Source, path: tuple[str | int, ...], detail: Any) -> str:
    """One of pydantic's errors as a line."""
    path = tuple(part for part in path if part not in ("grid", "random"))
    what = detail["msg"].replace("Input should", "should")
    if detail["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"stop_early": StopEarly, "search": Draw, "select": Select}
        owner = sections[str(path[0])] if len(path) > 1 else Sweep
        what = f"unknown key {path[-1]!r}: {suggestion(str(path[-1]), owner.model_fields)}"
    if detail["type"] == "missing":
        what = "is missing"
    return f"{source.where(path)}: {'.'.join(map(str, path)) or 'sweep'}: {what}"


def sweep(
    file: str | Path,
    out: str | Path | None = None,
    told: Callable[[str], None] = lambda line: None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Run a sweep to its end, or go on with one.

    Args:
        file: of the sweep, or the name of one that ships with fedlora.
        out: the folder, by default `sweeps/<name>`.
        told: is given a line after each run.
        overrides: `a.b=value`, the same in every run.

    Raises:
        UserError: the sweep is wrong, or the folder holds another one.
    """
    asked = load(file, overrides)
    folder = Path(out or Path("sweeps") / asked.name).absolute()
    claim(folder, asked)
    found = explore(asked.drawn(folder), folder, told)
    places = dict.fromkeys(place for place, _ in found if (place / "scenario.yaml").exists())
    failed = [f"A run failed: {error}." for _, error in found if error]
    if not places:
        raise UserError(*dict.fromkeys(failed))
    opened = [run.by(asked.metric) if asked.metric else run for run in map(Run.open, places)]
    comparison = Comparison(opened)
    metric, runs = comparison.metric, [run for run in opened if run.ended]
    costs = total_epsilon(every := [file.parent for file in (folder / "runs").glob("*/scenario.yaml")])
    cost = [words for _, words in costs.values()]
    if free := sum(not Run.open(place).scenario.get("privacy") for place in every):
        cost.append(f"{free} runs had no privacy at all, and nothing bounds what they reveal")
    points = [*map(asked.run, asked.points())] if asked.select else []
    best_alone = selecting.price(points, asked.select.mean, every) if asked.select else None
    cost += [best_alone[1]] if best_alone else []
    comparison.notes[:0] = [f"Tuning on private data is not free: {words}." for words in cost]
    comparison.notes += dict.fromkeys(failed)
    best = max(
        (run for run in runs if final(run) is not None and run.learnt and kind_of(run) is None),
        key=lambda run: (final(run) or 0.0) * (1 if run.higher_is_better else -1),
        default=None,
    )
    summary = {
        "sweep": asked.name,
        "runs": len(places),
        "ended": len(runs),
        "failed": len(failed),
        "best": str(best.folder) if best else None,
        metric: final(best) if best else None,
        "epsilon_total": {unit: value for unit, (value, _) in costs.items()},
        "epsilon_of_best": best_alone[0] if best_alone else None,
        "privacy": cost,
    }
    save(comparison.html(), folder / "comparison.html")
    (folder / "sweep.json").write_text(json.dumps(finite(summary), indent=2) + "\n")
    return Outcome(folder, comparison, summary)


def claim(folder: Path, asked: Sweep) -> None:
    """Make the sweep's folder, or make sure that it is this sweep's.

    Raises:
        UserError: it is another's, or cannot be written.
    """
    written = folder / "sweep.yaml"
    try:
        if written.exists():
            before = Sweep.model_validate(yaml.safe_load(written.read_text()))
            if before.model_copy(update={"parallel": asked.parallel}) != asked:
                raise UserError(f"{folder}: holds another sweep; name another folder with --out")
            return
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(asked.model_dump(), sort_keys=False))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    except (ValidationError, yaml.YAMLError) as error:
        raise UserError(f"{written}: is damaged; name another folder with --out") from error


def explore(asked: Sweep, folder: Path, told: Callable[[str], None]) -> list[tuple[Path, str | None]]:
    """Let Ray Tune run every trial.

    Returns:
        Each one's run folder, and what went wrong in it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # all but the one that Tune itself reads
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends a sweep as it ends a run
    import ray
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    class Told(tune.Callback):  # type: ignore[misc]
        done = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            value = (trial.last_result or {}).get(metric)
            self.tell(trial, f"{metric} {'not measured' if value is None else f'{value:.4f}'}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.tell(trial, "failed")

        def tell(self, trial: Any, what: str) -> None:
            self.done += 1
            point = ", ".join(
                f"{key} {json.dumps(value)}" for key, value in spread_out(_point(trial.config)).items()
            )
            told(f"{self.done}  {point}: {what}")

    drawn = {key: given for key, given in asked.search.items() if not isinstance(given, list)}
    space = {_GRID: tune.grid_search([{k: v for k, v in p.items() if k not in drawn} for p in asked.points()])}
    for key, given in drawn.items():
        least, most = (int(given.low), int(given.high)) if given.draw == "randint" else (given.low, given.high)
        space[key] = getattr(tune, given.draw)(least, most)
    points = [asked.run(point) for point in itertools.islice(asked.points(), _CHECKED)]
    metric, higher = judged_by(asked, points[0])
    scheduler = asked.stop_early and ASHAScheduler(
        time_attr="round",
        max_t=max(point.rounds for point in points),
        grace_period=asked.stop_early.grace,
        reduction_factor=asked.stop_early.factor,
    )
    cores = len(os.sched_getaffinity(0)) if asked.parallel == "auto" else asked.parallel
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)  # one's own strategies are found there too
    environment = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a scenario stay what they are
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # so that the process of a run that was ended early serves on
    }
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    begin(
        "the machine may be busy: start the sweep again, and it goes on",
        address="local",
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        runtime_env={"env_vars": environment},
        **place(),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong in a run is told by us, in a line
    try:
        results = tune.Tuner(
            tune.with_parameters(_trial, asked=asked, folder=folder, metric=metric),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=metric,
                mode="max" if higher else "min",
                num_samples=asked.samples,
                scheduler=scheduler,
                search_alg=BasicVariantGenerator(random_state=asked.seed),
                reuse_actors=True,  # what a process has imported serves the next run too
            ),
            run_config=tune.RunConfig(
                name=".tune", storage_path=str(folder), verbose=0, callbacks=[Told(), JsonLoggerCallback()]
            ),
        ).fit()
    finally:
        ray.shutdown()
        shutil.rmtree(folder / ".tune", ignore_errors=True)  # the run folders hold all that a resumption needs
    return [(_place(folder, asked.run(_point(r.config))), _reason(r.error) if r.error else None) for r in results]


def _reason(error: Exception) -> str:
    """What went wrong in a trial, without Ray's trace of it and the name of its class."""
    last = str(error).strip().splitlines()[-1]
    return last.partition("Error: ")[2] or last


def _point(config: Settings) -> Settings:
    """What a trial of Ray's stands for."""
    return {**config[_GRID], **{key: value for key, value in config.items() if key != _GRID}}


def _place(folder: Path, made: Scenario) -> Path:
    return folder / "runs" / f"{made.name}-{made.hash}"


def _trial(config: Settings, asked: Sweep, folder: Path, metric: str) -> None:
    """One run, or the rest of it, in a process of Ray's."""
    from ray import tune

    made = asked.run(_point(config))
    place = _place(folder, made)

    class Told(Silent):
        def round(self, line: Mapping[str, Any]) -> None:
            if line.get(metric) is not None:
                tune.report({metric: line[metric], "round": line["round"]})

    with (place.parent / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a trial of a sweep that was killed may live for a moment
        begun = (place / "scenario.yaml").exists()
        if begun:
            for line in Run.open(place).rounds:
                Told().round(line)
        if not begun or not Run.open(place).ended:
            simulate(made, out=place, resume=begun, display=Told())
            gc.collect()  # a model of half a gigabyte is held by cycles, and this process serves the next run
