"""A scenario from its file, by path or by the name of one that ships with fedlora."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import ScenarioError, UserError, suggestion
from fedlora.scenario.checks import validate
from fedlora.scenario.keys import KeyPath, Source
from fedlora.scenario.reading import apply, read
from fedlora.scenario.sections import Scenario

SHIPPED = Path(__file__).parents[1] / "scenarios"
SWEEPS = SHIPPED / "sweeps"
LARGEST = 2**20  # characters of a scenario


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file, apply `a.b=value` overrides, and check all of it.

    `path` may be the bare name of a scenario that ships with fedlora, such as `noniid`.

    Raises:
        ScenarioError: with one line for every problem found.
    """
    try:
        with (file := find(path)).open(encoding="utf-8") as stream:
            text = stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ScenarioError(f"{file}: holds more than {LARGEST} characters, which is no scenario")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from error
    return parse(text, str(path), overrides)


def given(scenario: Scenario | str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """A scenario as it is, or from its file or its name.

    Raises:
        UserError: it cannot be read or is wrong, or overrides came with a loaded one.
    """
    if not isinstance(scenario, Scenario):
        return load(scenario, overrides)
    if overrides:
        raise UserError("overrides go with a scenario's file or name, not with a loaded one")
    return scenario


def written(folder: Path) -> Scenario:
    """The resolved scenario of a run's folder; whoever wrote it, nothing that it names is imported.

    Raises:
        ScenarioError: it cannot be read, or is of another version.
    """
    file = folder / "scenario.yaml"
    try:
        return Scenario.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ScenarioError(f"{file}: cannot be read by this version: {reason}") from error


def parse(text: str, file: str = "scenario", overrides: Sequence[str] = ()) -> Scenario:
    """`load` for text that is already in hand; `file` names it in messages."""
    raw, lines, problems = read(text, file)
    if looks_like_site(raw):
        raise ScenarioError(f"{file}:1: this is a site's file, and no scenario: fedlora site check {file}")
    written: dict[KeyPath, str] = {}
    for override in overrides:
        apply(override, raw, written, problems)
    _place(raw, Path(file).parent, written)
    scenario, found = validate(raw)
    unread = {p.path for p in problems if p.path}
    problems += (p for p in found if p.path not in unread)
    source = Source(file, lines, written)
    if problems or scenario is None:
        told = (f"{source.where(p.path)}: {p.message}" for p in problems)
        raise ScenarioError(*(line.replace("\n", "\\n") for line in told))
    return scenario.written_in(source)


def looks_like_site(raw: Mapping[str, Any]) -> bool:
    """Whether keys are those of a site's file, and of no scenario."""
    return "clients" not in raw and len({"client", "state", "accept"} & raw.keys()) > 1


def looks_like_scenario(raw: Mapping[str, Any]) -> bool:
    """Whether keys are those of a scenario, and of no site's file."""
    return "state" not in raw and len({"clients", "strategy", "rounds", "model"} & raw.keys()) > 1


def _place(raw: dict[str, Any], folder: Path, written: Mapping[KeyPath, str]) -> None:
    """Read relative paths of data from the scenario's folder; from the one at hand where they are there alone.

    Args:
        raw: plain data of the scenario, which is changed.
        folder: that it is in.
        written: keys that the command line gave, whose paths are read from the folder at hand.
    """
    data = raw.get("data")
    for section in (data, data.get("public") if isinstance(data, dict) else None):
        files = section.get("files") if isinstance(section, dict) else None
        for key in ("train", "test", "validation"):
            if (
                not isinstance(files, dict)
                or not isinstance(path := files.get(key), str)
                or any("files" in told for told in written)
                or os.path.isabs(path)
            ):
                continue
            if (here := folder / path).exists() or not Path(path).exists():
                files[key] = str(here)


def find(path: str | Path, folder: Path = SHIPPED) -> Path:
    """The file that a path stands for, or the name of one that ships in `folder`."""
    file = Path(path)
    if file.exists() and not file.is_dir():
        return file
    known = _shipped(folder)
    if file.name and (name := file.with_suffix("").as_posix().rpartition(f"{folder.name}/")[2]) in known:
        return known[name]
    if file.is_dir():
        raise ScenarioError(f"{path}: is a folder; name a YAML file")
    raise ScenarioError(f"{path}: no such file; {suggestion(file.stem, known)}")


def shipped(folder: Path = SHIPPED) -> dict[str, str]:
    """The scenarios that come with fedlora, or its sweeps, each with the first line of its comment."""
    return {
        name: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, p in _shipped(folder).items()
    }


def _shipped(folder: Path) -> dict[str, Path]:
    """Files by name: those of a subfolder, such as `paper/sst2`, after those of the folder itself."""
    files = [p for p in sorted(folder.rglob("*.yaml")) if folder == SWEEPS or not p.is_relative_to(SWEEPS)]
    names = {p.relative_to(folder).with_suffix("").as_posix(): p for p in files}
    return dict(sorted(names.items(), key=lambda pair: ("/" in pair[0], pair[0])))
