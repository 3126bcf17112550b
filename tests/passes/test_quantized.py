"""Frozen weights in few bits: products by hand, error bounds of the rounding, and training through them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora import simulate
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.passes import quantized
from fedlora.passes.gradients import backward, hook, make_safe
from fedlora.tasks import loading

bits = pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantize]'")

BOTH = pytest.mark.parametrize("quantize", ["4bit", "8bit"])
TARGETS = ("query", "value")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def held(weight, bias, quantize):
    """A layer whose weight bitsandbytes holds, taken over."""
    out, inner = weight.shape
    if quantize == "8bit":
        layer = bits.nn.Linear8bitLt(inner, out, has_fp16_weights=False)
        layer.weight = bits.nn.Int8Params(weight, requires_grad=False)
    else:
        layer = bits.nn.Linear4bit(inner, out)
        layer.weight = bits.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert list(quantized.hold(layer.to("cpu"))) == [layer]
    return layer


def simple(quantize):
    """127 and 0 are whole steps of 8 bits, and with -127 the ends and the middle of NF4: held without loss."""
    weight = torch.zeros(2, 32)  # a block of NF4
    weight[:, :2] = torch.tensor([[127.0, 0.0], [-127.0, 127.0]])
    return held(weight, torch.tensor([1.0, 2.0]), quantize)


@BOTH
def test_a_layer_by_hand(quantize):
    layer, x = simple(quantize), torch.zeros(2, 32)
    x[:, :2] = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    y = layer(x.requires_grad_())
    assert y.tolist() == [[128.0, 129.0], [1.0, 383.0]]  # 127 * 1 + 1; -127 + 254 + 2; 0 + 1; 381 + 2
    y.sum().backward()
    assert x.grad[:, :3].tolist() == [[0.0, 127.0, 0.0]] * 2  # the columns' sums
    assert layer.weight.grad is None and not layer.weight.is_floating_point()


def test_a_weight_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(SettingError, match=" is 3 x 7, no whole blocks: write 8bit"):
        held(torch.ones(3, 7), torch.zeros(3), "4bit")


@BOTH
def test_a_layer_computes_in_the_precision_it_is_told(quantize):
    layer = simple(quantize)
    assert quantized.dtype(layer) is torch.float32
    quantized.compute_in(layer, torch.bfloat16)
    layer.bias.data = layer.bias.data.bfloat16()
    assert layer(torch.ones(1, 32)).dtype is quantized.weight(layer).dtype is torch.bfloat16


def test_a_plain_layer_s_weight_is_itself():
    layer = torch.nn.Linear(2, 2)
    assert quantized.weight(layer) is layer.weight and quantized.dtype(layer) is torch.float32
    assert not quantized.is_held(layer) and list(quantized.hold(layer)) == []


def load(base, quantize=None, what="classification", targets=TARGETS, **more):
    told = {"labels": ["a", "b"], "seed": 3, "quantize": quantize, "max_length": 64}
    return loading.load(what, base, Lora(4, 8, targets), **told, **more)


def of(model, name):
    return model.model.get_base_model().get_submodule(name)


@BOTH
def test_weights_are_held_as_near_as_their_bits_allow(tiny_base, quantize):
    """By hand: half a step of each table.

    8 bits: half of a 127th of the row's largest, and half precision's 2^-11 of it. NF4: half of the widest gap,
    (1 - 0.6962) / 2, of the largest of a block of 64, and a hundredth for its scale, which is rounded as well.
    """
    plain, few = load(tiny_base), load(tiny_base, quantize)
    for module in plain.weights:
        true, found = plain.weight(module), few.weight(module)
        error = (found - true).abs()
        if quantize == "8bit":
            largest = true.abs().amax(1, keepdim=True)
            assert (error <= largest * (0.5 / 127 + 2**-11) + 1e-7).all()
        else:
            blocks, largest = error.view(-1, 64).amax(1), true.abs().view(-1, 64).amax(1)
            assert (blocks <= largest * (0.152 + 0.01)).all()
        assert error.max() > 0 and few.weights[module] == tuple(true.shape)


@BOTH
@pytest.mark.parametrize("pooler", ["frozen", "trained"])
def test_what_federates_whole_is_held_whole(tiny_base, quantize, pooler):
    few = load(tiny_base, quantize, pooler=pooler)
    assert quantized.is_held(of(few, "bert.encoder.layer.1.output.dense"))
    assert not quantized.is_held(of(few, "classifier").modules_to_save["default"])
    names = {n for n in few.layout if "pooler" in n}
    assert len(names) == (2 if pooler == "trained" else 0)


@BOTH
def test_a_language_model_keeps_its_head_in_full(tiny_lm, quantize):
    few = load(tiny_lm, quantize, "causal_lm", ("q_proj", "v_proj"))
    assert type(of(few, "lm_head")) is torch.nn.Linear and quantized.is_held(of(few, "model.layers.0.mlp.up_proj"))


@BOTH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_example_s_gradient_is_its_own_whoever_is_beside_it(build, quantize, precision):
    """What clipping rests on. A token is a hundred times as large as others: LLM.int8() would treat all by it."""
    worker = build(f"model.quantize={quantize}", f"engine.precision={precision}")
    task, part = worker.task, worker.dataset.partition(0)
    assert task.packing is not None and len(task.low_rank.layers) == 4
    names, rng = tuple(sorted(task.layout)), np.random.default_rng(0)
    adapter = {n: (0.3 * rng.normal(size=task.layout[n].shape)).astype(np.float32) for n in names}
    rows = part.rows[:5]
    huge = int(task.batch(part.examples, rows[:1])["input_ids"][0, 1])
    task.model.get_base_model().bert.embeddings.word_embeddings.weight.data[huge] *= 100

    def gradients(rows):
        parameters = task.begin(adapter, names)
        hook(task, names)
        backward(task, task.batch(part.examples, rows))
        make_safe(parameters, len(rows))
        return torch.cat([p.grad_sample.flatten(1) for p in parameters], 1)

    together = gradients(rows)
    alone = torch.cat([gradients(rows[i : i + 1]) for i in range(5)])
    error = (together - alone).norm(dim=1) / alone.norm(dim=1)
    assert float(error.max()) < (1e-5 if precision == "fp32" else 2e-2)


@BOTH
def test_evaluation_is_the_same_before_and_after_training_in_half_precision(build, quantize):
    """Nothing is cast for good, so that a worker's past does not show."""
    worker = build(f"model.quantize={quantize}", "engine.precision=bf16", "seed=5")
    task, part, names = worker.task, worker.dataset.partition(0), tuple(sorted(worker.task.layout))
    before = task.evaluate(task.initial, part.examples, part.rows[:8])
    print_before = task.base_fingerprint()
    task.begin(task.initial, names)
    with task.autocast():
        task.losses(task.batch(part.examples, part.rows[:8])).sum().backward()
    assert task.evaluate(task.initial, part.examples, part.rows[:8]) == before
    assert task.base_fingerprint() == print_before


@BOTH
def test_a_base_is_told_by_its_scales_too(tiny_base, tmp_path, quantize):
    """Doubled weights have the same codes."""
    from transformers import AutoModel, AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tiny_base)
    for parameter in model.encoder.parameters():
        parameter.data *= 2
    model.save_pretrained(tmp_path)
    one, other = load(tiny_base, quantize), load(str(tmp_path), quantize)
    module = next(iter(one.weights))
    torch.testing.assert_close(other.weight(module), 2 * one.weight(module))
    assert one.base_fingerprint() != other.base_fingerprint()


@BOTH
def test_a_private_run_and_its_adapter_in_plain_peft(tiny, tiny_base, tmp_path, quantize):
    from transformers import AutoModelForSequenceClassification

    run = simulate(tiny(f"model.quantize={quantize}"), out=tmp_path / "alone")
    again = simulate(tiny(f"model.quantize={quantize}", "engine.fused=4"), out=tmp_path / "fused")
    assert run.summary["epsilon"] <= 8 and np.isfinite(run.rounds[-1]["loss"])
    assert again.rounds[-1]["loss"] == pytest.approx(run.rounds[-1]["loss"], rel=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    PeftModel.from_pretrained(base, run.folder / "adapter")


def test_the_core_of_lora_xs_starts_from_the_held_weights(tiny, tmp_path):
    run = simulate(
        tiny("model.quantize=4bit", "strategy.use=fed_sb", "model.adapter.kind=auto"), out=tmp_path / "run"
    )
    assert np.isfinite(run.rounds[-1]["loss"])


@pytest.mark.parametrize("strategy", ["fedex_lora", "flora"])
def test_what_would_be_added_to_held_weights_is_refused_before_the_run(tiny, tmp_path, strategy):
    with pytest.raises(UserError, match=r"adds to the frozen weights: leave it out, or take one"):
        simulate(tiny("model.quantize=4bit", f"strategy.use={strategy}"), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_merge_is_refused_where_a_strategy_did_not_say(tiny_base):
    few = load(tiny_base, "8bit")
    with pytest.raises(SettingError, match="merges into the frozen weights"):
        few.merge({})


def test_loading_says_nothing(tiny_base):
    code = (
        "import sys; from fedlora.tasks import loading; from fedlora.kinds.lora import Lora; "
        "kind, base = Lora(4, 8, ('query',)), sys.argv[1]; "
        "loading.load('classification', base, kind, labels=['a', 'b'], seed=3, quantize='4bit', max_length=64)"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_base], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.gpu
@BOTH
def test_on_a_gpu_gradients_are_those_of_a_cpu(tiny_base, quantize):
    """To the little that the two round differently."""
    found = []
    for device in ("cpu", "cuda"):
        few = load(tiny_base, quantize, device=device)
        few.begin(few.initial, tuple(few.layout))
        tokens = {
            "input_ids": torch.tensor([[101, 2023, 102]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
        }
        batch = {k: v.to(device) for k, v in {**tokens, "targets": torch.tensor([1])}.items()}
        few.losses(batch).sum().backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in few.parameters.values() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
