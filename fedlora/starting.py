"""`model.start`: the adapter that a run begins from, of an earlier run, of peft, or of the Hub.

What is read is an ordinary LoRA, as `fedlora.exporting` and peft write it. Its factors are taken over by the kind
of adapter that the run has (`Kind.adopt`), its head where it is for the same labels in the same order.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.data.reading import quiet_hub
from fedlora.errors import SettingError, UserError
from fedlora.exporting import ABOUT, About, adapter_of
from fedlora.kinds.contract import Saved
from fedlora.record import Record
from fedlora.scenario import Scenario
from fedlora.tasks.located import find_base, named_elsewhere

KEY = "model.start"
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ODD = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_tie")  # what no plain LoRA has
_SHOWN, _LETTERS = 5, 20  # labels in a line, and letters of each


@dataclass(frozen=True)
class Start:
    """What a run begins from.

    Attributes:
        saved: its tensors; of a head for other labels those that tell labels apart are left out.
        left_out: why, in words; empty where none are.
    """

    saved: Saved
    left_out: str


def read(scenario: Scenario, labels: Sequence[str]) -> Start | None:
    """What a scenario begins from; None where that is the seed.

    Args:
        scenario: of the run.
        labels: of its rows, in order.

    Raises:
        SettingError: it cannot be had, or is of another base or no plain LoRA.
    """
    if (start := scenario.model.start) is None:
        return None
    folder = _folder(start)
    told, saved = plain(folder, start)
    about, tensors = _about(folder), saved.tensors
    _check_base(scenario, start, told, about)
    r, own = told["r"], scenario.model.adapter.r
    if r > own:
        more = " (its run merged into its base, and what it saved holds that too)" if _merged(folder) else ""
        raise SettingError(KEY, f"{start} has rank {r}{more}, and model.adapter.r is {own}: set it to {r}")
    bound, left_out = _of_others(tensors, about, scenario, labels)
    if scenario.model.head == "kept":
        if not bound:
            raise SettingError("model.head", f"{start} has no head to keep: take trained")
        bound, left_out = [], ""
    kept = {n: t for n, t in tensors.items() if not left_out or n not in bound}
    return Start(Saved(kept, saved.scaling), left_out)


def plain(folder: Path, start: str) -> tuple[dict[str, Any], Saved]:
    """What peft's configuration beside an adapter says, and its tensors.

    Raises:
        SettingError: of `model.start`, with the name that it was given; it is no plain LoRA.
    """
    told = _config(folder, start)
    scaling = told["lora_alpha"] / (told["r"] ** 0.5 if told.get("use_rslora") else told["r"])
    return told, Saved(_tensors(folder, start), scaling)


def found(folder: Path) -> tuple[dict[str, Any], Saved]:
    """The same of a folder's adapter, which may also be of another of peft's kinds: then its tensors hold all.

    Raises:
        SettingError: of `model.start`; it cannot be read.
    """
    try:
        told = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        told = {}
    if not isinstance(told, dict) or is_lora(told):
        return plain(folder, str(folder))
    return told, Saved(_tensors(folder, str(folder)), 1.0)


def is_lora(told: Mapping[str, Any]) -> bool:
    """Whether a configuration of peft is that of a LoRA."""
    return bool(told.get("peft_type", "LORA") == "LORA")


def _of_others(
    tensors: Mapping[str, Any], about: About | None, scenario: Scenario, labels: Sequence[str]
) -> tuple[list[str], str]:
    """The tensors of a head that tell labels apart; and why they are not for this run's, if they are not."""
    heads = [name for name in tensors if ".lora_" not in name and ".pooler." not in name]
    start = scenario.model.start
    if about is None:
        return heads, f"{start} does not say for which labels it is (model.head: kept takes it all the same)"
    if about.task != scenario.task:
        return heads, f"{start} is for task: {about.task}"
    if about.scale != ((scale := scenario.data.score) and (scale.low, scale.high)):
        return heads, f"{start} is for scores of another scale"
    if about.pooling != (pooling := scenario.model.pooling):
        was, now = (f"model.pooling: {one or 'null'}" for one in (about.pooling, pooling))
        return heads, f"{start} has a head of {was}, and this run is of {now}"
    bound = [name for name in heads if tensors[name].shape[:1] == (len(about.labels),)]
    if about.labels == tuple(labels):
        return bound, ""
    known, asked = few(about.labels), few(labels)
    return bound, f"{start} is for the labels {known} and not for {asked} in this order"


def few(labels: Sequence[str]) -> str:
    """Some labels in words, the first letters of each: what was taken for labels may be texts."""
    shown = [label if len(label) <= _LETTERS else f"{label[:_LETTERS]}..." for label in labels[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def said(scenario: Scenario) -> dict[str, Any] | None:
    """What a summary says of a start: what it is, and what is known of its own privacy; None without one."""
    if (start := scenario.model.start) is None:
        return None
    before: dict[str, Any] = {}
    if (folder := Path(start)).is_dir():
        with contextlib.suppress(UserError):  # it is gone, or of no run
            before = dict(Record.open(adapter_of(folder).parent).summary)
    told = {key: before.get(key) for key in ("epsilon", "delta", "privacy_unit")}
    return {"folder": start, **told, **({"start": before["start"]} if before.get("start") else {})}


def _folder(start: str) -> Path:
    """The folder of the adapter, fetched where it is on the Hub."""
    try:
        if Path(start).is_dir():
            return adapter_of(start)
    except UserError as error:
        raise SettingError(KEY, str(error)) from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", start) or start.startswith("."):
        raise SettingError(KEY, f"no such folder: {start}; name a run's, an adapter's, or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        with quiet_hub():
            return Path(snapshot_download(start, allow_patterns=[_CONFIG, _TENSORS, ABOUT]))
    except Exception as error:  # whatever the Hub, the network or the cache raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingError(KEY, f"{start} is no folder here, and cannot be had from the Hub: {reason}") from error


def _config(folder: Path, start: str) -> dict[str, Any]:
    try:
        told = json.loads((folder / _CONFIG).read_bytes())
        sound = told["r"] > 0 and told["lora_alpha"] > 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        told, sound = {}, False
    if not sound or not is_lora(told):
        raise SettingError(KEY, f"{start} holds no LoRA that can be read ({_CONFIG})")
    if odd := next((key for key in _ODD if told.get(key)), None):
        raise SettingError(KEY, f"{start} is no plain LoRA: its {_CONFIG} has {odd}")
    return dict(told)


def _about(folder: Path) -> About | None:
    try:
        return About.read(folder)
    except UserError:
        return None  # of peft


def _check_base(scenario: Scenario, start: str, told: dict[str, Any], about: About | None) -> None:
    model, named = scenario.model, told.get("base_model_name_or_path")
    base, revision = (named, told.get("revision")) if about is None else (about.base, about.revision)
    here = {model.base, find_base(model.base), named_elsewhere(model.base)}
    if base and base not in here:
        raise SettingError(KEY, f"{start} is of the base {base}, and model.base is {model.base}")
    if about is not None and revision != model.revision:
        raise SettingError(KEY, f"{start} is of the base's revision {revision}, and this is {model.revision}")


def _tensors(folder: Path, start: str) -> Adapter:
    import numpy as np
    from safetensors.torch import load_file

    try:
        found = load_file(folder / _TENSORS)
        made = {name: tensor.float().numpy() for name, tensor in found.items()}
    except Exception as error:  # whatever its files made the library trip over
        raise SettingError(KEY, f"{start} has no {_TENSORS} that can be read") from error
    if strange := next((name for name, tensor in made.items() if not np.isfinite(tensor).all()), None):
        raise SettingError(KEY, f"{start}: {strange} is not finite")
    return made


def _merged(folder: Path) -> bool:
    """Whether the run that wrote an adapter had merged into its base."""
    return any((folder.parent / "merges").glob("*.safetensors"))
