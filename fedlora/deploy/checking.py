"""`fedlora site check`: what a site file says, and what was understood of it, for the owner of the rows.

It reads the rows as a worker does, without torch. What it tells stays on this machine: counts, labels and numbers
of rows, and never a text.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora import plugins
from fedlora.data import names, notes, overview, reading, suggested
from fedlora.deploy import figures, surveyed
from fedlora.deploy import site as sites
from fedlora.deploy.account import STATISTIC
from fedlora.deploy.site import FLOOR, Site, task_of, taught
from fedlora.errors import SettingError, UserError, counted, cut
from fedlora.privacy import accounting, ledger
from fedlora.privacy.ledger import Own
from fedlora.reports.tables import Table
from fedlora.returned import finite
from fedlora.scenario import templates
from fedlora.tasks import located

_LABELS = 12  # in a table for people
_ROWS = 8  # numbers of rows, likewise
_MUCH = 100.0  # epsilon
_MANY = 100  # rows of a person
_LITTLE = 2**30  # bytes of disk below which a ledger or a cache may soon not be written


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The site's budget.

    Attributes:
        max_epsilon: the most that its examples may lose in all runs together.
        delta: of it.
        accountant: that counts.
        epsilon: what they have lost, by the ledger in `state`.
        runs: names of the runs that it went to, with the lines of each but a statistic's.
        person: the column that says who is who; None where each row stands for itself.
    """

    max_epsilon: float
    delta: float
    accountant: str
    epsilon: float
    runs: dict[str, int]
    person: str | None = None


@dataclass(frozen=True, kw_only=True)
class Understood:
    """The site's rows.

    Attributes:
        task: by which they were read, as the site file describes them.
        rows: that a run may train on.
        labels: of each label of `data.labels`, how many of these have it.
        left_out: numbers of the other rows, from 1: their label is not in `data.labels`.
        nearly: of a label of `data.labels` how many of those have one that is likely meant as the same.
        empty: numbers of rows without a word, from 1.
        lengths: of the rows, in words; None of images.
        repeated: rows whose text stood before.
        persons: whom the rows are of; None where each row stands for itself.
    """

    task: str
    rows: int
    labels: dict[str, int]
    left_out: Sequence[int]
    nearly: dict[str, int]
    empty: Sequence[int]
    lengths: overview.Lengths | None
    repeated: int
    persons: int | None = None


@dataclass(frozen=True, kw_only=True)
class SiteChecked:
    """What a check of a site file found.

    Attributes:
        site: its file.
        name: of the site.
        client: which one it is in a scenario.
        problems: each in a line, with the file and line of its setting; none where all is fine.
        understood: of the rows; None where they are wrong.
        privacy: the budget; None where the site keeps none.
        rules: what a run may do here and what not, a sentence each.
        bases: of each base model that is accepted, where it is.
        state: the folder of the ledger.
        free: bytes of disk that are left for it.
        clock: the time that this machine has, in UTC.
        warnings: what is likely a mistake, and costs rows, a sentence each.
        notes: what is no mistake, and good to know, a sentence each.
        folder: from which relative paths are read.
    """

    site: str
    name: str = ""
    client: int = 0
    problems: Sequence[str] = ()
    understood: Understood | None = None
    privacy: Spent | None = None
    rules: Sequence[str] = ()
    bases: dict[str, str]
    state: str = ""
    free: int = 0
    clock: str = ""
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "fine": not self.problems}

    def told(self, as_json: bool) -> int:
        """Print it; gives the exit code.

        Raises:
            UserError: there are problems.
        """
        if as_json:
            print(json.dumps(finite(self.to_json()), indent=2))
            return 2 if self.problems else 0
        if self.problems:
            raise UserError(*self.problems)
        print("\n".join(self.lines()))
        return 0

    def lines(self) -> list[str]:
        """What a terminal shows, where there is no problem."""
        told = self.understood
        said = [["site", f"{self.name}, client {self.client} of a scenario"]]
        said += [["warning", one] for one in self.warnings]
        if told is not None:
            said += [*self._rows(told)]
        said += [["budget", line] for line in _budget(self.privacy)]
        said += [["a run", rule] for rule in self.rules]
        said += [["base", line] for line in self.bases.values()]
        said.append(["state", f"{self.state}, with {self.free / 2**30:.1f} GiB of disk left"])
        said.append(["clock", f"{self.clock}; certificates are valid by it"])
        said += [["note", note] for note in self.notes]
        fine = f"fine, but for {counted(len(self.warnings), 'warning')}" if self.warnings else "fine"
        return [f"{self.site}: {fine}", *Table(("what", "understood"), said, left=frozenset({0, 1})).text()]

    def _rows(self, told: Understood) -> Iterator[list[str]]:
        yield ["rows", f"{told.rows:,} to train on, read for task: {told.task}"]
        if told.persons is not None:
            yield ["persons", f"{told.persons:,}, each protected with all rows (privacy.person)"]
        if told.left_out:
            out = f"{counted(len(told.left_out), 'row')} with a label that is not in data.labels"
            yield ["left out", f"{out}: {_numbered(told.left_out)}"]
        ordered = sorted(told.labels.items(), key=lambda pair: -pair[1])
        for name, count in ordered[:_LABELS]:
            yield ["labels", f"{cut(name)!r}: {counted(count, 'row')}"]
        if more := ordered[_LABELS:]:
            yield ["labels", f"and {len(more)} more, rarer ones"]
        if (held := told.lengths) is not None:
            yield ["words", f"{held.median} in the median row, {held.most} at most"]
        if told.empty:
            yield ["empty", f"{counted(len(told.empty), 'row')} without a word: {_numbered(told.empty)}"]
        yield ["repeated", f"{told.repeated:,} rows have the text of another"]


def check(file: Path) -> SiteChecked:
    """Everything that can be said of a site before a run is submitted; nothing is written.

    Args:
        file: the site's YAML file.

    Raises:
        UserError: it is no site file, or a key of it is wrong.
    """
    site, folder = sites.load(file), os.getcwd()
    found: list[str] = []
    understood = spent = None
    try:
        understood = _understood(site)
    except SettingError as error:
        found += sites.located(file, error).lines
    try:
        spent = _spent(site)
    except UserError as error:
        found += error.lines
    here = site.folder.absolute()
    place = next(p for p in (here, *here.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        found += sites.located(file, SettingError("state", f"{place} cannot be written by this user")).lines
    bases = {base: _base(base) for base in site.accept.bases or ("minilm",)}
    free = shutil.disk_usage(place).free
    return SiteChecked(
        site=str(file),
        name=site.name,
        client=site.client,
        problems=found,
        understood=understood,
        privacy=spent,
        rules=[*rules(site)],
        bases=bases,
        state=str(site.folder),
        free=free,
        clock=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        warnings=[*_slips(understood)],
        notes=[*_notes(site, understood, free, folder, spent)],
        folder=folder,
    )


def rules(site: Site) -> Iterator[str]:
    """What a run may do at a site and what not, a sentence each."""
    told = site.accept
    named = " or ".join(map(cut, told.scenarios or ()))
    yield "may have any name" if told.scenarios is None else f"must be named {named or 'nothing: all are refused'}"
    if told.bases is not None and not told.bases:
        yield "may take no base model: accept.bases is empty, and all runs are refused"
    starts = " or ".join(map(cut, told.starts))
    yield f"must begin from the seed{f', or from {starts}' if starts else ''}"
    for one, many, known in (
        ("strategy", "strategies", told.strategies),
        ("client", "clients", told.clients),
        ("task", "tasks", told.tasks),
        ("kind of adapter", "kinds", told.kinds),
    ):
        if known is None:
            yield f"may take any {one} that ships with fedlora (accept.{many})"
        else:
            yield f"must take the {one} {' or '.join(map(cut, known)) or 'of no name: all are refused'}"
    if told.own_code:
        yield "may bring programs of its own, which can read and write all that the worker can (accept.own_code)"
    else:
        yield "may bring no program of its own (accept.own_code)"
    yield from _asked(site)
    if told.masked_only:
        yield "must mask updates: nobody sees this site's by itself (accept.masked_only)"
    else:
        yield "may show this site's own update to the server (accept.masked_only)"
    if told.metrics:
        yield f"may learn exact losses and figures of {FLOOR} rows or more, beside epsilon (accept.metrics)"
    else:
        yield figures.rule(site)
    if told.submitters is None:
        yield "may come from anyone who reaches the SuperLink (accept.submitters)"
    else:
        yield f"must be signed: accept.submitters has {counted(len(told.submitters), 'key')}"
    yield surveyed.rule(site)
    if site.receive is not None:
        yield "leaves its adapter in this site's state when it ends (receive)"
    if (further := site.personalise) is not None:
        most = "what the budget has left" if further.epsilon is None else f"epsilon {further.epsilon:g}"
        yield (
            f"is followed by {counted(further.steps, 'step')} of training here, for this site alone, which the "
            f"budget pays for and which may cost {most} (personalise)"
        )


def _asked(site: Site) -> Iterator[str]:
    task = plugins.find("tasks", task_of(site))
    if site.privacy is None:
        yield "may train without privacy: there is no budget (privacy)"
    else:
        whom = "examples" if site.privacy.person is None else "persons"
        yield f"must protect {whom} by differential privacy, within the budget (privacy)"
    if site.data.score is not None:
        yield f"may learn scores of the scale {site.data.score.low:g} to {site.data.score.high:g}"
    elif task.labelled and site.data.labels:
        yield f"must have exactly the {len(site.data.labels)} labels of data.labels"
    else:
        yield "may have no labels: data.labels is missing, and no classification run is answered"


def _numbered(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_ROWS]))
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{' ...' if len(rows) > _ROWS else ''}"


def _base(base: str) -> str:
    try:
        located.check(base)
        return located.told(base)
    except SettingError as error:
        return f"{cut(base)}: {error.message}: no run with it can train here"


def _understood(site: Site) -> Understood:
    """Of the rows.

    Raises:
        SettingError: they cannot be read.
    """
    name, held = task_of(site), site.data
    task = plugins.find("tasks", name)
    rows = reading.read_whole_site(held, taught(site))
    if not rows.texts:
        raise SettingError("data.files.train", f"{held.train}: holds no rows")
    labels = held.labels if held.labels and task.labelled and task.target != "score" else None
    out: list[int] = []
    if labels is not None and rows.labels is None:
        raise SettingError("data.files.label", "names no column, and data.labels says that rows have labels")
    if labels is not None:
        out = reading.left_out(rows.labels or (), labels)
        if len(out) == len(rows.texts):
            raise SettingError("data.files.labels", f"{held.train}: no row has any of them")
    gone = set(out)
    kept = [i for i in range(len(rows.texts)) if i not in gone]
    mine = reading.Rows([rows.texts[i] for i in kept], rows.labels and [rows.labels[i] for i in kept])
    persons = None if rows.persons is None else len({rows.persons[i] for i in kept})
    nearly = _nearly([rows.labels[i] for i in out] if rows.labels else [], labels or ())
    return Understood(
        task=name,
        rows=len(kept),
        labels=dict(zip(labels, notes.label_counts(mine, labels), strict=True)) if labels else {},
        left_out=[i + 1 for i in out],
        nearly=nearly,
        empty=[i + 1 for i in kept if not notes.length(rows.texts[i])],
        lengths=overview.lengths_of(None, mine),
        repeated=notes.repeated(mine),
        persons=persons,
    )


def _nearly(left_out: Sequence[Any], labels: Sequence[str]) -> dict[str, int]:
    """Of labels how many of the rows that are left out have one that is likely meant so."""
    strange = Counter(str(part) for one in left_out for part in {*((one,) if isinstance(one, str) else one)})
    found = Counter[str]()
    for name in strange.keys() - {*labels}:
        if (label := names.meant(name, labels)) is not None:
            found[label] += strange[name]
    return dict(found)


def _spent(site: Site) -> Spent | None:
    """The budget, and what the ledger of `state` says was spent of it.

    Raises:
        UserError: the ledger is damaged.
    """
    if (cap := site.privacy) is None:
        return None
    file, events, runs = site.folder / "ledger" / "privacy.jsonl", [], Counter[str]()
    if file.exists():
        events = ledger.replay(file).get(Own(), [])
        for line in ledger.read(file, torn=True):
            runs[cut(line.get("run", ""), 100)] += STATISTIC not in line
    spent = accounting.epsilon(events, cap.delta, cap.accountant)
    return Spent(
        max_epsilon=cap.max_epsilon,
        delta=cap.delta,
        accountant=cap.accountant,
        epsilon=spent,
        runs=dict(runs),
        person=cap.person,
    )


def _budget(told: Spent | None) -> Iterator[str]:
    if told is None:
        yield "none: nothing bounds what runs may learn of the rows (privacy)"
        return
    yield f"epsilon {told.max_epsilon:g} at delta {told.delta:g} in all runs together, by {told.accountant}"
    share = f", {told.epsilon / told.max_epsilon:.0%} of it" if told.epsilon else ""
    each = "".join(f"; {name} {counted(rounds, 'round')}" for name, rounds in told.runs.items())
    yield f"epsilon {told.epsilon:.3g} is spent{share}{each}"


def _slips(told: Understood | None) -> Iterator[str]:
    for label, count in (told.nearly if told is not None else {}).items():
        yield (
            f"{counted(count, 'row')} left out, with a label that is nearly {cut(label)!r} of data.labels: write "
            "both alike, if they are meant alike"
        )


def _notes(site: Site, told: Understood | None, free: int, folder: str, spent: Spent | None) -> Iterator[str]:
    """What is likely a slip."""
    held = site.data
    if site.privacy is None:
        yield "there is no privacy section: runs without differential privacy are answered, and nothing bounds it"
    elif site.privacy.max_epsilon > _MUCH:
        yield f"privacy.max_epsilon is {site.privacy.max_epsilon:g}: beyond {_MUCH:g} it promises next to nothing"
    if site.privacy is not None and spent is not None and spent.epsilon >= 0.99 * site.privacy.max_epsilon:
        yield f"epsilon {spent.epsilon:.3g} of {site.privacy.max_epsilon:g} is spent: runs are refused from now on"
    if site.accept.own_code and site.accept.submitters is None:
        yield "accept.own_code without accept.submitters: whoever reaches the SuperLink may run programs here"
    if told is not None and told.persons is not None and not 2 * told.persons <= told.rows <= _MANY * told.persons:
        yield (
            f"privacy.person: {counted(told.rows, 'row')} are of {counted(told.persons, 'person')}: does the "
            "column say which person a row is of?"
        )
    if site.privacy is not None and site.privacy.person is None:
        yield from suggested.of_file(held, held.encoding, (held.messages, *templates.columns(held.prompt or "")))
    if told is not None:
        yield from names.alike(held.labels or ())
        if lacking := [name for name, count in told.labels.items() if not count]:
            shown = ", ".join(repr(cut(name)) for name in lacking[:_ROWS])
            yield f"{len(lacking)} of {len(told.labels)} labels of data.labels have no row here: {shown}"
        key = "accept.metrics" if site.accept.metrics else "figures"
        if (site.accept.metrics or site.figures is not None) and told.rows < 2 * FLOOR:
            yield f"{key}: at least {FLOOR} rows judge, and there are {told.rows}: such runs are refused"
        units, whom = (told.rows, "rows") if told.persons is None else (told.persons, "persons")
        if site.privacy is not None and site.privacy.delta * units >= 1:
            yield (
                f"privacy.delta is {site.privacy.delta:g}, which allows that one of {units:,} {whom} is told "
                f"whole: keep it below {0.9 / units:.0e}"
            )
    for what, path in (("data.train", held.train), ("state", site.state)):
        if not os.path.isabs(path):
            yield f"{what} is read from the folder at hand, {folder}: write its whole path"
    for key in ("test", "validation"):
        if getattr(held, key) is not None:
            yield f"data.{key} is not used: the server judges by rows of its own"
    for shelf in ("strategies", "clients", "tasks", "kinds"):
        for use in getattr(site.accept, shelf) or ():
            ships = use.startswith("flwr.serverapp.strategy:") and shelf == "strategies"
            if not ships and (wrong := plugins.problem(shelf, use)):
                yield f"accept.{shelf}: {wrong}"
            elif ":" in use and not ships and not site.accept.own_code:
                yield f"accept.{shelf}: {cut(use)} comes with a run, and accept.own_code refuses such programs"
    yield from _keys(site.accept.submitters or ())
    if free < _LITTLE:
        yield f"the disk of {site.state} is nearly full: a site that cannot write its ledger trains nothing"


def _keys(told: Sequence[str]) -> Iterator[str]:
    from fedlora.deploy import signing

    for at, key in enumerate(told, 1):
        try:
            signing.public_key(key)
        except UserError as error:
            yield f"key {at} of {error}: every run is refused"
