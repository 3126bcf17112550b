"""`fedlora compare`: runs side by side, those that differ by their seed alone taken together."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.errors import UserError, counted
from fedlora.record import Record
from fedlora.reports import charts, paper
from fedlora.reports.baselines import Measured, ends, of, sentences
from fedlora.reports.charts import Figure
from fedlora.reports.groups import Group, curve
from fedlora.reports.labels import labels_of
from fedlora.reports.page import Page, save
from fedlora.reports.significance import FEW, Test, front, p_value
from fedlora.reports.tables import Table, spread
from fedlora.reports.verdicts import AGAIN
from fedlora.rounds.diagnostics import FIGURES

ALIKE = 0.01  # share by which epsilons may differ and count as equal
PARETO = "Pareto front"  # a column
_NONE = "-"


class Comparison:
    """Runs, grouped, judged and laid out."""

    def __init__(self, runs: Sequence[Record], names: Sequence[str] | None = None) -> None:
        """Group runs; the first named says what the others are compared with.

        Args:
            runs: of the same task and data.
            names: of the configurations, in the order of the rows; None: the settings in which they differ.

        Raises:
            UserError: there are no runs, or not as many names as configurations.
        """
        unique = list({run.folder.resolve(): run for run in runs}.values())
        if not unique:
            raise UserError("name one run folder or more")
        self.metric, self.higher_is_better = unique[0].metric, unique[0].higher_is_better
        self.notes: list[str] = []
        self.groups: list[Group] = []
        self.apart: list[Group] = []  # not ended, or measured by something else: shown, and not compared
        kept: list[Record] = []
        others: list[Record] = []
        for run in unique:
            other = run.metric != self.metric or _judged_by(run) != _judged_by(unique[0])
            (others if other or not run.ended else kept).append(run)
        labels = labels_of(unique)
        self.groups, self.apart = self._grouped(kept, labels), self._grouped(others, labels)
        if names is not None:
            self._call(names)
        self.notes = [*self._remarks(unique, named=names is not None), *self.notes]

    def _remarks(self, runs: Sequence[Record], named: bool) -> Iterator[str]:
        """What a reader has to know of the runs, a sentence each, and what holds for several of them once.

        Args:
            runs: each once.
            named: whether the configurations were given names, which are said in the place of folders.
        """
        called = {run.folder: run.folder.name for run in runs}
        for group in (*self.groups, *self.apart) if named else ():
            for run in group.runs:
                seed = f", seed {run.scenario.get('seed')}" if len(group.runs) > 1 else ""
                called[run.folder] = f"{group.label}{seed}"
        first = runs[0]
        for run in runs:
            yield from (f"{called[run.folder]}: {said}" for said in run.remarks(again=False))
            if run.metric != self.metric or _judged_by(run) != _judged_by(first):
                yield f"{called[run.folder]}: measured on other data or by another metric; not compared."
        if any(run.protects is not None and run.verdicts() for run in runs):
            yield f"{AGAIN}."
        if len(self.units) > 1:
            said = " and ".join(
                f"for each {one} in {'others' if i else 'some runs'}" for i, one in enumerate(self.units)
            )
            these = "the two" if len(self.units) == 2 else "them"
            yield f"epsilon is {said}: do not compare {these}."

    @cached_property
    def units(self) -> list[str]:
        """Whom the epsilons are for, each once."""
        return sorted({g.unit for g in (*self.groups, *self.apart) if g.unit is not None})

    def _grouped(self, runs: Sequence[Record], labels: Mapping[Path, str]) -> list[Group]:
        """Groups in the order in which they are first named; of runs of one seed the first."""
        groups: dict[str, Group] = {}
        for run in runs:
            group = groups.setdefault(labels[run.folder], Group(labels[run.folder]))
            seed = run.scenario.get("seed")
            if same := next((one for one in group.runs if one.scenario.get("seed") == seed), None):
                names = run.folder.name, same.folder.name
                self.notes.append("{}: its seed and settings are those of {}; not counted again.".format(*names))
            else:
                group.runs.append(run)
        return list(groups.values())

    def _call(self, names: Sequence[str]) -> None:
        """Give the groups names."""
        every = [*self.groups, *self.apart]
        if len(names) != len(every):
            found = "; ".join(group.label for group in every)
            what = f"{counted(len(names), 'name')} for {counted(len(every), 'configuration')}"
            raise UserError(f"--names: {what}; name these in this order: {found}")
        if len(set(names)) < len(names) or not all(names):
            raise UserError("--names: each configuration needs a name of its own")
        for group, name in zip(every, names, strict=True):
            group.label = name

    @cached_property
    def tests(self) -> Mapping[str, Test]:
        """Each group against the first, by label."""
        found: dict[str, Test] = {}
        for group in self.groups[1:]:
            base = self.groups[0]
            if base.mean is not None and group.mean is not None:
                p, paired = p_value(base.by_seed, group.by_seed)
                found[group.label] = Test(group.mean - base.mean, p, paired)
        ranked = sorted([(t.p, label) for label, t in found.items() if t.p is not None])
        least = 0.0
        for place, (p, label) in enumerate(ranked):  # Holm: the smallest counts for all that are left
            least = max(least, min(1.0, p * (len(ranked) - place)))
            found[label] = Test(found[label].difference, least, found[label].paired)
        return found

    @cached_property
    def front(self) -> set[str]:
        """Labels of the groups but baselines that no other beats in metric, bytes and epsilon at once.

        Epsilons of two units are not compared: a group with privacy is beaten by its own unit alone.
        """
        racing = [g for g in self.groups if g.mean is not None and g.baseline is None]
        beaten: set[str] = set()
        units: list[str | None] = [*self.units]
        for unit in units or [None]:
            costs = {g.label: self._costs(g, "epsilon", "bytes") for g in racing if g.unit in (unit, None)}
            beaten |= costs.keys() - front(costs)
        return {g.label for g in racing if not self._unlearnt(g)} - beaten

    def _unlearnt(self, group: Group) -> bool:
        """Whether a group is no better than the commonest label."""
        guesses = [run.majority for run in group.runs if run.majority is not None and run.metric == self.metric]
        assert group.mean is not None
        return bool(guesses) and group.mean <= max(guesses)

    @cached_property
    def sentences(self) -> list[str]:
        """What baselines say of the runs that they belong to: the price of privacy, the gain of federating."""
        measured = [
            Measured(g.label, g.baseline, of(g.runs[0]), g.by_seed, g.epsilon, ends(g.runs, self.metric))
            for g in self.groups
        ]
        return sentences(measured, self.metric, self.higher_is_better)

    def _costs(self, group: Group, *what: str) -> tuple[float, ...]:
        """What is to be low: the metric, turned over where more of it is better, and what is asked for.

        Epsilons of a calibration differ by its rounding: those within a per cent of each other are taken as equal.
        """
        assert group.mean is not None
        spent = {
            "bytes": group.total("bytes_up") + group.total("bytes_down"),
            "epsilon": self._rounded(group),
        }
        return (-group.mean if self.higher_is_better else group.mean, *(spent[key] for key in what))

    def _rounded(self, group: Group) -> float:
        """The least epsilon of groups of one unit that it is within a per cent of; infinite without one."""
        if (spent := group.epsilon) is None:
            return float("inf")
        same = (g for g in (*self.groups, *self.apart) if g.unit == group.unit)
        return next(
            e for e in sorted(g.epsilon for g in same if g.epsilon is not None) if spent <= e * (1 + ALIKE)
        )

    def table(self) -> Table:
        """A row for each group."""
        head = ("configuration", "seeds", self.metric, "difference", "p", "MB up", "MB down", "epsilon", "minutes")
        rows = [self._row(group) for group in self.groups]
        rows += [[f"({row[0]})", *row[1:]] for row in map(self._row, self.apart)]
        made = Table((*head, PARETO, *self.others), rows, frozenset({0}))
        if len(self.units) > 1:
            at = head.index("epsilon") + 1
            words = [group.unit or _NONE for group in (*self.groups, *self.apart)]
            rows = [[*row[:at], word, *row[at:]] for row, word in zip(rows, words, strict=True)]
            made = Table((*made.head[:at], "unit", *made.head[at:]), rows, frozenset({0, at}))
        hours = [group.hours for group in (*self.groups, *self.apart)]
        if any(hours):
            cells = [_NONE if h is None else f"{h:.2f}" for h in hours]
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
            made = Table((*made.head, "virtual hours"), rows, made.left)
        return made

    @cached_property
    def others(self) -> list[str]:
        """Further figures that all of the runs have, by name."""
        runs = [run for group in (*self.groups, *self.apart) for run in group.runs]
        names = [name for name in runs[0].figures if name not in (self.metric, "loss")]
        shared = set(names).intersection(*(run.figures for run in runs))
        beside = [name for name in FIGURES if all(run.measured(name) is not None for run in runs)]
        return [name for name in [*names, *beside] if name in {*shared, *beside}]

    def _row(self, group: Group) -> list[str]:
        test = self.tests.get(group.label) if group in self.groups else None
        epsilon = group.epsilon
        return [
            group.label,
            str(len(group.runs)),
            spread(group.final()),
            f"{test.difference:+.4f}" if test else _NONE,
            _NONE if test is None or test.p is None else ("<0.001" if test.p < 0.001 else f"{test.p:.3f}"),
            f"{group.total('bytes_up') / 1e6:.2f}",
            f"{group.total('bytes_down') / 1e6:.2f}",
            _spent(group) if epsilon is None else f"{epsilon:.2f}",
            f"{group.total('seconds') / 60:.1f}",
            "yes" if group.label in self.front and group in self.groups else "",
            *(spread(group.final(name)) for name in self.others),
        ]

    def legend(self) -> list[str]:
        """What the columns of the table mean, in sentences."""
        few = [g.label for g in self.groups if len(g.final()) < FEW]
        better = "more" if self.higher_is_better else "less"
        said = [
            f"{self.metric}: mean over seeds and sample standard deviation; {better} is better.",
            f"difference and p: against the first; a paired t-test where {FEW} seeds or more are shared, else "
            "Welch's, with Holm's correction.",
            f"{PARETO}: no other is as good in {self.metric}, megabytes and epsilon at once; epsilons within "
            "1 % count as equal. Runs no better than the commonest label stay out.",
        ]
        if len(self.units) > 1:
            said.append("unit: whom epsilon is for; the Pareto front of each unit is of its own.")
        if any(g.baseline for g in self.groups):
            said.append("pooled, pooled_private and alone are baselines, and stay out of the Pareto front.")
        if {*FIGURES} & {*self.others}:
            said.append(
                "effective_rank, noise_to_signal, nuclear_norm: of the last round; how many directions a layer's "
                "change has, noise over change, and how far representations of test rows spread."
            )
        if few and len(self.groups) > 1:
            said.append(f"Fewer than {FEW} seeds, so not tested: {', '.join(few)}.")
        return said

    def figures(self) -> list[Figure]:
        """Curves over rounds and megabytes, and the metric against each cost."""
        found = []
        metric = self.metric
        if rows := [row for g in self.groups for row in curve(g, metric)]:
            many = any(len(g.runs) > 1 for g in self.groups)
            note = "Mean over n seeds; the band is one standard deviation." if many else "One seed each."
            rows = [{**row, "run": self._seeds(str(row["run"]))} for row in rows]
            if any(charts.MAJORITY in row for row in rows):
                note += " Dashed: the commonest label."
            band = ("low", "high") if many else None
            axes = [("round", "round"), ("megabytes", "megabytes, up and down")]
            if all("hours" in row for row in rows):
                axes.append(("hours", "virtual hours, of the simulated devices"))
            for x, title in axes:
                chart = charts.lines(
                    *(rows, (x, title), (metric, metric)),
                    series="run",
                    band=band,
                    whole=x == "round",
                    rule=charts.MAJORITY,
                )
                found.append(Figure(f"{metric.capitalize()} by {x.removesuffix('s')}", note, chart))
        measured = [g for g in self.groups if g.mean is not None and g.baseline is None]
        spent: dict[str, list[Group]] = {}  # groups by what their axis is called: each unit has its own
        for g in measured:
            if g.epsilon is not None:
                spent.setdefault("epsilon" + (f" for each {g.unit}" if g.unit else ""), []).append(g)
        for title, known in (("megabytes, up and down", measured), *spent.items()):
            if len(known) < 2:
                continue
            cost = "epsilon" if title in spent else "bytes"
            costs = {g.label: self._costs(g, cost) for g in known}
            best = front(costs) - {g.label for g in known if self._unlearnt(g)}
            x = "megabytes" if cost == "bytes" else cost
            points = [
                {
                    "run": self._seeds(g.label),
                    x: costs[g.label][1] / 1e6 if cost == "bytes" else g.epsilon,
                    metric: g.mean,
                    "low": g.edge(-1),
                    "high": g.edge(+1),
                    PARETO: g.label in best,
                }
                for g in known
            ]
            note = (
                "One point for each configuration, its bar a standard deviation over n seeds each way; the dashed "
                "line joins those that none beats in both, the Pareto front."
            )
            chart = charts.points(points, (x, title), (metric, metric), "run", front=PARETO)
            against = title if cost == "epsilon" and len(self.units) > 1 else x
            found.append(Figure(f"{metric.capitalize()} against {against}", note, chart))
        return found

    def _seeds(self, label: str) -> str:
        """A group's label in a chart, with its number of seeds where any group has several."""
        if not any(len(g.runs) > 1 for g in self.groups):
            return label
        return f"{label}, n = {next(len(g.final()) for g in self.groups if g.label == label)}"

    def html(self) -> str:
        """The page."""
        count = sum(len(g.runs) for g in (*self.groups, *self.apart))
        page = Page(
            "Comparison",
            "fedlora · comparison of runs",
            f"{count} runs of {len(self.groups) + len(self.apart)} configurations, judged by {self.metric}.",
        )
        page.notices(self.notes)
        table = f'<div class="scroll" tabindex="0" role="region" aria-label="Results">{self.table().html()}</div>'
        page.section(
            "Results",
            *(f"<p>{escape(said)}</p>" for said in self.sentences),
            table,
            *(f'<p class="note">{escape(said)}</p>' for said in self.legend()),
        )
        page.section("Curves and costs", page.figures(self.figures()) or "<p>Nothing was measured yet.</p>")
        for title, text in (("Markdown", self.table().markdown()), ("LaTeX", self.table().latex())):
            page.section(
                f"The table in {title}",
                f'<pre tabindex="0" role="region" aria-label="{title}"><code>{escape(text)}</code></pre>',
            )
        return page.render(f"Page by fedlora {version('fedlora')}.")


def _judged_by(run: Record) -> tuple[Any, ...]:
    """What has to be the same for two metrics to be comparable."""
    data = run.scenario.get("data") or {}
    source = {key: data.get(key) for key in ("dataset", "hub", "files", "test_share", "validation_share")}
    return run.scenario.get("task"), json.dumps(source, sort_keys=True, default=str)


def compare(
    runs: Iterable[Record | str | Path],
    out: str | Path | None = None,
    metric: str | None = None,
    drawn: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Runs side by side; those that differ by their seed alone are one row, with its spread.

    Args:
        runs: or their folders; the first is what the others are compared with.
        out: a file to write the page to, one HTML file that opens offline; None: none is written.
        metric: the figure to compare them by, such as `macro_f1`; by default the task's own.
        drawn: a folder for the charts as SVG, PDF and PNG, as wide as a column of a paper; None: none are drawn.
        names: of the configurations, in the order of the table's rows; by default the settings that differ.

    Returns:
        The comparison: `table()`, `legend()`, `notes`, `html()`.

    Raises:
        UserError: a folder holds no run, a run has no such figure, there are more or fewer names than rows, or the
            file cannot be written.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    opened = [run if isinstance(run, Record) else Record.open(run) for run in runs]
    made = Comparison(opened if metric is None else [run.by(metric) for run in opened], names)
    if out is not None:
        save(made.html(), Path(out))
    if drawn is not None:
        paper.draw(made.figures(), drawn)
    return made


def _spent(group: Group) -> str:
    """What a group spent that has no epsilon: it asked for none, or its noise is too little for any."""
    return "unbounded" if any(run.scenario.get("privacy") for run in group.runs) else "none"
