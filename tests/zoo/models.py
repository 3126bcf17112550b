"""Tiny random models of many kinds, and what plain transformers and peft make of one example at a time."""

import copy

import numpy as np
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from fedlora.adapter import PREFIX, Lora
from fedlora.data import Examples
from fedlora.task import CausalLM, Classification

VOCABULARY, PAD = 99, 1
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_labels": 3,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**BASE, **STILL}
DECODER = {**BASE, "num_key_value_heads": 1, "use_cache": False, "attention_dropout": 0.0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
DEBERTA3 = {
    **RELATIVE,
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD, "num_labels": 3, "use_cache": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
DISTIL = {
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3,
    "max_position_embeddings": 64, "initializer_range": 0.3, "dropout": 0.0, "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0, "pad_token_id": PAD,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": PAD, "num_labels": 3,
    "use_cache": False,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3,
    "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "num_labels": 3, "use_cache": False,
}  # fmt: skip

MODELS = {
    "bert": ("BertForSequenceClassification", ENCODER, ("query", "value")),
    "roberta": ("RobertaForSequenceClassification", {**ENCODER, "type_vocab_size": 1}, ("query", "value")),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL, ("q_lin", "v_lin")),
    "deberta-v1": (
        "DebertaForSequenceClassification",
        {**ENCODER, **RELATIVE, "type_vocab_size": 0, "max_relative_positions": 16},
        ("in_proj", "pos_proj"),
    ),
    "deberta-v3": ("DebertaV2ForSequenceClassification", {**ENCODER, **DEBERTA3}, ("query_proj", "key_proj", "value_proj")),
    "albert": ("AlbertForSequenceClassification", {**ENCODER, "embedding_size": 16}, ("query", "value")),
    "electra": ("ElectraForSequenceClassification", {**ENCODER, "embedding_size": 16}, ("query", "value")),
    "mpnet": ("MPNetForSequenceClassification", ENCODER, ("q", "v")),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**BASE, "cls_token_id": 0, "sep_token_id": 2, "global_attn_every_n_layers": 1, "initializer_cutoff_factor": 9.0},
        ("Wqkv", "Wo"),
    ),
    "gpt2": ("GPT2ForSequenceClassification", GPT2, ("c_attn",)),
    "gpt-neox": ("GPTNeoXForSequenceClassification", {**BASE, "use_cache": False}, ("query_key_value",)),
    "gpt-neo": (
        "GPTNeoForSequenceClassification",
        {**BASE, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "use_cache": False,
         "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "window_size": 32},
        ("q_proj", "v_proj"),
    ),
    "opt": (
        "OPTForSequenceClassification",
        {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0, "use_cache": False},
        ("q_proj", "v_proj"),
    ),
    "opt-flat": (
        "OPTForSequenceClassification",
        {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0, "use_cache": False},
        ("fc1",),
    ),
    "bloom": (
        "BloomForSequenceClassification",
        {**BASE, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False},
        ("query_key_value",),
    ),
    "falcon": (
        "FalconForSequenceClassification",
        {**BASE, "alibi": False, "new_decoder_architecture": False, "multi_query": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False},
        ("query_key_value",),
    ),
    "falcon-alibi": (
        "FalconForSequenceClassification",
        {**BASE, "alibi": True, "new_decoder_architecture": False, "multi_query": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False},
        ("query_key_value",),
    ),
    "mpt": ("MptForSequenceClassification", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "pad_token_id": PAD, "num_labels": 3, "use_cache": False, "initializer_range": .3}, ("Wqkv",)),
    "llama": ("LlamaForSequenceClassification", DECODER, ("q_proj", "v_proj")),
    "llama-lm": ("LlamaForCausalLM", DECODER, ("q_proj", "down_proj")),
    "mistral": ("MistralForSequenceClassification", {**DECODER, "sliding_window": 16}, ("q_proj", "v_proj")),
    "qwen2": ("Qwen2ForCausalLM", DECODER, ("q_proj", "v_proj")),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}, ("q_proj", "v_proj")),
    "gemma": ("GemmaForSequenceClassification", {**DECODER, "head_dim": 16}, ("q_proj", "v_proj")),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 16}, ("q_proj", "v_proj")),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, "head_dim": 16}, ("q_proj", "v_proj")),
    "gpt2-lm": ("GPT2LMHeadModel", GPT2, ("c_attn",)),
    "opt-lm": (
        "OPTForCausalLM",
        {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0, "use_cache": False},
        ("q_proj", "v_proj"),
    ),
    "bloom-lm": (
        "BloomForCausalLM",
        {**BASE, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False},
        ("query_key_value",),
    ),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, ("q_proj", "v_proj")),
    "qwen-moe": ("Qwen2MoeForCausalLM", {**DECODER, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}, ("q_proj", "v_proj")),
    "qwen-moe-shared": ("Qwen2MoeForCausalLM", {**DECODER, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}, ("shared_expert.gate_proj",)),
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "use_cache": False, "initializer_range": .3}, ("in_proj",)),
    "phi3": ("Phi3ForCausalLM", {**DECODER, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, ("qkv_proj",)),
    "t5": ("T5ForSequenceClassification", T5, ("q", "v")),
    "bart": ("BartForSequenceClassification", BART, ("q_proj", "v_proj")),
    "xlnet": ("XLNetForSequenceClassification", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": PAD, "dropout": 0.0, "summary_last_dropout": 0.0, "num_labels": 3, "initializer_range": .3}, ("layer_1",)),
    "funnel": ("FunnelForSequenceClassification", {"vocab_size": VOCABULARY, "d_model": 32, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64, "pad_token_id": PAD, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "num_labels": 3, "initializer_std": 0.3}, ("q_head", "v_head")),
    "convbert": ("ConvBertForSequenceClassification", {**ENCODER, "embedding_size": 32, "head_ratio": 1, "num_groups": 1}, ("query", "value")),
    "mobilebert": ("MobileBertForSequenceClassification", {**ENCODER, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, ("query", "value")),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**ENCODER, "embedding_size": 32, "q_groups": 1}, ("classifier",)),
    "bigbird": ("BigBirdForSequenceClassification", {**ENCODER, "block_size": 4, "num_random_blocks": 1}, ("query", "value")),
    "longformer": ("LongformerForSequenceClassification", {**ENCODER, "attention_window": 8}, ("query", "value")),
    "nystromformer": ("NystromformerForSequenceClassification", {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 64}, ("query", "value")),
    "fnet": ("FNetForSequenceClassification", {**ENCODER}, ("dense",)),
    "roformer": ("RoFormerForSequenceClassification", {**ENCODER, "embedding_size": 32}, ("query", "value")),
    "rembert": ("RemBertForSequenceClassification", {**ENCODER, "input_embedding_size": 32, "output_embedding_size": 32}, ("query", "value")),
    "ibert": ("IBertForSequenceClassification", ENCODER, ("query", "value")),
    "megatron": ("MegatronBertForSequenceClassification", ENCODER, ("query", "value")),
    "codegen": ("CodeGenForCausalLM", {**GPT2, "rotary_dim": 8}, ("qkv_proj",)),
    "gptj": ("GPTJForSequenceClassification", {**GPT2, "rotary_dim": 8}, ("q_proj", "v_proj")),
    "stablelm": ("StableLmForCausalLM", {**DECODER, "hidden_dropout": 0.0}, ("q_proj", "v_proj")),
    "cohere": ("CohereForCausalLM", DECODER, ("q_proj", "v_proj")),
    "olmo2": ("Olmo2ForCausalLM", DECODER, ("q_proj", "v_proj")),
    "granite": ("GraniteForCausalLM", DECODER, ("q_proj", "v_proj")),
    "smollm3": ("SmolLM3ForCausalLM", DECODER, ("q_proj", "v_proj")),
    "starcoder2": ("Starcoder2ForCausalLM", {**DECODER, "residual_dropout": 0.0, "embedding_dropout": 0.0}, ("q_proj", "v_proj")),
    "phi": ("PhiForSequenceClassification", {**DECODER, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, ("q_proj", "v_proj")),
    "bigcode": ("GPTBigCodeForSequenceClassification", GPT2, ("c_attn",)),
}  # fmt: skip


def plain(name):
    """The model as transformers builds it, in evaluation mode, and the names that factors go beside."""
    kind, told, targets = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(hf, kind)
    model = cls(cls.config_class(**told)).eval()
    return model, targets


def make(name, *, private=False, max_length=32, **more):
    """The task, and a copy of the model for `singles`."""
    model, targets = plain(name)
    apart = copy.deepcopy(model)
    if "CausalLM" in MODELS[name][0] or "LMHead" in MODELS[name][0]:
        cls, heads = CausalLM, {}
    else:
        cls = Classification
        heads = {
            n: True
            for n, m in model.named_children()
            if n != model.base_model_prefix and any(True for _ in m.parameters())
        }
    kind = Lora(4, 8, targets)
    told = {
        "heads": heads,
        "seed": 3,
        "pad": PAD,
        "special": (0, 1, 2),
        "max_length": max_length,
        "private": private,
    }
    task = cls(model, kind, **{**told, **more})
    inside = [n for n, _ in apart.named_modules() if any(f".{h}." in f".{n}." for h in heads)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), exclude_modules=inside or None,
                        modules_to_save=list(heads) or None, task_type=cls.task_type)  # fmt: skip
    return task, get_peft_model(apart, config).eval()


def away(task):
    """An adapter away from B = 0, so that A has a gradient too."""
    rng = np.random.default_rng(1)
    return {n: (t + 0.1 * rng.normal(size=t.shape)).astype(np.float32) for n, t in sorted(task.initial.items())}


def texts(lengths, ends=False, seed=0, targets=None):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCABULARY, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    if ends:
        tokens[offsets[1:] - 1] = 2
    return Examples(tokens, offsets, np.zeros(len(lengths), np.int64) if targets is None else targets)


def singles(task, model, examples, adapter):
    """The loss of each example, (examples,), and its gradient over all tensors, (examples, numbers)."""
    named = {
        n.replace(".modules_to_save.default.", ".").replace(".default.", "."): p
        for n, p in model.named_parameters()
    }
    with torch.no_grad():
        for name, value in adapter.items():
            named[name].copy_(torch.from_numpy(value))
    model.requires_grad_(False)
    parameters = [named[name].requires_grad_() for name in sorted(task.layout)]
    losses, gradients = [], []
    for i in range(len(examples)):
        ids = torch.from_numpy(examples.row(i).astype(np.int64))[None]
        told = {}
        if examples.types is not None:
            told["token_type_ids"] = torch.from_numpy(examples.types_of(i).astype(np.int64))[None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **told).logits
        if task.pools:
            loss = torch.nn.functional.cross_entropy(out, torch.from_numpy(examples.targets[i : i + 1]))
        else:
            loss = torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:])
        losses.append(float(loss))
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters)])
        )
    return torch.tensor(losses), torch.stack(gradients)
