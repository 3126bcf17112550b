"""A run folder, read: finished, stopped, of another version, or still being written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml

from fedlora import plugins
from fedlora.errors import UserError, suggestion
from fedlora.metrics.contract import known
from fedlora.privacy import ledger
from fedlora.reports.verdicts import AGAIN, GUESSED, UNLEARNT, Verdict, verdicts
from fedlora.tasks.contract import find

if TYPE_CHECKING:
    import altair
    import pandas

Line = dict[str, Any]

INTRODUCTION = "run.json"  # what a server told a site about a run
ENDED = "ended.json"  # what it told the site of the run's end
_BUILT_IN = {"accuracy": True} | {c.metric: c.higher_is_better for c in map(find, plugins.names("tasks"))}


@dataclass(frozen=True)
class Record:
    """A run folder.

    Attributes:
        folder: where it is.
        summary: what `summary.json` holds; empty before the run has ended.
        judged_by: the figure that it is about, where that is not the task's own.
    """

    folder: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    judged_by: str | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The run in a folder, whatever state it is in.

        Raises:
            UserError: the folder holds no run, or its summary is damaged.
        """
        folder = Path(folder)
        if not (folder / "scenario.yaml").is_file():
            what = "holds no run: scenario.yaml is missing" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {what}; name a folder that fedlora simulate wrote")
        run = cls(folder)
        return cls(folder, run._json("summary.json"))

    def by(self, name: str) -> Self:
        """The same run, judged by another of its figures, such as `macro_f1`.

        Raises:
            UserError: it has none of that name.
        """
        if name not in (known := self.figures):
            raise UserError(f"{self.folder}: has no figure {name!r}: {suggestion(name, known)}")
        return replace(self, judged_by=name)

    @property
    def figures(self) -> list[str]:
        """The names of its figures of the test rows: the task's own, those of `metrics`, and `loss`."""
        asked = [str(use).rpartition(":")[2] for use in self.scenario.get("metrics") or ()]
        return [*dict.fromkeys([self._own, *asked, *(self.summary.get("metrics") or {}), "loss"])]

    @cached_property
    def scenario(self) -> Mapping[str, Any]:
        """The resolved scenario as it was written; not checked, for it may be of another version."""
        try:
            read = yaml.safe_load((self.folder / "scenario.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{self.folder / 'scenario.yaml'}: cannot be read: {error}") from error
        if not isinstance(read, dict):
            raise UserError(f"{self.folder / 'scenario.yaml'}:1: holds no scenario; the run is damaged")
        return read

    @property
    def protects(self) -> str | None:
        """Whom its epsilon is for: `example`, `person` or `client`; None without privacy."""
        asked = self.scenario.get("privacy") or {}
        return ("person" if asked.get("person") else asked.get("unit", "example")) if asked else None

    @property
    def rounds(self) -> list[Line]:
        """The lines of `metrics.jsonl`, one for each round."""
        return self._lines("metrics.jsonl")

    @property
    def clients(self) -> list[Line]:
        """The lines of `clients.jsonl`, one for each client and round."""
        return self._lines("clients.jsonl")

    @property
    def partitions(self) -> Mapping[str, Any]:
        """What `partitions.json` holds: `labels`, and for each client how many examples of each."""
        return self._json("partitions.json")

    @property
    def metric(self) -> str:
        """The figure that the run is about, such as `accuracy`."""
        return self.judged_by or self._own

    @property
    def _own(self) -> str:
        """The task's own figure."""
        if isinstance(told := self.summary.get("metric"), str):
            return told
        seen = {**dict.fromkeys(self.summary), **dict.fromkeys(key for line in self.rounds[:1] for key in line)}
        return next((name for name in _BUILT_IN if name in seen), next(iter(_BUILT_IN)))

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""
        if self.metric == self._own:
            return bool(self.summary.get("higher_is_better", _BUILT_IN.get(self.metric, True)))
        task = str(self.scenario.get("task", "classification"))
        target = find(task).target if task in plugins.names("tasks") else "class"
        ours = [name for name, metric in known(target).items() if not metric.higher_is_better]
        return self.metric not in ("loss", *self.summary.get("lower_is_better", ours))

    @property
    def test(self) -> Mapping[str, Any]:
        """What `test.json` holds: `round`, `labels`, `confusion` and `classes`; empty where there is none."""
        return self._json("test.json")

    def measured(self, name: str) -> float | None:
        """A figure at its end: the last measured, or that of the round that was kept."""
        if self.best_round is not None:
            told = (self.summary.get("metrics") or {}).get(name, self.summary.get(name))
            if told is None:
                kept = (line for line in self.rounds if line["round"] == self.best_round)
                told = next((line.get(name) for line in kept), None)
            return None if told is None else float(told)
        values = [line[name] for line in self.rounds if line.get(name) is not None]
        return values[-1] if values else None

    @property
    def majority(self) -> float | None:
        """What always saying the commonest label comes to in the metric; None where that is not known."""
        told = self.summary.get("majority")
        return float(told) if isinstance(told, int | float) and self.metric in GUESSED else None

    @property
    def state(self) -> Literal["finished", "stopped", "unfinished"]:
        """Whether it ended; `unfinished` also where it was resumed after its summary was written."""
        rounds = self.rounds
        if not self.summary or (rounds and rounds[-1]["round"] > self.summary.get("rounds", 0)):
            return "unfinished"
        return "stopped" if "stopped" in self.summary else "finished"

    @property
    def best_round(self) -> int | None:
        """The round whose adapter was kept, where a choice was made; None where that is the last."""
        return self.summary.get("best_round") if self.state != "unfinished" else None

    @property
    def at_site(self) -> bool:
        """Whether this is what a site keeps of a run that a server drives: it has no summary at its end."""
        return (self.folder / INTRODUCTION).exists()

    @property
    def site_said(self) -> str:
        """What a site knows of how far a run has come."""
        trained = [line["round"] for line in self.rounds if line.get("clients")]
        asked = self.scenario.get("rounds")
        last = max(trained, default=0)
        said = f"{len(set(trained))} of {asked} rounds were trained here"
        if self.site_finished:
            here = "; its adapter is here" if (self.folder / "adapter").is_dir() else ""
            return f"finished after round {self.site_end['round']}: {said}{here}"
        if not trained:
            return f"no round of {asked} was trained here yet"
        if last == asked:
            return f"{said}, its last among them: finished as far as a site knows"
        return f"{said}, round {last} the last; whether the run goes on its server knows"

    @property
    def site_end(self) -> Mapping[str, Any]:
        """What its server told a site of the run's end: `round`, the last, and more; empty before that."""
        return self._json(ENDED)

    @property
    def site_finished(self) -> bool:
        """Whether a site was told so, and has trained no round after that."""
        trained = [line["round"] for line in self.rounds if line.get("clients")]
        return bool(self.site_end) and self.site_end.get("round", 0) >= max(trained, default=0)

    @property
    def introduced_by(self) -> str | None:
        """The version of the server that told a site of the run; None where that is not known."""
        told = self._json(INTRODUCTION).get("version")
        return None if told is None else str(told)

    @property
    def ended(self) -> bool:
        """Whether its figures are those of its scenario: it neither goes on, nor was killed or interrupted."""
        return self.state != "unfinished" and not str(self.summary.get("stopped", "")).startswith("interrupted")

    def verdicts(self) -> list[Verdict]:
        """What is wrong with how it learnt, each with the setting to try; none before it has ended."""
        if not self.ended:
            return []
        labels = len(self.partitions.get("labels") or ())
        told = {**self.summary, "metric": self.metric, "higher_is_better": self.higher_is_better}
        return verdicts(self.rounds, self.clients, self.scenario, told, labels)

    @property
    def learnt(self) -> bool:
        """Whether no verdict forbids to choose it for its metric."""
        return not any(verdict.code in UNLEARNT for verdict in self.verdicts())

    def remarks(self, again: bool = True) -> list[str]:
        """What a reader has to know before trusting the figures, a sentence for each.

        Args:
            again: whether to say that following a verdict on a private run costs epsilon again.
        """
        said = []
        done, asked = len(self.rounds), self.scenario.get("rounds")
        if self.at_site:
            said.append(f"This is a site's part of a run: {self.site_said}.")
        elif self.state == "unfinished":
            said.append(
                f"This run has not ended, {done} of {asked} rounds are recorded. It still runs, or was killed."
            )
        if self.state == "stopped":
            said.append(f"This run stopped early, {self.summary['stopped']}: {done} of {asked} rounds.")
        if "ended" in self.summary and self.state == "finished":
            said.append(f"This run ended early, {self.summary['ended']}: {done} of {asked} rounds.")
        if (best := self.best_round) is not None:
            said.append(f"Its figures and its adapter are of round {best}, which validation rows chose.")
        if (cut := self.summary.get("compress")) is not None:
            numbers = cut["parameters"]
            sizes = f"{numbers['before']:,} numbers to {numbers['after']:,}"
            said.append(f"Its base was cut by {cut['use']} from {sizes} before round 1.")
        wrote = self.summary.get("versions", {}).get("fedlora")
        if self.summary and wrote != (here := version("fedlora")):
            said.append(f"Written by fedlora {wrote or 'of an unknown version'}, read by {here}.")
        absent = [name for name in ("metrics.jsonl", "clients.jsonl") if not (self.folder / name).exists()]
        if absent and self.state != "unfinished":
            said.append(f"Not in the folder: {', '.join(absent)}.")
        start = self.summary.get("start") if self.scenario.get("privacy") else None
        while start:
            spent = start.get("epsilon")
            cost = (
                "which does not say what it cost its rows" if spent is None else f"which spent epsilon {spent:.3g}"
            )
            said.append(
                f"It began from {start['folder']}, {cost}: for rows that are in both, that adds to this run's."
            )
            start = start.get("start")  # which began from another
        found = self.verdicts()
        costs = [f"{AGAIN}."] if again and found and self.scenario.get("privacy") else []
        return said + [f"{text[0].upper()}{text[1:]}." for text in map(str, found)] + costs

    def frame(self, what: Literal["rounds", "clients"] = "rounds") -> "pandas.DataFrame":
        """The lines of `rounds` or `clients` as a table."""
        import pandas

        return pandas.DataFrame(self.rounds if what == "rounds" else self.clients)

    def plot(self, metric: str | None = None) -> "altair.LayerChart":
        """A figure by round, by default the run's metric, as a chart that a notebook shows."""
        from fedlora.reports import charts

        if metric is not None:
            return self.by(metric).plot()
        return charts.metric_by_round(self.rounds, self.metric, self.majority, self.best_round)

    def _lines(self, name: str) -> list[Line]:
        """The whole lines of a record; the last may be half written while the run goes on."""
        file = self.folder / name
        return ledger.read(file, torn=True) if file.exists() else []

    def _json(self, name: str) -> Mapping[str, Any]:
        file = self.folder / name
        try:
            read = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON; the run is damaged") from error
        if not isinstance(read, dict):
            raise UserError(f"{file}:1: not a JSON object; the run is damaged")
        return read
