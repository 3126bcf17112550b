"""The core of a convolution: three in a row, against one with the whole change; in a small ConvNeXt."""

import numpy as np
import pytest
import torch

from fedlora.adapter import Update, weighted_mean
from fedlora.data.store import Examples
from fedlora.errors import SettingError
from fedlora.kinds.averages import aggregation_error
from fedlora.kinds.contract import Saved
from fedlora.kinds.core import Core
from fedlora.kinds.lora import Lora
from fedlora.passes import gradients
from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.loading import build

R, SIZE = 4, 16
TARGETS = ("patch_embeddings", "downsampling_layer.1", "pwconv1")


class Processor:
    do_normalize, do_rescale, rescale_factor = False, True, 1 / 255

    def __call__(self, image, return_tensors):
        return {"pixel_values": np.zeros((1, 3, SIZE, SIZE))}


def convnext():
    """Two stages of one block each; a kernel of 2 x 2 between them, and one of 4 x 4 on colours."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    told = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "image_size": SIZE}
    config = ConvNextConfig(**told, layer_scale_init_value=1.0, initializer_range=0.3)
    return ConvNextForImageClassification(config).eval()


def load(kind, private=False):
    told = {"reader": Processor(), "heads": {"classifier": True}, "seed": 3}
    return build(ImageClassification, convnext(), kind, private=private, **told)


@pytest.fixture(scope="module")
def made():
    return load(Core(R, 2.0, TARGETS), private=True)


def moved(task, seed=0):
    rng = np.random.default_rng(seed)
    return {
        n: (0.3 * rng.standard_normal(t.shape)).astype(np.float32) if task.layout[n].role == "core" else t
        for n, t in task.initial.items()
    }


def some(count=3):
    pixels = np.random.default_rng(0).integers(0, 256, count * 3 * SIZE * SIZE).astype(np.uint8)
    return Examples(pixels, np.arange(count + 1) * 3 * SIZE * SIZE, np.arange(count))


def test_a_core_has_a_rank_for_each_dimension(made):
    shapes = {s.module.rsplit(".", 2)[-1]: s.shape for s in made.layout.values() if s.role == "core"}
    assert (R, 3, 4, 4) in shapes.values() and (R, R, 2, 2) in shapes.values() and (R, R) in shapes.values()


def test_the_change_is_what_the_model_adds(made):
    adapter = moved(made)
    made.begin(adapter, ())
    for name, (left, right) in made.kind.change(made.layout, adapter).items():
        layer = made.kind.held(made.model)[name]
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Conv2d):
            continue
        assert made.weights[name] == (left.shape[0], right.shape[1])
        x = torch.randn(2, base.in_channels, 8, 8)
        whole = torch.from_numpy(made.kind.scaling() * left @ right).reshape(base.weight.shape)
        with torch.no_grad():
            added = layer(x) - base(x)
            expected = torch.nn.functional.conv2d(x, whole, None, base.stride, base.padding)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


def test_averages_are_exact_and_noise_grows_as_it_says(made):
    updates = [
        Update(
            adapter={n: t for n, t in moved(made, k).items() if made.layout[n].role == "core"},
            weight=float(k),
            clients=(k,),
            scaling=made.kind.scaling(),
        )
        for k in (1, 2, 3)
    ]
    after = {**made.initial, **weighted_mean(updates)}
    assert aggregation_error(made.layout, made.initial, updates, after, kind=made.kind) < 1e-5
    told = made.kind.noise_gain(made.layout, made.initial, {"core"})
    for slot in made.layout.values():
        if slot.role == "core":
            assert told[slot.module] == pytest.approx(made.kind.scaling() * np.prod(slot.shape) ** 0.5, rel=1e-4)


def test_gradients_of_single_images_are_those_of_each_alone(made):
    names = tuple(n for n, slot in made.layout.items() if slot.trainable)
    adapter, rows = moved(made), np.arange(3)
    apart = gradients.apart(made, adapter, names, made.batch(some(), rows))
    for i in rows:
        parameters = made.begin(adapter, names)
        made.losses(made.batch(some(), rows[i : i + 1])).sum().backward()
        for own, parameter in zip(apart, parameters, strict=True):
            torch.testing.assert_close(own[i], parameter.grad, atol=1e-5, rtol=1e-4)


def test_an_export_and_a_merge_score_as_the_model_does(made, tmp_path):
    from peft import PeftModel

    adapter, batch = moved(made), made.batch(some(), np.arange(3))
    made.begin(adapter, ())
    with torch.no_grad():
        expected = made.logits(batch)
    made.export(adapter, tmp_path / "saved", None)
    there = PeftModel.from_pretrained(convnext(), str(tmp_path / "saved")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            there(pixel_values=batch["pixel_values"]).logits, expected, atol=1e-4, rtol=1e-4
        )
    other = load(made.kind)
    change = made.kind.change(made.layout, adapter)
    other.merge({m: (made.kind.scaling() * left, right) for m, (left, right) in change.items()})
    other.begin({n: t for n, t in adapter.items() if made.layout[n].role == "head"}, ())
    with torch.no_grad():
        torch.testing.assert_close(other.logits(batch), expected, atol=1e-4, rtol=1e-4)


def test_it_begins_from_what_it_exported_and_a_lower_rank_holds_the_first(made):
    adapter = moved(made)
    tensors, _ = made.kind.export(made.layout, adapter)
    again = made.kind.adopt(made.layout, made.initial, Saved(tensors, 1.0))
    for name, tensor in again.items():
        np.testing.assert_allclose(tensor, adapter[name], atol=1e-4)
    cut = {n: t[tuple(map(slice, made.kind.shape(made.layout[n], 2)))] for n, t in adapter.items()}
    try:
        made.become(2)
        made.begin(cut, ())
        assert torch.isfinite(made.logits(made.batch(some(), np.arange(3)))).all()
        assert {len(left[0]) for left, _ in made.kind.change(made.layout, cut).values()} == {2}
    finally:
        made.become()


@pytest.mark.parametrize("kind", [Lora(R, 2.0, ("patch_embeddings",)), Core(R, 2.0, ("dwconv",))])
def test_other_kinds_and_convolutions_of_several_groups_are_refused(kind):
    with pytest.raises(SettingError, match=r"'(patch_embeddings|dwconv)' is Conv2d"):
        load(kind)
