"""A run's figures on their way to TensorBoard, Weights & Biases or MLflow, under the names of `metrics.jsonl`."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedlora.errors import SettingError
from fedlora.reports.console import Display
from fedlora.scenario import Scenario
from fedlora.seeding import key

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Where figures go."""

    def log(self, figures: Mapping[str, float], round: int) -> None:
        """Figures of a round."""

    def close(self) -> None:
        """The run has ended, one way or another."""


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir runs` shows them."""

    def __init__(self, scenario: Scenario, folder: Path, done: int) -> None:
        from tensorboardX import SummaryWriter

        # The suffix keeps apart what was written within one second of a run and its resumption.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1, filename_suffix=f".{done}")

    def log(self, figures: Mapping[str, float], round: int) -> None:
        """Scalars by round."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """A run of the project `fedlora`; a run that is resumed goes on there."""

    def __init__(self, scenario: Scenario, folder: Path, done: int) -> None:
        import wandb

        self._run = wandb.init(
            project="fedlora",
            name=folder.name,
            id=key(0, str(folder.resolve())).hex()[:16],
            resume="allow",
            config=scenario.model_dump(mode="json"),
            dir=str(folder),
        )

    def log(self, figures: Mapping[str, float], round: int) -> None:
        """Figures by step."""
        self._run.log(dict(figures), step=round)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run of the experiment `fedlora`, where MLflow's own settings say."""

    def __init__(self, scenario: Scenario, folder: Path, done: int) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("fedlora")
        mlflow.start_run(run_name=folder.name)
        mlflow.log_text(scenario.to_yaml(), "scenario.yaml")

    def log(self, figures: Mapping[str, float], round: int) -> None:
        """Metrics by step."""
        self._mlflow.log_metrics(dict(figures), step=round)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


_TRACKERS: Mapping[str, type[TensorBoard] | type[Wandb] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def check(names: Sequence[str]) -> None:
    """Make sure that each tracker's package is installed, without importing it.

    Raises:
        SettingError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise SettingError("trackers", f"{name} comes with an extra: pip install 'fedlora[{name}]'")


class Tracked:
    """A display that also logs to the trackers that a scenario names."""

    def __init__(self, shown: Display, folder: Path) -> None:
        """Wrap a display.

        Args:
            shown: gets everything as well.
            folder: of the run.
        """
        self.shown, self.folder = shown, folder
        self._trackers: list[Tracker] = []

    def stage(self, what: str) -> None:
        """Something that takes a while has begun."""
        self.shown.stage(what)

    def note(self, what: str) -> None:
        """Shown, and not tracked."""
        self.shown.note(what)

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Start the trackers.

        Raises:
            SettingError: one cannot.
        """
        for name in scenario.trackers:
            try:
                self._trackers.append(_TRACKERS[name](scenario, self.folder, done))
            except Exception as error:  # of whatever it talks to
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SettingError("trackers", f"{name} cannot start: {reason}") from error
        self.shown.begin(scenario, metric, done)

    def round(self, line: Mapping[str, Any]) -> None:
        """Log a round."""
        for tracker in self._trackers:
            tracker.log(figures(line), line["round"])
        self.shown.round(line)

    def close(self) -> None:
        """The run has ended, one way or another."""
        for tracker in self._trackers:
            tracker.close()


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`; those within a mapping as `outer/inner`."""
    return dict(_figures(line))


def _figures(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "round":
            yield prefix + name, float(value)
