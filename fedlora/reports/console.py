"""The live display of a run: an aligned line for each round, and on a terminal a bar below."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedlora.errors import counted
from fedlora.privacy.wording import protected
from fedlora.record import Record
from fedlora.reports.meaning import promise_of
from fedlora.reports.verdicts import AGAIN
from fedlora.scenario import Scenario, written


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def span(seconds: float) -> str:
    """A duration as people read it."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


class Display(Protocol):
    """What a person watches; `fedlora.reports.console` has one."""

    def stage(self, what: str) -> None:
        """Something that takes a while has begun."""

    def note(self, what: str) -> None:
        """Something that happened, in a sentence."""

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Rounds begin, or go on after `done` of them."""

    def round(self, line: Mapping[str, Any]) -> None:
        """A round has finished."""


class Silent:
    """Shows nothing."""

    def stage(self, what: str) -> None:
        """Nothing."""

    def note(self, what: str) -> None:
        """Nothing."""

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Nothing."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Nothing."""


class Bar:
    """One progress bar with the last figures: a widget in a notebook, a line elsewhere."""

    def stage(self, what: str) -> None:
        """Nothing: the bar begins with the rounds."""

    def note(self, what: str) -> None:
        """Nothing: a notebook shows the bar alone."""

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Draw the bar."""
        from tqdm.auto import tqdm

        self._metric = metric
        self._bar = tqdm(total=scenario.rounds, initial=done, desc=scenario.name, unit="round")

    def round(self, line: Mapping[str, Any]) -> None:
        """Move it."""
        told = {key: line[key] for key in (self._metric, "epsilon") if line.get(key) is not None}
        self._bar.set_postfix(told, refresh=False)
        self._bar.update()
        if line["round"] == self._bar.total:
            self._bar.close()


def default_display() -> Display:
    """A bar where a notebook runs this, else nothing."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python else None
    return Bar() if type(shell).__name__ == "ZMQInteractiveShell" else Silent()


class Live:
    """A line for each round as it ends; on a terminal also a bar, and what is done meanwhile."""

    def __init__(self, console: Console | None = None, shown: bool | None = None) -> None:
        """Show a run.

        Args:
            console: where; by default on standard error.
            shown: whether with a bar, by default only on a terminal.
        """
        self.console = console or Console(stderr=True)
        self.shown = self.console.is_terminal if shown is None else shown
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._metric, self._rounds, self._done, self._started = "accuracy", 0, 0, time.monotonic()
        self._began: float | None = None
        self._ended = 0.0

    def __enter__(self) -> Self:
        if self.shown:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, what: str) -> None:
        """Something that takes a while has begun."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def note(self, what: str) -> None:
        """Print it."""
        self.console.print(f"  {what}", highlight=False, markup=False, soft_wrap=True)

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Print the head of the table."""
        self._metric, self._rounds, self._done = metric, scenario.rounds, done
        self._began = self._ended = time.monotonic()
        cohort = f"{scenario.clients.cohort_size} of {counted(scenario.clients.total, 'client')} a round"
        private = scenario.clients.use if scenario.privacy is None else f"{scenario.clients.use}, private"
        self._print(
            f"[bold]{scenario.name}[/]  {scenario.strategy.use}, {private}, {cohort}, seed {scenario.seed}"
        )
        if asked := scenario.privacy:
            most = "" if asked.unit == "client" else ", of the client that spent most"
            whom = protected(asked.protects, asked.person)
            seen = "" if scenario.shares_example_noise is None else ", from all who see sums"
            self._print(f"[dim]epsilon: spent so far at delta {asked.delta:g} for each {whom}{most}{seen}[/]")
        names = ("round", "clients", metric, "loss", "up", "down", "epsilon", "seconds", "left")
        self._print(f"[dim]{self._row(names)}[/]")
        if self._bar is not None:
            self._bar.update(self._task, description="training", total=scenario.rounds, completed=done)

    def round(self, line: Mapping[str, Any]) -> None:
        """Print a row of the table."""
        finished, self._ended = line["round"], time.monotonic()
        each = (self._ended - (self._began or self._ended)) / max(finished - self._done, 1)
        loss = line["loss"] if line["loss"] is not None else line["train_loss"]
        failed = f"-{line['failures']}" if line.get("failures") else ""
        self._print(
            self._row(
                (
                    f"{finished}/{self._rounds}",
                    f"{line.get('clients', '-')}{failed}",
                    _figure(line[self._metric]),
                    _figure(loss),
                    *(size(line[key]) if key in line else "-" for key in ("bytes_up", "bytes_down")),
                    _figure(line["epsilon"], 3),
                    f"{line['seconds']:.1f}",
                    span(each * (self._rounds - finished)),
                )
            )
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=finished)

    def time_line(self) -> str:
        """Where the time went so far: before the rounds, in them, and after the last.

        `seconds` of `summary.json` is of the rounds, of those before a resume too, without what they write.
        """
        now = time.monotonic()
        began, ended = self._began or now, self._ended or now
        told = (
            f"start {span(began - self._started)} (rows, noise, model), rounds {span(ended - began)}, "
            f"end {span(now - ended)} (adapter, card)"
        )
        return f"  time     {span(now - self._started)} in all: {told}"

    def _row(self, cells: Sequence[str]) -> str:
        """Cells in columns that fit 80 together, where the rounds have at most three digits."""
        widths = (max(7, 2 * len(str(self._rounds)) + 1), 7, max(8, len(self._metric)), 7, 9, 9, 7, 7, 6)
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=self._bar is None)


def follow(run: Record, display: Live, pause: float = 0.5) -> Record:
    """Show a run's rounds as they are written, until it has ended; gives it with its summary, if it has one.

    Raises:
        UserError: its scenario cannot be read by this version.
    """
    display.begin(written(run.folder), run.metric, 0)
    told = 0
    while True:
        run = Record.open(run.folder)
        lines = run.rounds
        last = bool(lines) and lines[-1]["round"] == run.scenario.get("rounds")
        ended = run.state != "unfinished" or (run.at_site and (last or run.site_finished))
        for line in lines[told:]:
            display.round(line)
        told = len(lines)
        if ended:
            return run
        time.sleep(pause)


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary_lines(run: Record) -> list[str]:
    """What is printed at the end of a run, terminal or not."""
    folder, summary, metric = run.folder, run.summary, run.metric
    value = "not measured" if summary[metric] is None else f"{summary[metric]:.4f}"
    kept = f" (round {summary['best_round']} is kept)" if "best_round" in summary else ""
    lines = [
        f"{summary['scenario']}: {metric} {value} on {summary['test_examples']:,} test examples "
        f"after {summary['rounds']} rounds{kept} of {summary['strategy']} in {span(summary['seconds'])}",
        *_privacy_lines(run),
        f"  folder   {folder}",
        f"  adapter  {folder}/adapter",
    ]
    if "bytes_up_total" in summary:  # it stays with a server that protects clients whole
        sent = f"  sent up {size(summary['bytes_up_total'])} (head {size(summary['bytes_up_head'])}), "
        lines.insert(1, f"{sent}down {size(summary['bytes_down_total'])}; client failures {summary['failures']}")
    if (cut := summary.get("compress")) is not None:
        lines.insert(2, f"  base     {_cut(cut)}")
    for rank, told in (summary.get("prefixes") or {}).items():
        lines.append(f"  rank {rank:<4}{metric} {told[metric]:.4f}  {folder}/prefixes/rank-{rank}")
    if "virtual_seconds" in summary:
        lines.insert(2, f"  devices  {summary['virtual_seconds'] / 3600:.2f} virtual hours")
    if "stopped" in summary:
        more = "; continue with --resume" if summary["stopped"].startswith("interrupted") else ""
        lines.insert(1, f"  stopped  {summary['stopped']}{more}")
    if "ended" in summary:
        lines.insert(1, f"  ended    {summary['ended']}")
    found = run.verdicts()
    lines += [f"  verdict  {verdict}" for verdict in found]
    if found and run.scenario.get("privacy"):
        lines.append(f"           {AGAIN}")
    return lines


def _cut(told: Mapping[str, Any]) -> str:
    """What the base became before the first round, and what its statistic cost."""
    numbers, statistic = told["parameters"], told["statistic"]
    said = f"cut by {told['use']} from {numbers['before']:,} numbers to {numbers['after']:,}"
    if statistic is None:
        return f"{said}, by its weights alone"
    cost = f", epsilon {statistic['epsilon']:g} of the whole" if "epsilon" in statistic else ""
    return f"{said}, by {statistic['kind']}: {size(statistic['bytes_up'])} up beside the rounds{cost}"


def _privacy_lines(run: Record) -> list[str]:
    """A run's promise: the number and its unit, what that means, and from whom; summary.json has its terms."""
    told = promise_of(run)
    if told is None or told.epsilon is None:
        return [f"  privacy  {str(run.summary['privacy']).partition('; ')[0].partition(', neighbouring')[0]}"]
    whose = "" if told.unit == "client" else ", by the client that spent most"
    said = f"  privacy  epsilon {told.epsilon:.3g} at delta {told.delta:g} for each {told.unit}{whose}"
    lines = [said, f"           {told.sentence}"]
    if told.honest is not None:
        own = "" if told.own is None else f": epsilon {told.own:.3g}"
        kept = f"if {told.kept} of those who send keep their noise"
        lines += [
            f"           from all who see sums, the server too, {kept};",
            f"           if all others give theirs away, by a client's own part alone{own}",
        ]
    return lines
