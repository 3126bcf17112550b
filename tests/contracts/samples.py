"""Of each task that comes with fedlora rows to try it on, and a tiny base model; a new task adds its own here."""

import io
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedlora.data.reading import Rows


class Sample(NamedTuple):
    """What a task is tried on."""

    rows: Rows
    labels: tuple[str, ...]
    base: str
    targets: tuple[str, ...]
    question: str  # that a finished model is asked
    right: dict  # sections of a scenario that go with the task
    wrong: dict  # and that do not


class _Section:
    """A section of a scenario with the keys that are given; others are None."""

    def __init__(self, **keys):
        vars(self).update(keys)

    def __getattr__(self, name):
        return None


def sections(task, *, text="text", label="label", partition="iid", source="files", score=None, **more):
    data = _Section(**{source: _Section(text=text, label=label)}, partition=_Section(kind=partition), score=score)
    return {"task": task, "data": data, "model": _Section(pooler="frozen"), **more}


def classification(folder: Path, bases) -> Sample:
    rows = Rows([("a fine film", "yes"), ("poor", "no no"), ("so so and so", "no")], ["good", "bad", "bad"])
    right = sections("classification")
    return Sample(
        rows,
        ("bad", "good"),
        bases("tiny_base"),
        ("query", "value"),
        "a fine film",
        right,
        right | {"exact_match": _Section(examples=1)},
    )


def token_classification(folder: Path, bases) -> Sample:
    rows = Rows(
        [("Angelman", "syndrome", "of", "Bob", "."), "mild angioedema", ("nothing", "unusual")],
        [("B-Illness", "I-Illness", "O", "B-Name", "O"), ("O", "B-Illness"), ("O", "O")],
    )
    right = sections("token_classification", text="tokens", label="tags")
    return Sample(
        rows,
        ("O", "B-Illness", "B-Name", "I-Illness", "I-Name"),
        bases("tiny_base"),
        ("query", "value"),
        "Bob has angioedema.",
        right,
        right | {"exact_match": _Section(examples=1)},
    )


def causal_lm(folder: Path, bases) -> Sample:
    rows = Rows(["two and two", "three and four more"], ["four", "seven or so"])
    right = sections("causal_lm")
    return Sample(
        rows,
        (),
        bases("tiny_lm"),
        ("q_proj", "v_proj"),
        "two and two",
        right,
        sections("causal_lm", partition="shards"),
    )


def causal_lm_of_chats(folder: Path, bases) -> Sample:
    from fedlora.data.chats import Turn
    from fedlora.tasks.base_model import load_tokenizer

    tokenizer = load_tokenizer(bases("tiny_lm"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    shutil.copytree(bases("tiny_lm"), base := folder / "chat", dirs_exist_ok=True)
    tokenizer.save_pretrained(base)
    ask, say = (lambda text: Turn("user", text)), (lambda text: Turn("assistant", text))
    rows = Rows(
        [
            (Turn("system", "be brief"), ask("two"), say("three")),
            (ask("one"), say("two"), ask("so"), say("three or four")),
            (ask("one two three four"), say("five")),
        ],
        [("three",), ("two", "three or four"), ("five",)],
    )
    right = sections("causal_lm")
    wrong = sections("causal_lm", partition="shards")
    return Sample(rows, (), str(base), ("q_proj", "v_proj"), "two and two", right, wrong)


def preference(folder: Path, bases) -> Sample:
    rows = Rows(
        ["two and two", "three and four more", "six", "so"],
        [("four", "five or so"), ("it is seven", "eight"), ("yes", "no " * 40), ("a word " * 30, "another " * 12)],
    )
    right = sections("preference", text="prompt", label=("chosen", "rejected"))
    return Sample(
        rows,
        (),
        bases("tiny_lm"),
        ("q_proj", "v_proj"),
        "two and two",
        right,
        sections("preference", label="chosen", partition="shards"),
    )


def multi_label(folder: Path, bases) -> Sample:
    rows = Rows(["a fine film", "poor", "so so and so", "so"], [("good", "long"), ("bad",), ("bad", "long"), ()])
    right = sections("multi_label")
    return Sample(
        rows,
        ("bad", "good", "long"),
        bases("tiny_base"),
        ("query", "value"),
        "a fine film",
        right,
        sections("multi_label", label=None),
    )


def regression(folder: Path, bases) -> Sample:
    rows = Rows(
        [("a fine film", "a good one"), ("poor", "a plane lands"), ("so so", "so so")],
        [(0.9, 0.5), (0.1, 0.0), (1.0, 0.25)],
    )
    right = sections("regression", score=_Section(low=0.0, high=5.0))
    return Sample(
        rows,
        ("alike", "long"),
        bases("tiny_base"),
        ("query", "value"),
        "a fine film",
        right,
        sections("regression"),
    )


def image_classification(folder: Path, bases) -> Sample:
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    base = folder / "vit"
    shutil.rmtree(base, ignore_errors=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, num_labels=2, **sizes)
    ViTForImageClassification(config).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(base)
    pictures = []
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(held := io.BytesIO(), "PNG")
        pictures.append(held.getvalue())
    (file := folder / "picture.png").write_bytes(pictures[0])
    right = sections("image_classification", source="hub")
    return Sample(
        Rows(pictures, ["one", "zero", "one"]),
        ("one", "zero"),
        str(base),
        ("q_proj", "v_proj"),
        str(file),
        right,
        sections("image_classification"),
    )


def run_of(name: str, sample: Sample, folder: Path) -> str:
    """A private scenario of two clients and two rounds on the rows of a sample, each ten times with a number."""
    import json

    import datasets
    from PIL import Image

    task, rows = name.partition("_of_")[0], []
    files: dict[str, object] = {"train": str(folder / "rows.jsonl"), "text": "text", "label": "label"}
    more = ""
    for turn in range(10):
        for text, label in zip(sample.rows.texts, sample.rows.labels, strict=True):
            row = {"text": f"{text} {turn}", "label": label}
            if task in ("classification", "regression"):
                row = {"a": text[0], "b": f"{text[1]} {turn}", "label": label}
                files["text"] = ["a", "b"]
            if task == "regression":
                row |= {"alike": label[0] * 5, "long": label[1] * 5}
                files["label"], more = ["alike", "long"], "score: {low: 0, high: 5}"
            if task == "token_classification":
                words = text.split() if isinstance(text, str) else text
                row = {"text": [*words, str(turn)], "label": [*label, "O"]}
            if task == "preference":
                row |= dict(zip(("yes", "no"), label, strict=True))
                files["label"] = ["yes", "no"]
            if name == "causal_lm_of_chats":
                turns = [{"role": one.role, "content": one.content} for one in text]
                turns[0]["content"] += f" {turn}"
                row, files = {"turns": turns}, {"train": files["train"]}
                more = "messages: turns"
            rows.append(row)
    source = f"files: {json.dumps(files)}"
    if task == "image_classification":
        pictures = [Image.open(io.BytesIO(one)) for one in sample.rows.texts] * 10
        labels = [*sample.rows.labels] * 10
        made = datasets.Dataset.from_dict({"text": pictures, "label": labels})
        made = made.cast_column("label", datasets.ClassLabel(names=sorted(set(labels))))
        parts = {"train": made, "test": made.select(range(6))}
        datasets.DatasetDict(parts).save_to_disk(str(folder / "pictures"))
        source = f"hub: {{path: {folder / 'pictures'}, text: text, label: label}}"
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"""
name: every
task: {task}
seed: 3
model: {{base: "{sample.base}", adapter: {{r: 4, alpha: 8, targets: {json.dumps(sample.targets)}}}}}
data: {{{source}, {more}{", " if more else ""}partition: {{kind: iid}}, max_length: 24, test_share: 0.2}}
clients: {{total: 2, use: dp_sgd, local_steps: 1, batch_size: 4, lr: 0.1}}
privacy: {{epsilon: 8, delta: 1.0e-3}}
strategy: {{use: ffa_lora}}
rounds: 2
engine: {{kind: inline, precision: fp32}}
"""
