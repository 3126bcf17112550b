"""A last layer of low rank: a thousand labels by four numbers each, and the ordinary layer when exported."""

import numpy as np
import pytest
import torch

from fedlora import evaluate, export, plan, simulate
from fedlora.data.store import Examples
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.passes import gradients
from fedlora.scenario.head import NarrowHead
from fedlora.tasks import heads, loading

LABELS = tuple(f"code {i:03}" for i in range(1000))


@pytest.fixture(scope="module")
def task(tiny_base):
    kind = Lora(4, 8, ("query", "value"))
    return loading.load(
        "multi_label", tiny_base, kind, labels=LABELS, seed=3, head=NarrowHead(rank=4), max_length=24, private=True
    )


@pytest.fixture
def coded(tmp_path):
    """Of 120 rows each has one of two frequent codes, and two of the others."""
    lines = [
        f"note {i} on {'fever' if i % 2 else 'cough'},{i % 2}|{i * 7 % 998 + 2}|{i * 11 % 998 + 2}"
        for i in range(120)
    ]
    (file := tmp_path / "coded.csv").write_text("\n".join(["text,labels", *lines]) + "\n")
    return (
        "task=multi_label",
        f"data.files={{train: '{file}', text: text, label: labels}}",
        f"data.labels={[str(i) for i in range(1000)]}",
        "data.partition={kind: iid}",
        "data.test_share=0.3",
        "model.head={rank: 4}",
        "rounds=1",
    )


def test_each_label_is_four_numbers_and_a_bias(task):
    head = {n: s for n, s in task.layout.items() if s.role == "head"}
    trained = sum(int(np.prod(s.shape)) for s in head.values() if s.trainable)
    assert trained == 1000 * 4 + 1000  # and not 32,000 + 1,000
    (down,) = (task.initial[n] for n, s in head.items() if not s.trainable)
    np.testing.assert_allclose(down @ down.T, 32 / 4 * np.eye(4), atol=1e-5)
    biases = [t for n, t in task.initial.items() if n.endswith("bias")]
    assert len(biases) == 1 and np.allclose(biases[0], -np.log(999))  # as every head of several labels begins


def test_the_mean_of_what_clients_train_is_the_mean_of_their_layers():
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, 5))
    each = [
        {"x.narrowed.weight": down, "x.widened.weight": u, "x.widened.bias": u[:, 0]}
        for u in rng.standard_normal((3, 7, 2))
    ]
    mean = {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
    layers = [heads.whole({**one, "x.lora_A.weight": down}) for one in each]
    assert layers[0].keys() == {"x.weight", "x.bias", "x.lora_A.weight"}
    for name in ("x.weight", "x.bias"):
        np.testing.assert_allclose(heads.whole(mean)[name], np.mean([layer[name] for layer in layers], axis=0))


def test_gradients_of_examples_stay_apart(task):
    rng = np.random.default_rng(1)
    lengths, held = (3, 11, 6), rng.random((3, 1000)) < 0.01
    some = Examples(rng.integers(5, 3000, 20).astype(np.int32), np.cumsum([0, *lengths]), held.astype(np.uint8))
    names = tuple(n for n, s in task.layout.items() if s.trainable)
    together = gradients.apart(task, task.initial, names, task.batch(some, np.arange(3)))
    for row in range(3):
        parameters = task.begin(task.initial, names)
        task.losses(task.batch(some, np.array([row]))).sum().backward()
        for mine, parameter in zip(together, parameters, strict=True):
            torch.testing.assert_close(mine[row], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_run_exports_the_layer_that_transformers_knows(tiny, coded, tmp_path):
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForSequenceClassification

    run = simulate(tiny(*coded), out=tmp_path / "run")
    fused = simulate(tiny(*coded, "engine.fused=2"), out=tmp_path / "fused")
    assert run.summary["failures"] == fused.summary["failures"] == 0
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    weight = saved["base_model.model.classifier.weight"]
    assert weight.shape == (1000, 32) and np.linalg.matrix_rank(weight) == 4
    merged = AutoModelForSequenceClassification.from_pretrained(
        export(run, tmp_path / "merged", merge=True)
    ).eval()
    base = AutoModelForSequenceClassification.from_pretrained(tiny(*coded).model.base, num_labels=1000)
    plain = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    ids = torch.tensor([[101, 2023, 2003, 102]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    file = tmp_path / "coded.csv"
    assert evaluate(run, file).rows == 120


def test_a_plan_counts_its_bytes(tiny, coded):
    narrow, whole = (plan(tiny(*coded, more)).parameters["head"] for more in ("rounds=1", "model.head=trained"))
    assert (narrow, whole) == (5000, 33_000)


def test_a_rank_that_saves_nothing_is_refused(tiny_base):
    head = NarrowHead(rank=32)
    with pytest.raises(SettingError, match="rank 32 is not below the 32 numbers that it reads"):
        loading.load("multi_label", tiny_base, Lora(4, 8, ("query",)), labels=LABELS, seed=3, head=head)


def test_a_task_without_a_head_is_told(tiny):
    with pytest.raises(UserError, match=r"a rank is for a head of labels, and task: causal_lm has none"):
        tiny("task=causal_lm", "model.head={rank: 4}")


@pytest.mark.parametrize("kind", ["Roberta", "Llama"])
def test_heads_of_other_models_have_their_last_layer_narrowed(kind):
    """RoBERTa's has a layer before it, Llama's no bias."""
    import transformers

    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 99,
    }
    config = getattr(transformers, f"{kind}Config")(**small, num_labels=7, pad_token_id=0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    place = {"Roberta": "classifier.out_proj", "Llama": "score"}[kind]
    missing = heads.narrow(model, [place.split(".")[0]], 7, 3, 0, [f"{place}.weight", "other.weight"])
    bias = [f"{place}.widened.bias"] if kind == "Roberta" else []
    assert missing == ["other.weight", f"{place}.widened.weight", *bias]
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 7)
