"""`fedlora split`: a scenario's partitions as the files of sites, to rehearse a deployment with.

Beside them stand the test rows and `scenario.yaml`, the same scenario for `fedlora submit`: it names the test rows
and, as the server sees no training rows, the labels.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import prepare
from fedlora.data.cells import SEPARATORS, Label
from fedlora.data.reading import Rows, read, set_aside
from fedlora.errors import SettingError
from fedlora.rounds.checkpoint import whole_folder
from fedlora.scenario import Data, Scenario
from fedlora.tasks.contract import find

_SITE = """\
# What this node brings to a run, and what it allows; see docs/deploy.md.
name: site-{client}
client: {client}                        # which of the scenario's clients it is
data: {{train: {train}, text: text, label: {label}{more}}}
state: {state}
accept: {{bases: [{base}], own_code: false}}
"""
_BUDGET = """\
# The most that its {whom} may lose in all runs together: {runs} rehearsals of epsilon {one:g}, counted whole.
# For real rows write what they may lose, such as {one:g} for one run.
privacy: {{max_epsilon: {most:g}, delta: {delta:g}{more}}}
"""
_RUNS = 10  # rehearsals that a budget is for
_ANY = 10.0  # epsilon of a rehearsal where the scenario names none, but its noise


def split(scenario: Scenario, folder: Path, seen_as: Path | None = None) -> list[Path]:
    """Write what each client holds, in the order in which a simulation has it, and a site file for each.

    Args:
        scenario: with data that are at hand here.
        folder: to make; client k's files are in `site-<k>`, the test rows in `test.csv`, what to submit in
            `scenario.yaml`.
        seen_as: where a node sees its own `site-<k>`, such as a container's volume; by default where it is.

    Returns:
        The site files.

    Raises:
        UserError: the data cannot be read or split, or the folder is there.
    """
    try:
        ready = prepare.prepare(scenario)
        held, scenario = ready.data, ready.scenario
        train, test = read(scenario.data, scenario.task, scenario.person)
        target = find(scenario.task).target
        several = target == "many"
        separator = _separator(scenario.data, held.labels) if several else ""
        if target == "marks" or not isinstance(train.texts[0], str):
            raise SettingError("data", "only rows of one text and its label can be written as files of sites")
    except SettingError as error:
        raise scenario.located(error) from error
    made = []
    with whole_folder(folder) as new:
        judged = {"test": replace(test, persons=None)}
        if scenario.data.own_validation is not None:
            judged["validation"] = replace(set_aside(scenario.data, scenario.task, test)[1], persons=None)
        for part, rows in judged.items():
            _write(new / f"{part}.csv", rows, np.arange(len(rows.texts)), scenario.data, separator)
        placed = {part: str(folder.absolute() / f"{part}.csv") for part in judged}
        (new / "scenario.yaml").write_text(_to_submit(scenario, placed, train, held.labels, separator).to_yaml())
        if held.persons is not None:  # by number: no name leaves
            train = replace(train, persons=[str(n) for n in held.persons.of_rows])
        for client in range(scenario.clients.total):
            own = np.sort(np.concatenate([held.partition(client).rows, held.held_out(client).rows]))
            (new / f"site-{client}").mkdir()
            _write(new / f"site-{client}" / "train.csv", train, own, scenario.data, separator)
            place = seen_as or folder.absolute() / f"site-{client}"
            columns = _columns(train, scenario.data)
            label = json.dumps(columns) if len(columns) > 1 else columns[0] if columns else "null"
            more = f", labels: {json.dumps(held.labels)}" if held.labels else ""
            if (scale := scenario.data.score) is not None:
                label = json.dumps(held.labels)
                more = f", score: {{low: {scale.low!r}, high: {scale.high!r}}}"
            elif several:
                more += f", separator: {json.dumps(separator)}"
            told = {"train": place / "train.csv", "label": label, "more": more, "state": place / "state"}
            told["base"] = json.dumps(scenario.model.base)
            text = _SITE.format(client=client, **told)
            if (asked := scenario.example_privacy) is not None:
                one, more = asked.epsilon or _ANY, "" if asked.person is None else ", person: person"
                whom = f"{asked.protects}s"
                text += _BUDGET.format(
                    runs=_RUNS, one=one, most=_RUNS * one, delta=asked.delta, whom=whom, more=more
                )
            (new / f"site-{client}" / "site.yaml").write_text(text)
            made.append(folder / f"site-{client}" / "site.yaml")
    return made


def caps(scenario: Scenario) -> list[str]:
    """Why the site files of a scenario allow as much epsilon as they do; nothing where they allow none."""
    if (asked := scenario.example_privacy) is None:
        return []
    one = asked.epsilon or _ANY
    return [
        f"privacy.max_epsilon of each site file is {_RUNS * one:g}: {_RUNS} rehearsals of epsilon {one:g}; for "
        f"real rows write what they may lose in all runs together, such as {one:g}"
    ]


def _to_submit(
    scenario: Scenario, placed: Mapping[str, str], rows: Rows, labels: Sequence[str], separator: str
) -> Scenario:
    """The scenario for sites: its files are those that were written, of which the server reads `placed`."""
    data, columns = scenario.data, _columns(rows, scenario.data)
    named = columns if len(columns) > 1 else columns[0] if columns else None
    files = {**placed, "text": "text", "label": named, "separator": separator or None}
    told: dict[str, Any] = {"dataset": None, "hub": None, "files": files, "encoding": None, "prompt": None}
    told |= {"partition": {"kind": "iid"}} if data.partition.kind == "natural" else {}
    told |= {"labels": list(labels)} if labels and data.score is None and named == "label" else {}
    return Scenario.model_validate(scenario.model_dump() | {"data": data.model_dump() | told})


def _write(file: Path, rows: Rows, chosen: "np.typing.NDArray[np.int64]", data: Data, separator: str) -> None:
    labels = rows.labels
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        people = rows.persons
        writer.writerow(["text", *_columns(rows, data), *(() if people is None else ("person",))])
        for row in chosen:
            cells = [] if labels is None else _cells(labels[row], data, separator)
            writer.writerow([rows.texts[row], *cells, *(() if people is None else (people[row],))])


def _columns(rows: Rows, data: Data) -> list[str]:
    """The columns of labels, of scores or of both completions, as a file has them."""
    if rows.labels is None:
        return []
    several = data.score is not None or len(data.label_columns) > 1
    return [*data.label_columns] if several else ["label"]


def _cells(label: Label, data: Data, separator: str) -> list[str]:
    """A row's label, its labels, its scores in their units, or both completions, as a file has them."""
    if isinstance(label, str):
        return [label]
    if (scale := data.score) is None:
        return [separator.join(map(str, label))] if separator else [*map(str, label)]
    return [f"{scale.low + (scale.high - scale.low) * float(x):.9g}" for x in label]


def _separator(data: Data, labels: Sequence[str]) -> str:
    """What stands between the labels of a row: as in the scenario, or what no label has.

    Raises:
        SettingError: labels have all that is known.
    """
    source = data.files or data.hub
    if source is not None and source.separator is not None:
        return source.separator
    free = (mark for mark in SEPARATORS if not any(mark in label for label in labels))
    if (found := next(free, None)) is None:
        raise SettingError("data.files.separator", f"labels have all of {' '.join(SEPARATORS)}: name another")
    return found
