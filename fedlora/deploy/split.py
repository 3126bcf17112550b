"""`fedlora split`: a scenario's partitions as the files of sites, to rehearse a deployment with."""

import csv
import json
from pathlib import Path

import numpy as np

from fedlora import prepare
from fedlora.data.reading import Rows, read
from fedlora.errors import SettingError
from fedlora.rounds.checkpoint import whole_folder
from fedlora.scenario import Scenario

_SITE = """\
# What this node brings to a run, and what it allows; see docs/deploy.md.
name: site-{client}
client: {client}                        # which of the scenario's clients it is
data: {{train: {train}, text: text, label: {label}{labels}}}
state: {state}
accept: {{bases: [{base}], own_code: false}}
"""
_BUDGET = (
    "privacy: {{max_epsilon: {most:g}, delta: {delta:g}}}  # what its examples may lose in all runs together\n"
)
_RUNS = 10  # rehearsals that a budget is for


def split(scenario: Scenario, folder: Path, seen_as: Path | None = None) -> list[Path]:
    """Write what each client holds, in the order in which a simulation has it, and a site file for each.

    Args:
        scenario: with data that are at hand here.
        folder: to make; client k's files are in `site-<k>`, the test rows in `test.csv`.
        seen_as: where a node sees its own `site-<k>`, such as a container's volume; by default where it is.

    Returns:
        The site files.

    Raises:
        UserError: the data cannot be read or split, or the folder is there.
    """
    try:
        held = prepare.prepare(scenario).data
        train, test = read(scenario.data, scenario.task)
        if not isinstance(train.texts[0], str):
            raise SettingError("data", "only rows of one text and its label can be written as files of sites")
    except SettingError as error:
        raise scenario.located(error) from error
    made = []
    with whole_folder(folder) as new:
        _write(new / "test.csv", test, np.arange(len(test.texts)))
        for client in range(scenario.clients.total):
            rows = np.sort(np.concatenate([held.partition(client).rows, held.held_out(client).rows]))
            (new / f"site-{client}").mkdir()
            _write(new / f"site-{client}" / "train.csv", train, rows)
            place = seen_as or folder.absolute() / f"site-{client}"
            label = "null" if train.labels is None else "label"
            labels = f", labels: {json.dumps(held.labels)}" if held.labels else ""
            told = {"train": place / "train.csv", "label": label, "labels": labels, "state": place / "state"}
            told["base"] = json.dumps(scenario.model.base)
            text = _SITE.format(client=client, **told)
            if (asked := scenario.example_privacy) is not None:
                text += _BUDGET.format(most=_RUNS * (asked.epsilon or 10), delta=asked.delta)
            (new / f"site-{client}" / "site.yaml").write_text(text)
            made.append(folder / f"site-{client}" / "site.yaml")
    return made


def _write(file: Path, rows: Rows, chosen: "np.typing.NDArray[np.int64]") -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"] if rows.labels is None else ["text", "label"])
        for row in chosen:
            writer.writerow([rows.texts[row]] if rows.labels is None else [rows.texts[row], rows.labels[row]])
