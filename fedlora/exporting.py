"""A run's adapter where people use it: as peft reads it, merged into its base, on the Hub, or asked a question."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import SettingError, UserError
from fedlora.run import Run
from fedlora.tasks import contract as task

_MERGED = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


@dataclass(frozen=True)
class Answer:
    """What a model makes of a text.

    Attributes:
        text: that it was given.
        answer: the label, or the completion.
        probability: of the label; None for a completion.
    """

    text: str
    answer: str
    probability: float | None


def export(run: Run, out: Path, merge: bool = False) -> Path:
    """Copy a run's adapter, or merge it into its base, with the model card.

    Args:
        run: that has ended.
        out: a folder to make.
        merge: write the whole model, as safetensors with its tokenizer, instead of the adapter.

    Raises:
        UserError: the run has no adapter, or the folder is there already.
    """
    source = _adapter(run)
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder with --out")
    if not merge:
        return Path(shutil.copytree(source, out))
    model, tokenizer = _load(run)
    card = (source / "README.md").read_text(encoding="utf-8")
    how = _MERGED.format(auto=task.model_class(_task(run)).__name__, folder=out.name)
    card = re.sub(r"```python\n.*?```\n", lambda _: how, card, flags=re.S)
    card = card.replace("library_name: peft\n", "library_name: transformers\nbase_model_relation: merge\n")
    for layer in [m.get_base_layer() for m in model.modules() if hasattr(m, "lora_A")]:
        task.untie(model, layer)
    with task.quietly():
        model.merge_and_unload().save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hub; gives its address.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # of the network, of the Hub, or of a name that it does not take
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{repository}: not pushed: {reason}") from error
    return str(address)


def predict(run: Run, texts: Sequence[str], max_new_tokens: int = 64) -> list[Answer]:
    """What a run's model makes of texts, one after another: a label, or a completion; of images by their files.

    Raises:
        UserError: the run has no adapter, its base model cannot be loaded, or it judges pairs of texts.
    """
    import torch

    adapter = _adapter(run)
    source = run.scenario.get("data", {})
    if any(isinstance((source.get(key) or {}).get("text"), list) for key in ("hub", "files")):
        raise UserError(f"{run.folder}: its model judges pairs of texts, which predict does not take")
    model, tokenizer = _load(run, adapter)
    model.eval()
    answers = []
    for text in texts:
        with torch.inference_mode():
            if _task(run) == "causal_lm":
                (tokens,) = task.prompts(tokenizer, [text])
                made = model.generate(
                    input_ids=torch.tensor([tokens]),
                    attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                )
                said = tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True)
                answers.append(Answer(text, said.strip(), None))
                continue
            if _task(run) == "image_classification":
                batch = {"pixel_values": tokenizer(_picture(text), return_tensors="pt")["pixel_values"]}
            else:
                cut = tokenizer(text, return_tensors="pt", truncation=True, max_length=source.get("max_length"))
                known = ("input_ids", "attention_mask", *(["token_type_ids"] if task.kinds(model) > 1 else []))
                batch = {key: cut[key] for key in known if key in cut}
            shares = model(**batch).logits.softmax(-1)[0]
        best = int(shares.argmax())
        answers.append(Answer(text, _labels(run)[best], float(shares[best])))
    return answers


def _picture(file: str) -> Any:
    from PIL import Image

    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise UserError(f"{file}: holds no image that can be read") from error


def _adapter(run: Run) -> Path:
    if not (run.folder / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{run.folder}: has no adapter yet; it is written when the run ends, or on Ctrl-C")
    return run.folder / "adapter"


def _labels(run: Run) -> list[str]:
    labels = run.partitions.get("labels")
    if not isinstance(labels, list):
        raise UserError(f"{run.folder / 'partitions.json'}: does not name the labels; the run is damaged")
    return labels


def _task(run: Run) -> str:
    return str(run.scenario.get("task", "classification"))


def _load(run: Run, adapter: Path | None = None) -> tuple[Any, Any]:
    """The base with the adapter in it, in float32, and the tokenizer or image processor."""
    from peft import PeftModel

    asked = run.scenario.get("model", {})
    base, revision = str(asked.get("base")), asked.get("revision")
    named: dict[str, Any] = {}
    if _task(run) != "causal_lm":
        labels = _labels(run)
        named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    try:
        if _task(run) == "image_classification":
            tokenizer, named["ignore_mismatched_sizes"] = task.load_processor(base, revision), True
        else:
            tokenizer = task.load_tokenizer(base, revision)
        with task.quietly():
            model = task.model_class(_task(run)).from_pretrained(
                task.find_base(base), revision=revision or "main", dtype="float32", **named
            )
            if _task(run) != "image_classification":
                task.pads_as(model, tokenizer)
            return PeftModel.from_pretrained(model, str(adapter or run.folder / "adapter")), tokenizer
    except SettingError as error:
        raise UserError(f"{run.folder}: {error.message}") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{run.folder}: its model {base!r} cannot be loaded: {reason}") from error
