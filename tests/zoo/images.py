"""Tiny random models of images."""

import copy

import numpy as np
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from fedlora.data.store import Examples
from fedlora.kinds.lora import Lora
from fedlora.tasks.base_model import heads_of, quiet_config
from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.loading import build

SIZE = 64
STAGES = {"image_size": SIZE, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
WINDOWS = {
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
PATCHES = {
    "image_size": SIZE,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
MOBILE = {
    "image_size": SIZE,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
    "num_attention_heads": 2,
}
READS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}
TOWERS = {"vision_config": PATCHES, "text_config": READS}
ATTENTION = ("q_proj", "v_proj")

FIT = {
    "vit": ("ViTForImageClassification", PATCHES, ATTENTION),
    "deit": ("DeiTForImageClassification", PATCHES, ATTENTION),
    "dinov2": ("Dinov2ForImageClassification", PATCHES, ATTENTION),
    "convnext": ("ConvNextForImageClassification", STAGES, ("pwconv1", "pwconv2")),
    "clip": ("CLIPForImageClassification", TOWERS, ATTENTION),
    "siglip": ("SiglipForImageClassification", TOWERS, ATTENTION),
}
UNFIT = {
    "swin": ("SwinForImageClassification", WINDOWS, ATTENTION, "q_proj runs on"),
    "swinv2": ("Swinv2ForImageClassification", WINDOWS, ("query", "value"), "query runs on"),
    "mobilevit": ("MobileViTForImageClassification", MOBILE, ("query",), "normalises over the batch"),
}
MODELS = FIT | {name: told[:3] for name, told in UNFIT.items()}


class Processor:
    """Scales brightness alone."""

    do_normalize, do_rescale, rescale_factor = False, True, 1 / 255

    def __call__(self, image, return_tensors):
        return {"pixel_values": np.zeros((1, 3, SIZE, SIZE))}


def plain(name):
    """The model as transformers builds it, without dropout and in evaluation mode."""
    kind, told, _ = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(hf, kind)
    config = cls.config_class(**told, num_labels=3)
    quiet_config(config)
    return cls(config).eval()


def make(name, **more):
    """The task, and the same model with factors by peft alone."""
    model, targets = plain(name), MODELS[name][2]
    copied, heads = copy.deepcopy(model), dict.fromkeys(heads_of(model), True)
    task = build(ImageClassification, model, Lora(4, 8, targets), reader=Processor(), heads=heads, seed=3, **more)
    inside = [n for n, _ in copied.named_modules() if any(f".{h}." in f".{n}." for h in heads)]
    told = {"target_modules": list(targets), "exclude_modules": inside, "modules_to_save": list(heads)}
    return task, get_peft_model(copied, LoraConfig(r=4, lora_alpha=8, **told)).eval()


def some(count=3):
    """Random images."""
    pixels = np.random.default_rng(0).integers(0, 256, count * 3 * SIZE * SIZE).astype(np.uint8)
    return Examples(pixels, np.arange(count + 1) * 3 * SIZE * SIZE, np.arange(count))


def reader():
    """An image processor of transformers that does as `Processor`."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_normalize=False)


def rows(folder):
    """Random images with labels as a dataset on disk; its name."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as Picture

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    rng, halves = np.random.default_rng(0), {}
    for half, count in (("train", 16), ("test", 6)):
        made = [Picture.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)) for _ in range(count)]
        halves[half] = Dataset.from_dict(
            {"image": made, "label": [i % 3 for i in range(count)]}, features=features
        )
    DatasetDict(halves).save_to_disk(str(folder))
    return folder


def pixels(folder):
    """Each test image as a model takes it, and its label."""
    from datasets import load_from_disk

    for row in load_from_disk(str(folder))["test"]:
        yield reader()(row["image"], return_tensors="pt")["pixel_values"], row["label"]
