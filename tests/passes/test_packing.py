import logging
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora.errors import ContractError
from fedlora.kinds.lora import Lora
from fedlora.passes import packing
from fedlora.passes.packing import Packing, Segments
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.loading import build as built

LENGTHS = (7, 3, 11, 1)
ENCODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
    "num_labels": 3,
    "pad_token_id": 1,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "use_cache": False, "bos_token_id": 0, "eos_token_id": 2}
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 1}
GPT2 = {
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "use_cache": False,
}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}

MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**ENCODER)), "query"),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)), "query"),
    "electra": (lambda: ElectraForSequenceClassification(ElectraConfig(**ENCODER)), "query"),
    "distilbert": (lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT, **QUIET)), "q_lin"),
    "llama-classifier": (lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER)), "q_proj"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), "q_proj"),
    "llama-head": (lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), "lm_head"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **STILL)), "c_attn"),
}


def make(name):
    torch.manual_seed(0)
    build, target = MODELS[name]
    model = build().eval()
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        return built(CausalLM, model, Lora(4, 8, (target,)), heads={}, seed=3, pad=1)
    heads = {n: True for n, _ in model.named_children() if n != model.base_model_prefix and "drop" not in n}
    return built(Classification, model, Lora(4, 8, (target,)), heads=heads, seed=3, pad=1)


def ragged(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    ids, mask = np.ones((len(lengths), max(lengths)), np.int64), np.zeros((len(lengths), max(lengths)), np.int64)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = rng.integers(5, 99, n), 1
    arrays = {"input_ids": ids, "attention_mask": mask, "targets": np.zeros(len(lengths), np.int64)}
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def gradients(task, batch):
    parameters = task.begin(away(task), sorted(task.layout))
    task.losses(batch).sum().backward()
    return torch.cat([p.grad.flatten() for p in parameters])


def away(task):
    """An adapter away from B = 0, so that A has a gradient too."""
    rng = np.random.default_rng(1)
    return {n: (0.1 * rng.normal(size=s.shape)).astype(np.float32) for n, s in task.layout.items()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_row_and_its_batch_hold_the_same_tokens(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    segments = Segments(mask)
    row = segments.row(batch)
    assert row.tolist() == [[v for line, n in zip(batch.tolist(), lengths, strict=True) for v in line[:n]]]
    assert torch.equal(segments.batch(row), batch)
    assert segments.positions.tolist() == [[p for n in lengths for p in range(n)]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short", [0, 256], ids=["fused", "products"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_is_that_of_each_example_by_itself(causal, short, key_heads):
    lengths = (3, 1, 5)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 8, generator=generator) for h in (4, key_heads, key_heads))
    segments = Segments(torch.arange(5) < torch.tensor(lengths)[:, None])
    with mock.patch.object(packing, "_SHORT", short):
        out, _ = packing.attention(None, q, k, v, None, segments=segments, is_causal=causal)
    start = 0
    for n in lengths:
        here = slice(start, start + n)
        for head in range(4):
            of = head * key_heads // 4
            scores = q[0, head, here] @ k[0, of, here].T / 8**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(out[0, here, head], scores.softmax(-1) @ v[0, of, here])
        start += n


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's layers
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_with_and_without_padding(name):
    task = make(name)
    assert task.packing is not None
    batch = ragged()
    logits, packed = task.logits(batch), gradients(task, batch)
    assert any(p.requires_grad for p in task.model.parameters())
    task.begin({}, ())
    task.packing.remove()
    task.packing = None
    torch.testing.assert_close(logits, task.logits(batch), rtol=1e-5, atol=1e-5)
    padded = gradients(task, batch)
    assert float((packed - padded).norm() / padded.norm()) < 1e-5


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "llama-classifier"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=2, max_size=5), which=st.integers(0, 4))
def test_nothing_crosses_from_one_example_to_another(models, name, lengths, which):
    task, which = models(name), which % len(lengths)
    task.begin({}, ())
    one, other = ragged(lengths), ragged(lengths)
    other["input_ids"][which] = ragged(lengths, seed=1)["input_ids"][which]
    with torch.no_grad():
        same = task.losses(one) == task.losses(other)
    assert same.tolist() == [i != which for i in range(len(lengths))]


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, make(name))


def test_only_real_tokens_pass_through_the_layers(models):
    task = models("bert")
    layer = task.packing._body.encoder.layer
    seen = []
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape))) for m in layer]
    task.losses(ragged())
    for handle in handles:
        handle.remove()
    assert seen == [(1, sum(LENGTHS), 32), (1, len(LENGTHS), 32)]  # the last layer is cut to the pooled tokens


def test_only_scored_tokens_reach_the_vocabulary(models):
    batch = ragged((7, 3))
    batch["targets"] = torch.tensor([4, 0])  # tokens 4, 5, 6 and 1, 2
    assert models("llama").logits(batch).shape == (5, 99)


def test_a_row_of_another_pass_is_refused(models):
    task = models("bert")
    task.losses(ragged())
    assert task.packing.segments(torch.zeros(1, sum(LENGTHS), 2)).lengths == list(LENGTHS)
    assert task.packing.segments(torch.zeros(1, 4, 2)).lengths == [1, 1, 1, 1]
    assert task.packing.segments(torch.zeros(4, 2)) is None
    with pytest.raises(ContractError, match="a row of 5 tokens"):
        task.packing.segments(torch.zeros(1, 5, 2))


def test_a_model_that_reads_padding_in_its_own_way_is_padded(caplog):
    torch.manual_seed(0)
    model = DebertaForSequenceClassification(DebertaConfig(**ENCODER, relative_attention=True, type_vocab_size=0))
    with caplog.at_level(logging.WARNING):
        task = built(
            Classification, model.eval(), Lora(4, 8, ("in_proj",)), heads={"classifier": True}, seed=3, pad=1
        )
    assert task.packing is None and [r.name for r in caplog.records].count("fedlora.passes.alone") == 1
    task.begin({}, ())
    alone = {k: v[:1, :7] if v.dim() > 1 else v[:1] for k, v in ragged().items()}
    torch.testing.assert_close(task.losses(ragged())[:1], task.losses(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window, packs", [(64, True), (63, False), (None, True)])
def test_a_model_that_attends_within_a_window_is_padded(window, packs, caplog):
    model = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=window))
    task = built(CausalLM, model.eval(), Lora(4, 8, ("q_proj",)), heads={}, seed=3, pad=1, max_length=64)
    assert (task.packing is not None) is packs and ("within a window" in caplog.text) is not packs


def test_a_body_that_packs_can_be_let_go(models):
    body = BertForSequenceClassification(BertConfig(**ENCODER)).bert
    before = body.config._attn_implementation
    Packing(body, unpack=True, cut=True).remove()
    assert body.config._attn_implementation == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in body.modules())
