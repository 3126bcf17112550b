"""Datasets of the Hugging Face Hub, or in a folder that the datasets library reads."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedlora import scenario as settings
from fedlora.data.cells import OWNED, Taught, missing, words
from fedlora.data.cells import Column as Named
from fedlora.errors import SettingError, suggestion

Column = Callable[[str, str], list[str]]
Cells = Callable[[str, str], list[Any]]
Inputs = Callable[[str], list[Any]]


def load(hub: settings.Hub, key: str, split: str, taught: Taught) -> tuple[Column, Cells, Inputs]:
    """What gives the columns of a split.

    Args:
        hub: the dataset.
        key: of the hub, that names the split.
        split: its name.
        taught: how labels are read.

    Returns:
        For a setting and a name a column as text of which none is empty, likewise as it is, and for a name one of
        texts or images. Each raises a SettingError where there is none, or a row is not so.

    Raises:
        SettingError: it cannot be loaded.
    """
    import datasets

    try:
        with quiet_hub():
            if (Path(hub.path) / "dataset_dict.json").exists():
                table = datasets.load_from_disk(hub.path)[split]
            else:
                table = datasets.load_dataset(hub.path, hub.config, revision=hub.revision, split=split)
    except Exception as error:  # whatever the Hub, the network or the cache raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(
            f"data.hub.{key}",
            f"cannot load {hub.path}, split {split!r}, from the Hub or its cache: {what}",
        ) from error

    def feature(setting: str, name: str) -> Any:
        if name not in table.column_names:
            raise SettingError(
                setting, f"{hub.path} has no column {name!r}: {suggestion(name, table.column_names)}"
            )
        return table.features[name]

    def column(setting: str, name: str) -> list[str]:
        kind, told = feature(setting, name), list(table[name])
        of_text, classed = setting == "data.hub.text", isinstance(kind, datasets.ClassLabel)
        for row, cell in enumerate(told, 1):
            if (classed and cell == -1) or (not (of_text and isinstance(cell, str)) and missing(cell)):
                where = f"{hub.path}, split {split!r}: row {row}"
                raise SettingError(setting, f"{where} has no {name!r}: name a split that has it")
        if classed:
            return [kind.int2str(cell) for cell in told]
        names = setting in OWNED or (taught.target == "class" and not of_text)
        return words(told, Named(setting, hub.path, name), names)

    def cells(setting: str, name: str) -> list[Any]:
        kind = feature(setting, name)
        inner = getattr(kind, "feature", None)  # of a list
        if isinstance(inner, datasets.ClassLabel):
            return [inner.int2str(list(v or ())) for v in table[name]]
        return column(setting, name) if isinstance(kind, datasets.ClassLabel) else list(table[name])

    def inputs(name: str) -> list[Any]:
        if isinstance(table.features.get(name), datasets.Image):
            return _files_of(table, name)
        return column("data.hub.text", name)

    return column, cells, inputs


def _files_of(table: Any, name: str) -> list[bytes]:
    """Each image of a column as its file holds it, not decoded."""
    import datasets

    held = table.cast_column(name, datasets.Image(decode=False))[name]
    return [image["bytes"] or Path(image["path"]).read_bytes() for image in held]


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """No line of huggingface_hub's for each retry: what failed in the end is said once, by us."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
