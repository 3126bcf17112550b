"""Images, on scikit-learn's handwritten digits and a small vision transformer made on the spot."""

import numpy as np
import pytest
import torch

from fedlora import export, plan, scenario, simulate
from fedlora.cli import main
from fedlora.data.reading import Rows
from fedlora.errors import ScenarioError, SettingError
from fedlora.prepare import prepare
from fedlora.tasks import base_model, loading
from fedlora.tasks.image_classification import ImageClassification


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """A ViT of two layers of width 32 that sees 16 x 16 pixels, with a head for other labels, as a folder."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        num_labels=7,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Zeros and ones, 8 x 8 pixels of 17 greys, as a dataset on disk."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    found = load_digits(n_class=2)  # 360 of them
    pictures = [Picture.fromarray((image * 15.9).astype(np.uint8)) for image in found.images]
    features = Features({"digit": Image(), "kind": ClassLabel(names=["zero", "one"])})
    held = Dataset.from_dict({"digit": pictures, "kind": found.target.tolist()}, features=features)
    folder = tmp_path_factory.mktemp("data") / "digits"
    DatasetDict({"train": held.select(range(280)), "test": held.select(range(280, 360))}).save_to_disk(str(folder))
    return folder


@pytest.fixture
def file(tiny_vit, digits, tmp_path):
    made = tmp_path / "digits.yaml"
    made.write_text(
        f"""name: digits
task: image_classification
model: {{base: {tiny_vit}, adapter: {{r: 4, alpha: 8, targets: [q_proj, v_proj]}}}}
data:
  hub: {{path: {digits}, text: digit, label: kind}}
  partition: {{kind: iid}}
clients: {{total: 2, use: dp_sgd, local_steps: 4, batch_size: 32, lr: 1.0}}
privacy: {{epsilon: 8, delta: 1.0e-3}}
strategy: {{use: ffa_lora}}
rounds: 4
eval_every: 4
engine: {{kind: inline}}
"""
    )
    return made


def test_a_vision_transformer_in_four_bits_learns_them_too(file, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantize]'")
    told = scenario.load(file, ["model.quantize=4bit"])
    assert simulate(told, out=tmp_path / "run").summary["accuracy"] > 0.8


def test_a_vision_transformer_learns_digits_privately_and_loads_in_plain_peft(file, tiny_vit, tmp_path):
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    run = simulate(file, out=tmp_path / "run")
    told = run.summary
    assert told["accuracy"] > 0.8 and told["failures"] == 0 and 0 < told["epsilon"] <= 8
    assert told["bytes_up_total"] < told["bytes_down_total"] * 1.01  # A is drawn from the seed

    base = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=2, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    processor = AutoImageProcessor.from_pretrained(tiny_vit, backend="pil")
    test = load_from_disk(str(scenario.load(file).data.hub.path))["test"]
    names = sorted(["zero", "one"])  # labels are sorted, as those of texts are
    right = []
    with torch.no_grad():
        for row in test:
            seen = processor(row["digit"].convert("RGB"), return_tensors="pt")["pixel_values"]
            right.append(names[int(model(pixel_values=seen).logits.argmax())] == ["zero", "one"][row["kind"]])
    assert np.mean(right) == pytest.approx(told["accuracy"])


def test_a_convnext_learns_them_by_cores_of_its_convolutions(file, tmp_path):
    """Privately, with a bound on what each image does; `plan` knows what travels."""
    from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = str(tmp_path / "convnext")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16, "num_labels": 7}
    told = {"patch_size": 2, "layer_scale_init_value": 1.0, "initializer_range": 0.2}
    ConvNextForImageClassification(ConvNextConfig(**sizes, **told)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    targets = "[patch_embeddings, downsampling_layer.1, pwconv1, pwconv2]"
    asked = [
        f"model.base={folder}",
        "model.adapter.kind=core",
        f"model.adapter.targets={targets}",
        "strategy.server={kind: adam, lr: 0.02}",
        "model.adapter.alpha=32",
    ]
    made = scenario.load(file, asked)
    run = simulate(made, out=tmp_path / "run")
    assert run.summary["accuracy"] > 0.75 and not run.summary["failures"] and 0 < run.summary["epsilon"] <= 8
    planned = plan(made)
    assert planned.bytes_up_total == run.summary["bytes_up_total"]
    told = {line["kind"]: line for line in planned.kinds}
    # 4 x 3 x 2 x 2 of colours, 4 x 4 x 2 x 2 between the stages, and two of 4 x 4 in each of two blocks.
    assert (
        told["core"]["adapter"] == 48 + 64 + 4 * 16 and "beside convolutions go core" in told["sparse"]["problem"]
    )
    whole = export(run.folder, tmp_path / "merged", merge=True)
    kept = AutoModelForImageClassification.from_pretrained(whole)
    assert not torch.equal(
        kept.convnext.embeddings.patch_embeddings.weight,
        AutoModelForImageClassification.from_pretrained(folder).convnext.embeddings.patch_embeddings.weight,
    )


def test_predict_takes_the_file_of_an_image(file, tmp_path, capsys):
    from datasets import load_from_disk

    run = simulate(file, out=tmp_path / "run", overrides=["rounds=1", "eval_every=1"])
    load_from_disk(str(scenario.load(file).data.hub.path))["test"][0]["digit"].save(tmp_path / "one.png")
    assert main(["predict", str(run.folder), str(tmp_path / "one.png")]) == 0
    assert capsys.readouterr().out.split()[0] in ("zero", "one")
    assert main(["predict", str(run.folder), str(file)]) == 2
    assert "holds no image that can be read" in capsys.readouterr().err


def test_what_the_model_sees_is_what_its_processor_makes(file, tiny_vit):
    from datasets import load_from_disk
    from transformers import AutoImageProcessor

    held = scenario.load(file)
    made, ready = load(tiny_vit), prepare(held)
    picture = load_from_disk(str(held.data.hub.path))["train"][5]["digit"].convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tiny_vit, backend="pil")
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made.batch(ready.data.train, np.array([5]))["pixel_values"], expected)
    assert ready.data.train.tokens.dtype == np.uint8 and ready.data.train.row(5).shape == (3 * 16 * 16,)


def test_an_images_private_gradient_is_its_own(file, tiny_vit):
    """Per-example gradients are those of one image at a time."""
    from fedlora.passes.gradients import backward, hook

    made, data = load(tiny_vit), prepare(scenario.load(file)).data
    names = tuple(n for n, s in made.layout.items() if s.role != "A")
    parameters = made.begin({}, names)
    hook(made, names)
    backward(made, made.batch(data.train, np.arange(3)))
    together = [p.grad_sample.clone() for p in parameters]
    for image in range(3):
        for parameter in parameters:
            parameter.grad = parameter.grad_sample = None
        made.low_rank.singly = False  # as a plain client's backward pass
        backward(made, made.batch(data.train, np.array([image])))
        for each, parameter in zip(together, parameters, strict=True):
            torch.testing.assert_close(each[image], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ("data.files={train: a.csv}", "rows of text hold no images: name a folder of them as data.hub.path"),
        ("data.dataset=sst2", "sst2 is for task: classification"),
        ("data.hub.text=[a, b]", "pairs of columns are for classification"),
    ],
)
def test_what_images_cannot_do_is_said_before_a_run(file, change, words):
    with pytest.raises(ScenarioError, match=words):
        scenario.load(file, [change])


def test_a_column_that_holds_no_images_is_told_by_its_row(tiny_vit):
    rows = Rows(["a text"], ["zero"])
    with pytest.raises(SettingError, match="row 0 holds no image: name the column of images"):
        ImageClassification.encode(base_model.load_processor(tiny_vit), rows, ("one", "zero"), 0)


def load(base):
    from fedlora.kinds.lora import Lora

    kind = Lora(4, 8, ("q_proj", "v_proj"))
    return loading.load("image_classification", base, kind, labels=("one", "zero"), seed=3)
