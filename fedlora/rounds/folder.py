"""A run's folder: refused where it is another's, made whole or not at all, gone on with where it was left."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import scenario as scenarios
from fedlora.data.store import Dataset
from fedlora.errors import UserError
from fedlora.privacy.ledger import Ledger
from fedlora.returned import finite
from fedlora.rounds import checkpoint
from fedlora.rounds.checkpoint import whole_folder
from fedlora.rounds.progress import Progress
from fedlora.rounds.server import ServerOptimizer
from fedlora.scenario import Scenario
from fedlora.scenario.keys import CHANGEABLE
from fedlora.strategy import Strategy

ORIGIN = "origin.json"  # what it began with, of which only fingerprints are kept
TEST = "test.json"  # which label the test rows of each were taken for (`fedlora.metrics.confusion`)
_BEGUN = ("data", "inputs", "base", "saved", "start")
_WORDS = {  # what a run may have begun with, by `fedlora.data.store.INPUTS`
    "train": "other training rows",
    "test": "other test rows",
    "validation": "other validation rows",
    "labels": "other labels",
    "tokenizer": "another tokenizer",
    "clients": "rows dealt to clients in another way",
}
SHOWN = 1000  # clients in `partitions.json`, at most

logger = logging.getLogger(__name__)


def check(folder: Path, scenario: Scenario, resume: bool) -> None:
    """Refuse to write over a run, or to go on with another one.

    Raises:
        UserError: with what to do instead.
    """
    file = folder / "scenario.yaml"
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what, more = "is not an empty folder", ""
            if file.exists():
                what, more = "already holds a run", ", or continue it with --resume"
            raise UserError(f"{folder}: {what}; name another with --out{more}")
        return
    if not file.exists():
        raise UserError(f"{folder}: holds no run to resume")
    same_run(folder, scenarios.written(folder).model_dump(mode="json"), scenario.model_dump(mode="json"))


def ended(folder: Path, scenario: Scenario) -> int | None:
    """The round after which a run has ended; None where a scenario has rounds left, or files are still to write.

    Args:
        folder: of a run that the scenario may go on with.
        scenario: with the rounds and the patience that are asked for now.
    """
    summary = folder / "summary.json"
    written = (folder / "adapter" / name for name in ("adapter_model.safetensors", "fedlora.json", "README.md"))
    try:
        told = json.loads(summary.read_bytes())
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        done, last = int(told["rounds"]), int(json.loads(lines[-1])["round"])
        before = scenarios.written(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    early = "ended" in told and (before.stop, before.rounds) == (scenario.stop, scenario.rounds)
    whole = "stopped" not in told and last == done and all(file.is_file() for file in written)
    return done if whole and (early or done == scenario.rounds) else None


def same_run(folder: Path, before: Any, after: Any) -> None:
    """Refuse to go on with another scenario, by the names of the keys that differ.

    Raises:
        UserError: with those keys.
    """
    changed = [key for key in _differences(before, after) if key not in CHANGEABLE]
    if changed:
        raise UserError(
            f"{folder}: was run with another {', '.join(changed)}; a resumed run may only change "
            f"{', '.join(CHANGEABLE)}"
        )


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path


def create(folder: Path, scenario: Scenario, data: Dataset, origin: Mapping[str, Any]) -> None:
    """Make the run folder, whole or not at all.

    Args:
        folder: to make.
        scenario: of the run.
        data: who holds what.
        origin: fingerprints of what the run begins with, which a resumed one must begin with too.
    """
    try:
        with whole_folder(folder) as new:
            (new / "scenario.yaml").write_text(scenario.to_yaml())
            write_json(new / "partitions.json", partitions(data))
            write_json(new / ORIGIN, {key: origin[key] for key in _BEGUN if key in origin})
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def partitions(data: Dataset) -> dict[str, Any]:
    """Who holds what; of very many clients as many as a picture can show, evenly chosen."""
    total = data.num_clients
    shown = [int(c) for c in np.linspace(0, total - 1, min(total, SHOWN)).round()]
    return {
        "labels": [] if data.scored else list(data.labels),
        "clients_total": total,
        "clients": [
            {
                "client": c,
                **({"name": data.names[c]} if data.names else {}),
                "num_examples": data.num_examples(c),
                **({} if data.persons is None else {"num_persons": data.units(c)}),
                "labels": data.histogram(c).tolist(),
            }
            for c in shown
            if data.num_examples(c)  # else nobody but its site knows
        ],
        "test_examples": len(data.test),
    }


def restore(
    folder: Path,
    scenario: Scenario,
    strategy: Strategy,
    first: Progress,
    origin: Mapping[str, Any],
    stage: ServerOptimizer | None = None,
) -> tuple[Progress, Ledger]:
    """Where the folder's run stands, at its start if it was stopped before any round was saved; and its ledger.

    Raises:
        UserError: no checkpoint is whole, it is of another run, or the ledger lacks what it has seen.
    """
    now, known = first, (0, "")
    saved = checkpoint.load(folder / "checkpoint")
    _same_origin(folder, origin, None if saved is None else saved.origin)
    if saved is not None:
        try:
            same_run(folder, saved.origin["scenario"], origin["scenario"])
            if set(saved.adapter) != set(first.adapter):
                raise UserError(f"{folder}: its checkpoint holds another adapter than this scenario builds")
            strategy.load_state(saved.strategy if stage is None else stage.load_state(saved.strategy))
            now = Progress.restored(saved)
            known, before = tuple(saved.origin["ledger"]), dict(saved.origin["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: its checkpoint is of another version of fedlora: go on by that one, or start again in "
                "another folder with --out"
            ) from error
        if moved := [
            f"{what} {before.get(what)}, now {v}"
            for what, v in origin["versions"].items()
            if before.get(what) != v
        ]:
            logger.warning("%s: began with %s; the rest may differ in last bits", folder, "; ".join(moved))
    record = Ledger(folder, known, now.round)
    record.forget_after(now.round, judged=now.round - (now.unjudged is not None))
    write_text(folder / "scenario.yaml", scenario.to_yaml())
    return now, record


def check_beginning(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on with other inputs than a run began with, as far as that is known before a model is loaded.

    Args:
        folder: of the run.
        now: what it would go on with: `data`, `inputs`, `base`, and `saved` of an adapter that it begins from.

    Raises:
        UserError: with which of them differ.
    """
    if (folder / ORIGIN).exists():
        _same_origin(folder, now, None)


def _same_origin(folder: Path, now: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other rows, another base, or from another adapter, than the run began with.

    Args:
        folder: of the run.
        now: what it would go on with.
        saved: what its checkpoint was made with, if it has one.

    Raises:
        UserError: they differ, or nobody knows.
    """
    file, known = folder / ORIGIN, [] if saved is None else [saved]
    try:
        if saved is None or file.exists():
            known.append(dict(json.loads(file.read_text())))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is missing or damaged: restore it, or start again in another folder") from error
    if found := list(dict.fromkeys(what for one in known for what in _others(one, now))):
        raise UserError(
            f"{folder}: it began with {' and '.join(found)}: put back what it had, or start again in another "
            "folder with --out"
        )


def _others(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What a run began with that is another now, in words; what nobody wrote down is not known to be another."""
    if before.get("data") != now["data"]:
        had, has = before.get("inputs") or {}, now.get("inputs") or {}
        apart = [what for what in _WORDS if had and had.get(what) != has.get(what)]
        rows = [what for what in apart if what != "clients"]  # other rows are dealt in another way
        yield from (_WORDS[what] for what in rows or apart)
        if not apart:
            yield "other data, or with another tokenizer"
    if None not in (had_base := before.get("base"), now.get("base")) and had_base != now["base"]:
        yield "another base model (the files of model.base)"
    for key in ("saved", "start"):
        if key in now and (key == "start" or key in before) and before.get(key) != now[key]:
            yield "another adapter (model.start)"


def write_json(file: Path, data: Any) -> None:
    """A file of JSON, whole or not at all; null where a number is not finite."""
    write_text(file, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """A file, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
