"""`fedlora evaluate`: a finished run's adapter on any rows."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import scenario as scenarios
from fedlora import starting
from fedlora.data import notes, overview, reading, store
from fedlora.data.cells import Taught
from fedlora.engine import EVALUATION_CHUNK, hardware
from fedlora.errors import SettingError, UserError
from fedlora.exporting import About, adapter_of, task_of
from fedlora.kinds import contract as kinds
from fedlora.metrics import confusion
from fedlora.metrics import contract as metrics
from fedlora.metrics.contract import Evaluation, Metric
from fedlora.prepare import encoding
from fedlora.record import Record
from fedlora.reports.tables import Table
from fedlora.rounds.folder import ORIGIN
from fedlora.tasks import loading
from fedlora.tasks.contract import Task
from fedlora.tasks.encoding import encoded

_SHOWN = 5  # rows in a line


@dataclass(frozen=True)
class Evaluated:
    """What a run's adapter makes of some rows.

    Attributes:
        run: its folder, or that of the adapter.
        data: the file of the rows.
        rows: how many there are.
        majority: the share of the commonest label among them; None where rows have none.
        metrics: every figure by name; None where it says nothing of these rows.
        labels: in order.
        confusion: of each label, how many of its rows were taken for each; None where that is not known.
        trained: how many rows have a text that the run was trained on; None where its folder does not let know.
    """

    run: str
    data: str
    rows: int
    majority: float | None
    metrics: dict[str, float | None]
    labels: tuple[str, ...]
    confusion: list[list[int]] | None
    trained: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, and `classes`: of each label its precision, recall, F1 and rows."""
        found = asdict(self)
        if self.confusion is not None:
            found["classes"] = confusion.by_label(self.labels, self.confusion)
        return found

    def lines(self) -> list[str]:
        """What a terminal shows."""
        rows = [[name, "undefined" if v is None else f"{v:.4f}"] for name, v in self.metrics.items()]
        if self.majority is not None:
            rows.append(["commonest label", f"{self.majority:.4f}"])
        made = [f"{self.run} on {self.rows:,} rows of {self.data}", *Table(("figure", "value"), rows).text()]
        if self.trained:
            made.append(
                f"{self.trained:,} of {self.rows:,} rows have a text that the run was trained on: figures of them "
                "say little of new texts"
            )
        return made


def evaluate(
    run: Record | str | Path,
    data: str | Path,
    metrics: Sequence[str] | None = None,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    own_code: bool = False,
) -> Evaluated:
    """Judge a run's adapter by the rows of a file.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        data: a csv, tsv, json, jsonl or parquet file with the columns of the run's own.
        metrics: names beside the task's own figures; by default those that the run's scenario names.
        text: the column of texts, or two for pairs, where it is another.
        label: the column of labels, where it is another.
        own_code: import the run's own task and metrics where it names some: they are programs.

    Raises:
        UserError: there is no adapter, or the file does not fit it.
    """
    about = About.read(folder := adapter_of(run))
    task = task_of(about, folder, own_code)
    try:
        named = _metrics(folder, metrics, task, own_code)
        files = columns(folder, str(data), text, label)
        rows = _rows(files, task, about)
        found = _evaluated(
            folder, about, task, rows, named, str(run.folder if isinstance(run, Record) else run), files
        )
        return replace(found, trained=_trained(folder.parent, rows))
    except SettingError as error:
        option = {"data.files.text": " (--text)", "data.files.label": " (--label)"}.get(error.key, "")
        raise UserError(f"{error.message}{option}") from error


def _trained(folder: Path, rows: reading.Rows) -> int | None:
    """How many rows have a text that a simulated run was trained on.

    Args:
        folder: of the run.
        rows: that are judged.

    Returns:
        None where the rows of clients are not at hand, are others by now, or were at sites: nobody tells of those.
    """
    try:
        run = Record.open(folder)
        if run.at_site or not run.partitions.get("clients"):
            return None
        asked, began = scenarios.written(folder), json.loads((folder / ORIGIN).read_bytes())
        if not overview.at_hand(asked.data):
            return None
        train, _ = reading.read(asked.data, asked.task, asked.person)
        known = (began.get("inputs") or {}).get("train")
        return notes.common(rows, train) if known == store.content(train) else None
    except (OSError, ValueError, AttributeError, UserError):
        return None


def _metrics(folder: Path, given: Sequence[str] | None, task: type[Task], own_code: bool) -> list[Metric]:
    """The metrics that are asked for, or those of the run; its own ones where they may be imported."""
    if given is not None:
        return metrics.find_all(given, task.target)
    if not (folder.parent / "scenario.yaml").is_file():
        return []
    asked = scenarios.written(folder.parent).metrics
    return metrics.find_all([use for use in asked if own_code or ":" not in use], task.target)


def columns(folder: Path, data: str, text: str | Sequence[str] | None, label: str | None) -> scenarios.Files:
    """Where the rows are, and which columns hold what: as in the run's own source, or as they are named."""
    told: dict[str, Any] = {**scenarios.COLUMNS_OF.get(About.read(folder).task, {})}
    if (folder.parent / "scenario.yaml").is_file():
        own = scenarios.written(folder.parent).data
        source = own.files or own.hub or reading.HUB_DATASETS.get(str(own.dataset))
        told = source.model_dump() if source is not None else {}
    kept = {key: told[key] for key in scenarios.Files.model_fields if key in told}
    if text is not None:
        kept["text"] = text if isinstance(text, str) or len(text) > 1 else text[0]
    if label is not None:
        kept["label"] = label
    if kept.get("columns") and Path(data).suffix.lower() not in (".csv", ".tsv"):
        kept["columns"] = None
    try:
        return scenarios.Files(**{**kept, "train": data, "test": data, "validation": None})
    except ValueError as error:
        raise UserError("--text: name one column, or two of pairs") from error


def _rows(files: scenarios.Files, task: type[Task], about: About) -> reading.Rows:
    """The rows of the file.

    Raises:
        SettingError: it cannot be read, or a row has a label that the run does not know.
    """
    if not task.tokens:
        raise SettingError("data", f"{about.task} judges images, and rows of text hold none")
    usual = scenarios.COLUMNS_OF.get(about.task, {})
    scale = None if about.scale is None else scenarios.Score(low=about.scale[0], high=about.scale[1])
    told = (task.target, scale, about.labels or None, usual, about.messages, about.scored, about.prompt)
    rows = reading.read_file(files, "test", Taught(*told))
    if not rows.texts:
        raise SettingError("data", f"{files.test}: holds no row")
    if rows.labels is None and task.target != "start":
        raise SettingError("data.files.label", f"{files.test}: name the column by which its rows are judged")
    if task.target == "score" and (count := len(about.labels)) != len((rows.labels or [()])[0]):
        raise SettingError("data.files.label", f"{files.test}: the run judges {count} columns of scores")
    if task.target not in ("class", "many"):
        return rows
    held = ((i, [label] if isinstance(label, str) else label) for i, label in enumerate(rows.labels or [], 1))
    strange = [(i, str(name)) for i, names in held for name in names if name not in about.labels]
    if strange:
        at = ", ".join(str(i) for i, _ in strange[:_SHOWN])
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        named = starting.few(list(dict.fromkeys(label for _, label in strange)))
        raise SettingError(
            "data.files.label",
            f"{files.test}: row{'s' if len(strange) > 1 else ''} {at}{more}: labels that the run does not know, "
            f"{named}; it has {starting.few(about.labels)}",
        )
    return rows


def _evaluated(
    folder: Path,
    about: About,
    task: type[Task],
    rows: reading.Rows,
    asked: Sequence[Metric],
    name: str,
    files: scenarios.Files,
) -> Evaluated:
    hardware.settle()
    config, saved = starting.found(folder)
    layers = config.get("layers_to_transform")
    layers = None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    targets = config["target_modules"]  # a string is one pattern
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if starting.is_lora(config):
        kind = kinds.load("lora", config["r"], config["lora_alpha"], targets, layers)
    else:
        r = config.get("r") or 1
        kind = kinds.load("peft", r, float(r), targets, layers, options=config)
    made = loading.load(
        about.task,
        about.base,
        kind,
        labels=about.labels,
        seed=0,
        pooler="trained" if any(".pooler." in name for name in saved.tensors) else "frozen",
        pooling=about.pooling,
        revision=about.revision,
        device=hardware.device("auto"),
        max_length=about.max_length,
        start=saved,
        scale=about.scale,
        threshold=about.threshold,
        beta=about.beta,
    )
    reader = task.reader(about.base, about.revision)
    dataset = store.hold(
        scenarios.Data(files=files, max_length=about.max_length),
        about.task,
        1,
        0,
        lambda these: encoded(task, about.task, reader, these, about.labels, about.max_length),
        encoding(about.task, task, reader),
        about.labels,
        test=rows,
    )
    test, tells = dataset.test, confusion.tells(task.target, about.labels)
    parts = [
        made.evaluation(
            made.initial, test, np.arange(i, min(i + EVALUATION_CHUNK, len(test))), bool(asked) or tells
        )
        for i in range(0, len(test), EVALUATION_CHUNK)
    ]
    found = Evaluation.joined(parts)
    figures = found.figures(made.figures(found.sums), asked, about.labels)
    counts = confusion.confusion(found, len(about.labels)) if tells else None
    first = {task.metric: figures.pop(task.metric)}
    return Evaluated(name, str(files.test), len(test), dataset.majority, first | figures, about.labels, counts)
