"""The keys of a scenario: where each was written, and what is wrong with one."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

KeyPath = tuple[str | int, ...]

# What a resumed run may change: how long it goes on, and what cannot change a result.
CHANGEABLE = (
    "rounds",
    "eval_every",
    "stop",
    "stop.patience",
    "trackers",
    "diagnostics",
    "engine.kind",
    "engine.workers",
    "engine.gpus_per_worker",
    "engine.deadline",
)


def lasting(dump: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """A scenario's keys, as `model_dump` gives them, without those that a resumed run may change."""
    kept = {key: value for key, value in dump.items() if dotted((*path, key)) not in CHANGEABLE}
    return {key: lasting(v, (*path, key)) if isinstance(v, Mapping) else v for key, v in kept.items()}


def dotted(path: Iterable[str | int]) -> str:
    """A key as it is told, such as `model.adapter.r`."""
    return ".".join(str(part) for part in path)


class Source(NamedTuple):
    """Where each key of a scenario was written."""

    file: str
    lines: Mapping[KeyPath, int]
    overrides: Mapping[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest written ancestor of a key, or the `--set` that wrote it."""
        heads = [tuple(path[:end]) for end in range(len(path), 0, -1)]
        for head in heads:
            if head in self.overrides:  # it replaced all that the file said beneath it
                return f"--set {self.overrides[head]}"
        for head in heads:
            if head in self.lines:
                return f"{self.file}:{self.lines[head]}"
            for key, override in self.overrides.items():
                if key[: len(head)] == head:  # only overrides made this section
                    return f"--set {override}"
        return f"{self.file}:1"


class Problem(NamedTuple):
    """One thing that is wrong, and with which key."""

    path: KeyPath
    message: str
