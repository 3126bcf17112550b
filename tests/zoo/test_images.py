"""Models of images, of which each is right for every image or refused."""

import numpy as np
import pytest
import torch
import transformers as hf

from fedlora.data.store import Examples
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.passes.fused import Fused
from fedlora.tasks.base_model import heads_of as _heads
from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.loading import build
from tests.zoo.models import privately

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
FIT = {
    "vit": ("ViTForImageClassification", PATCHES, ("q_proj", "v_proj")),
    "dinov2": ("Dinov2ForImageClassification", PATCHES, ("q_proj", "v_proj")),
    "convnext": ("ConvNextForImageClassification", STAGES, ("pwconv1", "pwconv2")),
}
UNFIT = {
    "swin": ("SwinForImageClassification", WINDOWS, ("q_proj", "v_proj"), "q_proj runs on"),
    "swinv2": ("Swinv2ForImageClassification", WINDOWS, ("query", "value"), "query runs on"),
    "mobilevit": ("MobileViTForImageClassification", MOBILE, ("query",), "normalises over the batch"),
}


class Processor:
    """Scales brightness alone."""

    do_normalize, do_rescale, rescale_factor = False, True, 1 / 255

    def __call__(self, image, return_tensors):
        return {"pixel_values": np.zeros((1, 3, SIZE, SIZE))}


def make(name, private=False):
    kind, told, targets = (FIT | UNFIT)[name][:3]
    torch.manual_seed(0)
    cls = getattr(hf, kind)
    config = cls.config_class(**told, num_labels=3)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model = cls(config).eval()
    heads = dict.fromkeys(_heads(model), True)
    kind = Lora(4, 8, targets)
    return build(ImageClassification, model, kind, reader=Processor(), heads=heads, seed=3, private=private)


def images(count=3):
    pixels = np.random.default_rng(0).integers(0, 256, count * 3 * SIZE * SIZE).astype(np.uint8)
    return Examples(pixels, np.arange(count + 1) * 3 * SIZE * SIZE, np.arange(count))


def start(task):
    rng = np.random.default_rng(1)
    return {n: (t + 0.1 * rng.normal(size=t.shape)).astype(np.float32) for n, t in sorted(task.initial.items())}


@pytest.mark.parametrize("name", FIT)
def test_an_images_loss_and_gradient_are_those_of_it_alone(name):
    task = make(name, private=True)
    data, adapter, names = images(), start(task), tuple(sorted(task.layout))
    found = privately(task, adapter, data)
    for i in range(len(data)):
        parameters = task.begin(adapter, names)
        task.losses(task.batch(data, np.array([i]))).sum().backward()
        alone = torch.cat([p.grad.flatten() for p in parameters])
        assert float((found[i] - alone).norm() / alone.norm()) < 1e-4


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_whose_images_are_not_apart_is_refused_under_privacy(name):
    with pytest.raises(SettingError, match=UNFIT[name][3]) as told:
        make(name, private=True)
    assert told.value.key == "model.base" and "\n" not in str(told.value)


def test_clients_cannot_share_passes_of_windows():
    with pytest.raises(SettingError, match=r"q_proj runs on") as told:
        Fused(make("swin"))
    assert told.value.key == "engine.fused"


def test_no_client_moves_the_running_figures_of_a_frozen_base_and_another_base_is_told_by_them():
    task = make("mobilevit")
    layers = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before, mark = [layer.running_mean.clone() for layer in layers], task.base_fingerprint()
    task.begin(start(task), tuple(task.layout))
    data = images()
    together = task.losses(task.batch(data, np.arange(3)))
    together.sum().backward()
    assert all(torch.equal(layer.running_mean, mean) for layer, mean in zip(layers, before, strict=True))
    alone = [task.losses(task.batch(data, np.array([i]))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert task.base_fingerprint() == mark
    layers[0].running_mean += 0.1
    assert task.base_fingerprint() != mark
