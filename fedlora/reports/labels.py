"""What runs are called beside each other: by the settings in which they differ."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.record import Record
from fedlora.reports.baselines import kind_of, of
from fedlora.scenario.baseline import ASIDE, configuration

_FIRST = "strategy.use"  # in a label
_WHEN = "eval_every"  # cannot change a result where no evaluation chooses or ends
_NONE = "-"
_OFF, _ON = object(), object()


def labels_of(runs: Sequence[Record]) -> dict[Path, str]:
    """Labels by folder, equal for runs that differ by their seed alone.

    Baselines are called by their kind, and by the run that they belong to where there are several; what differs
    between those of one kind and run comes after.
    """
    plain = [run for run in runs if kind_of(run) is None]
    found = {folder: words or _use(runs, folder) for folder, words in _differences(plain).items()}
    names = {configuration(run.scenario): found[run.folder] for run in plain}
    made = [run for run in runs if kind_of(run) is not None]
    several = len({of(run) for run in made} | set(names)) > 1
    for kind, whose in dict.fromkeys((kind_of(run), of(run)) for run in made):
        same = [run for run in made if (kind_of(run), of(run)) == (kind, whose)]
        for folder, words in _differences(same).items():
            name = f"{kind} of {names.get(whose, whose)}" if several else str(kind)
            found[folder] = f"{name}, {words}" if words else name
    return found


def _use(runs: Sequence[Record], folder: Path) -> str:
    (run,) = [run for run in runs if run.folder == folder]
    return _word(_FIRST, (run.scenario.get("strategy") or {}).get("use"))


def _differences(runs: Sequence[Record]) -> dict[Path, str]:
    """The settings that differ between runs and can change a result, in words; nothing where none do.

    A strategy's own settings set apart runs of that strategy alone: others do not have them.
    """
    flat = {run.folder: dict(_leaves(_results(run.scenario))) for run in runs}
    keys = sorted({key for leaves in flat.values() for key in leaves}, key=lambda key: (key != _FIRST, key))
    values = {key: {folder: _told(leaves, key) for folder, leaves in flat.items()} for key in keys}
    found: dict[Path, list[str]] = {folder: [] for folder in flat}
    for key in keys:
        own = key.startswith("strategy.") and key != _FIRST
        for use in {str(leaves.get(_FIRST)) if own else "" for leaves in flat.values()}:
            those = {f: v for f, v in values[key].items() if not own or str(flat[f].get(_FIRST)) == use}
            if len({json.dumps(v, default=str) for v in those.values() if v is not _OFF}) > 1:
                section = any(v is _ON for v in those.values())
                for folder, v in those.items():
                    if v is _ON:
                        found[folder] += _named(flat[folder], key, flat.values())
                    elif v is not _OFF:
                        found[folder].append(f"no {_last(key)}" if section and v is None else _word(key, v))
    return {folder: ", ".join(words) for folder, words in found.items()}


def _named(leaves: Mapping[str, Any], key: str, every: Collection[Mapping[str, Any]]) -> list[str]:
    """What a section that some runs have and others have not is called, such as `compress lord`.

    Nothing where it has no name, or where the runs that have it differ by it: then its name is told by itself.
    """
    at = next((f"{key}.{word}" for word in ("use", "kind") if f"{key}.{word}" in leaves), "")
    names = {json.dumps(told[at], default=str) for told in every if at in told}
    return [f"{_last(key)} {str(leaves[at]).rpartition(':')[2]}"] if len(names) == 1 else []


def _results(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change a result."""
    chooses = scenario.get("keep") not in (None, "last") or scenario.get("stop") is not None
    return {k: v for k, v in scenario.items() if k not in ASIDE and (k != _WHEN or chooses)}


def _told(leaves: Mapping[str, Any], key: str) -> Any:
    """A setting of a run: `_OFF` if it belongs to a section that is null, `_ON` for a section that is not."""
    if key in leaves:
        return leaves[key]
    if any(name.startswith(f"{key}.") for name in leaves):
        return _ON
    parts = key.split(".")
    return _OFF if any(".".join(parts[:end]) in leaves for end in range(1, len(parts))) else None


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _word(key: str, value: object) -> str:
    """A setting as part of a label."""
    if key.endswith(".use"):
        return str(value).rpartition(":")[2]
    shown = f"{value:g}" if isinstance(value, float) else _NONE if value is None else str(value)
    return f"{_last(key)} {shown.lower() if isinstance(value, bool) else shown}"


def _last(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")
