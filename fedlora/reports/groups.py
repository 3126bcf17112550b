"""Runs of one configuration, one for each seed, taken together."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from fedlora.record import Record
from fedlora.reports import charts
from fedlora.reports.baselines import kind_of
from fedlora.reports.charts import Row


@dataclass
class Group:
    """Runs of one configuration, one for each seed.

    Attributes:
        label: what sets it apart from the other groups.
        runs: in the order in which they were named.
    """

    label: str
    runs: list[Record] = field(default_factory=list)

    def final(self, name: str | None = None) -> list[float]:
        """The last measured metric of each run that has one; by default the one that the run is judged by."""
        return [v for run in self.runs if (v := run.measured(name or run.metric)) is not None]

    @property
    def by_seed(self) -> dict[Any, float]:
        """The same by seed."""
        return {run.scenario.get("seed"): v for run in self.runs if (v := final(run)) is not None}

    @property
    def baseline(self) -> str | None:
        """The kind of baseline that it is; None if it is none."""
        return kind_of(self.runs[0])

    @property
    def mean(self) -> float | None:
        """The mean of `final`."""
        return statistics.fmean(values) if (values := self.final()) else None

    def edge(self, side: int) -> float:
        """One end of the bar around the mean: a sample standard deviation over seeds below (-1) or above (+1)."""
        values = self.final()
        return statistics.fmean(values) + side * (statistics.stdev(values) if len(values) > 1 else 0.0)

    def total(self, key: str) -> float:
        """The mean over runs of a figure summed over rounds."""
        return statistics.fmean(sum(line.get(key) or 0 for line in run.rounds) for run in self.runs)

    @property
    def hours(self) -> float | None:
        """The mean over runs of the virtual hours that the simulated devices took; None without a world."""
        ends = [run.rounds[-1].get("virtual_seconds") for run in self.runs if run.rounds]
        known = [end / 3600 for end in ends if end is not None]
        return statistics.fmean(known) if known else None

    @property
    def unit(self) -> str | None:
        """Whom its epsilon is for: `example`, `person` or `client`; None without privacy."""
        return self.runs[0].protects

    @property
    def epsilon(self) -> float | None:
        """The largest that any of its runs spent."""
        spent = [line["epsilon"] for run in self.runs for line in run.rounds if line.get("epsilon") is not None]
        return max(spent, default=None)


def final(run: Record) -> float | None:
    """The last measured metric of a run, or that of the round that it kept."""
    return run.measured(run.metric)


def curve(group: Group, metric: str) -> Iterator[Row]:
    """Mean and spread of the metric over runs, in the rounds that all of them measured."""
    measured: dict[int, list[tuple[float, float, float | None]]] = {}
    for run in group.runs:
        sent = accumulate(line.get("bytes_up", 0) + line.get("bytes_down", 0) for line in run.rounds)
        for line, total in zip(run.rounds, sent, strict=True):
            if line.get(metric) is not None:
                measured.setdefault(line["round"], []).append(
                    (total / 1e6, line[metric], line.get("virtual_seconds"))
                )
    for round, found in sorted(measured.items()):
        if len(found) == len(group.runs):
            mean = statistics.fmean(value for _, value, _ in found)
            around = statistics.stdev(value for _, value, _ in found) if len(found) > 1 else 0.0
            guesses = [run.majority for run in group.runs if run.majority is not None]
            clocks = [clock / 3600 for _, _, clock in found if clock is not None]
            yield {
                "run": group.label,
                "round": round,
                "megabytes": statistics.fmean(total for total, _, _ in found),
                **({"hours": statistics.fmean(clocks)} if len(clocks) == len(found) else {}),
                metric: mean,
                "low": mean - around,
                "high": mean + around,
                **({charts.MAJORITY: guesses[0]} if guesses else {}),
            }
