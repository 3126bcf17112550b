import numpy as np
import pytest
import torch

from fedlora.passes import factored, quantized
from fedlora.passes.factored import FactoredLinear

LEFT, RIGHT, BIAS = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([0.5, 0.0])


def test_two_thin_layers_are_one_of_their_product():
    layer = FactoredLinear(LEFT, RIGHT, BIAS)
    assert layer.weight.tolist() == [[3.0, 0.0, 1.0], [6.0, 0.0, 2.0]]
    assert layer(torch.tensor([[1.0, 5.0, 1.0]])).tolist() == [[4.5, 8.0]]
    assert (layer.in_features, layer.out_features) == (3, 2) and isinstance(layer, torch.nn.Linear)
    assert FactoredLinear(LEFT, RIGHT, None).bias is None


def test_it_has_its_factors_alone_and_none_trains():
    layer = FactoredLinear(LEFT, RIGHT, BIAS)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == dict.fromkeys(
        ["left", "right", "bias"], False
    )
    assert sum(p.numel() for p in layer.parameters()) == 2 + 3 + 2
    assert quantized.dtype(layer) == torch.float32 and not quantized.is_held(layer)


def test_products_are_those_of_the_whole_weight():
    torch.manual_seed(0)
    layer = FactoredLinear(torch.randn(5, 2), torch.randn(2, 7), torch.randn(5))
    whole = torch.nn.Linear(7, 5)
    whole.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, gradient = torch.randn(4, 7), torch.randn(4, 5)
    for made in (factored.product, factored.back):
        given = x if made is factored.product else gradient
        assert torch.allclose(made(layer, given), made(whole, given), atol=1e-5)


@pytest.fixture(scope="module")
def pairs(tiny_base, tmp_path_factory):
    """The tiny base cut, as factors and multiplied out."""
    from fedlora.compressing import compress

    root = tmp_path_factory.mktemp("cut")
    told = {"use": "lord", "keep": 0.5, "exclude": ["pooler"]}
    return [
        str(compress(tiny_base, root / name, whole=name == "whole", **told).folder) for name in ("thin", "whole")
    ]


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_beside_it_learns_as_beside_the_whole(build, pairs, private, precision):
    from fedlora.passes import gradients

    found = []
    for base in pairs:
        worker = build(f"model.base={base}", f"engine.precision={precision}", private=private)
        task, data = worker.task, worker.dataset
        batch = task.batch(data.train, np.arange(6))
        names = tuple(n for n, slot in task.layout.items() if slot.trainable)
        rng = np.random.default_rng(0)
        adapter = {
            n: (t + 0.02 * rng.standard_normal(t.shape)).astype(np.float32) for n, t in task.initial.items()
        }
        found.append(gradients.apart(task, adapter, names, batch))
        assert (task.packing is not None) and len(task.low_rank.layers) == 4  # packed, by the quick products
    thin = [
        m
        for m in build(
            f"model.base={pairs[0]}", f"engine.precision={precision}", private=private
        ).task.model.modules()
        if isinstance(m, FactoredLinear)
    ]
    assert len(thin) == 12 and precision in ("fp32", "bf16")
    near = 1e-3 if precision == "fp32" else 0.1
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= near * other.norm()


@pytest.mark.parametrize("fused", [1, 2])
def test_a_whole_run_is_that_of_the_whole_weight(tiny, pairs, tmp_path, fused):
    from fedlora import export, predict, simulate

    runs = [
        simulate(tiny(f"model.base={base}", f"engine.fused={fused}"), out=tmp_path / f"run{i}")
        for i, base in enumerate(pairs)
    ]
    thin, whole = (run.summary for run in runs)
    assert thin["loss"] == pytest.approx(whole["loss"], abs=1e-3) and thin["epsilon"] == whole["epsilon"]
    texts = ["note 1 says the film was fine here", "note 2 says the film was sad"]
    said = [predict(run, texts) for run in runs]
    assert [a.probability for a in said[0]] == pytest.approx([a.probability for a in said[1]], abs=1e-3)
    card = (runs[0].folder / "adapter" / "README.md").read_text()
    assert "fedlora.load_adapter" in card and "transformers cannot load" in card
    merged = export(runs[0], tmp_path / "merged", merge=True)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, reader = (auto.from_pretrained(merged) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        told = model(**reader(texts, padding=True, return_tensors="pt")).logits.softmax(-1).max(-1).values
    assert told.tolist() == pytest.approx([a.probability for a in said[0]], abs=1e-4)
