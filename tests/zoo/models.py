"""Tiny random models of many kinds, and what plain transformers and peft make of one example at a time."""

import copy

import numpy as np
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from fedlora.data.store import Examples
from fedlora.kinds.contract import public as _public
from fedlora.kinds.lora import Lora
from fedlora.passes import pooled
from fedlora.reports.card import MEAN
from fedlora.tasks.base_model import heads_of as _heads
from fedlora.tasks.base_model import quiet_config
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.loading import build

VOCABULARY, PAD = 99, 1
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "num_labels": 3}
BASE = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide, so that a random model tells texts apart
}
SMALL = {**BASE, "embedding_size": 16}
EVEN = {**BASE, "embedding_size": 32}
DECODER = {**BASE, "num_key_value_heads": 1}
WIDE = {**DECODER, "head_dim": 16}
RELATIVE = {**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
DEBERTA3 = {"position_biased_input": False, "position_buckets": 8, "share_att_key": True}
MODERN = {"cls_token_id": 0, "sep_token_id": 2, "global_attn_every_n_layers": 1, "initializer_cutoff_factor": 9.0}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
NEO = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 32}
NEO["max_position_embeddings"] = 600  # more than a packed row has
OPT = {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
SLOPES = {**BASE, "n_layer": 2, "n_head": 2, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
FALCON = {**BASE, "new_decoder_architecture": False, "multi_query": False}
DISTIL = {**BASE, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
T5 = {
    **TOKENS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": PAD,
}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3}
BART = {**BASE, **LAYERS, "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
EXPERTS = {
    **DECODER,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
LLAMA4 = {**EXPERTS, "intermediate_size_mlp": 64, "head_dim": 16, "attention_chunk_size": 64}
EYES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {
    "text_config": WIDE,
    "vision_config": EYES,
    "mm_tokens_per_image": 4,
    "num_labels": 3,
    "pad_token_id": PAD,
}
MOBILE = {**BASE, "intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
LFM2 = {**DECODER, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 64}
OSS = {**EXPERTS, "head_dim": 16, "layer_types": ["full_attention"] * 2}
XLNET = {**TOKENS, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "initializer_range": 0.3}
QV, ATTENTION = ("query", "value"), ("q_proj", "v_proj")

# What trains, private or not; the class, its configuration, and the layers that get factors.
FIT = {
    "bert": ("BertForSequenceClassification", BASE, QV),
    "roberta": ("RobertaForSequenceClassification", {**BASE, "type_vocab_size": 1}, QV),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL, ("q_lin", "v_lin")),
    "deberta-v1": ("DebertaForSequenceClassification", RELATIVE, ("in_proj", "pos_proj")),
    "deberta-v3": ("DebertaV2ForSequenceClassification", {**RELATIVE, **DEBERTA3}, ("query_proj", "key_proj")),
    "deberta-v2": ("DebertaV2ForSequenceClassification", RELATIVE, ("query_proj", "pos_key_proj")),
    "albert": ("AlbertForSequenceClassification", SMALL, QV),
    "electra": ("ElectraForSequenceClassification", SMALL, QV),
    "mpnet": ("MPNetForSequenceClassification", BASE, ("q", "v")),
    "modernbert": ("ModernBertForSequenceClassification", {**BASE, **MODERN}, ("Wqkv", "Wo")),
    "roformer": ("RoFormerForSequenceClassification", EVEN, QV),
    "gpt2": ("GPT2ForSequenceClassification", GPT2, ("c_attn",)),
    "gpt2-lm": ("GPT2LMHeadModel", GPT2, ("c_attn",)),
    "gpt-neox": ("GPTNeoXForSequenceClassification", BASE, ("query_key_value",)),
    "gpt-neo": ("GPTNeoForSequenceClassification", {**BASE, **NEO}, ATTENTION),
    "gptj": ("GPTJForSequenceClassification", {**GPT2, "rotary_dim": 8}, ATTENTION),
    "opt": ("OPTForSequenceClassification", OPT, ATTENTION),
    "opt-lm": ("OPTForCausalLM", OPT, ATTENTION),
    "bloom": ("BloomForSequenceClassification", SLOPES, ("query_key_value",)),
    "bloom-lm": ("BloomForCausalLM", SLOPES, ("query_key_value",)),
    "falcon": ("FalconForSequenceClassification", {**FALCON, "alibi": False}, ("query_key_value",)),
    "falcon-alibi": ("FalconForSequenceClassification", {**FALCON, "alibi": True}, ("query_key_value",)),
    "mpt": ("MptForSequenceClassification", SLOPES, ("Wqkv",)),
    "llama": ("LlamaForSequenceClassification", DECODER, ATTENTION),
    "llama-lm": ("LlamaForCausalLM", DECODER, ("q_proj", "down_proj")),
    "mistral": ("MistralForSequenceClassification", {**DECODER, "sliding_window": 16}, ATTENTION),
    "mistral-long": ("MistralForCausalLM", {**DECODER, "sliding_window": None}, ATTENTION),
    "qwen2": ("Qwen2ForCausalLM", DECODER, ATTENTION),
    "qwen3": ("Qwen3ForCausalLM", WIDE, ATTENTION),
    "gemma": ("GemmaForSequenceClassification", WIDE, ATTENTION),
    "gemma2": ("Gemma2ForCausalLM", WIDE, ATTENTION),
    "gemma3": ("Gemma3ForCausalLM", WIDE, ATTENTION),
    "phi": ("PhiForSequenceClassification", DECODER, ATTENTION),
    "phi3": ("Phi3ForCausalLM", DECODER, ("qkv_proj",)),
    "stablelm": ("StableLmForCausalLM", DECODER, ATTENTION),
    "granite": ("GraniteForCausalLM", DECODER, ATTENTION),
    "mixtral": ("MixtralForCausalLM", EXPERTS, ATTENTION),
    "qwen-moe": ("Qwen2MoeForCausalLM", SHARED, ATTENTION),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {**BASE, "type_vocab_size": 1}, QV),
    "camembert": ("CamembertForSequenceClassification", {**BASE, "type_vocab_size": 1}, QV),
    "mobilebert": ("MobileBertForSequenceClassification", MOBILE, QV),
    "ernie": ("ErnieForSequenceClassification", BASE, QV),
    "llama-tied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, ("q_proj", "lm_head")),
    "llama-unpadded": ("LlamaForSequenceClassification", {**DECODER, "pad_token_id": None}, ATTENTION),
    "llama-last-pad": ("LlamaForSequenceClassification", {**DECODER, "pad_token_id": -1}, ATTENTION),
    "llama4": ("Llama4ForCausalLM", LLAMA4, ATTENTION),
    "gemma3-vision": ("Gemma3ForSequenceClassification", GEMMA3, ATTENTION),
    "cohere2": ("Cohere2ForCausalLM", WIDE, ATTENTION),
    "olmo2": ("Olmo2ForCausalLM", DECODER, ATTENTION),
    "smollm3": ("SmolLM3ForCausalLM", DECODER, ATTENTION),
    "starcoder2": ("Starcoder2ForCausalLM", DECODER, ATTENTION),
    "gpt-oss": ("GptOssForCausalLM", OSS, ATTENTION),
    "lfm2": ("Lfm2ForCausalLM", LFM2, ("q_proj", "in_proj")),
    "mamba": ("MambaForCausalLM", MAMBA, ("in_proj",)),
    "t5": ("T5ForSequenceClassification", T5, ("q", "v")),
    "bart": ("BartForSequenceClassification", {**BART, "decoder_start_token_id": 2}, ATTENTION),
}
# What is refused under privacy, and why; without it the first are right and the last are warned about.
UNFIT = {
    "flattened": ("OPTForSequenceClassification", OPT, ("fc1",), "fc1 runs on"),
    "expert": ("Qwen2MoeForCausalLM", SHARED, ("shared_expert.gate_proj",), "gate_proj runs on"),
    "sideways": ("LongformerForSequenceClassification", {**BASE, "attention_window": 8}, QV, "query runs on"),
    "left": ("XLNetForSequenceClassification", XLNET, ("layer_1",), "depends on its padding"),
    "convolves": ("ConvBertForSequenceClassification", {**EVEN, "head_ratio": 1}, QV, "depends on its padding"),
    "unmasked": ("FNetForSequenceClassification", BASE, ("dense",), "depends on its padding"),
    "switches": (
        "BigBirdForSequenceClassification",
        {**BASE, "block_size": 4, "num_random_blocks": 1},
        QV,
        "depends on",
    ),
}
EXCLUDED = {"gemma3-vision": ("vision_tower",)}
MODELS = FIT | {name: told[:3] for name, told in UNFIT.items()}


def plain(name, **changes):
    """The model as transformers builds it, without dropout and in evaluation mode."""
    kind, told, _ = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(hf, kind)
    config = cls.config_class(**{**told, **changes})
    quiet_config(config)
    return cls(config).eval()


def decodes(name):
    """Whether a model writes, and does not classify."""
    return "CausalLM" in MODELS[name][0] or "LMHead" in MODELS[name][0]


def make(name, *, max_length=32, changes=(), layers=None, pooling=None, **more):
    """The task, and the same model with factors by peft alone, for `singles`."""
    model, targets, excluded = plain(name, **dict(changes)), MODELS[name][2], EXCLUDED.get(name, ())
    pooled.tell(model.config, pooling)
    copied = copy.deepcopy(model)
    pooled.pool(model, pooling)
    if pooling == "mean" and not pooled.known(model.config):
        exec(MEAN, {"base": copied})
    model.config.get_text_config().pad_token_id = PAD  # as loading a base has it
    heads = {} if decodes(name) else dict.fromkeys(_heads(model), True)
    told = {"heads": heads, "seed": 3, "pad": PAD, "special": (0, 1, 2), "max_length": max_length, **more}
    kind = Lora(4, 8, targets, layers, excluded)
    task = build(CausalLM if decodes(name) else Classification, model, kind, **told)
    inside = [n for n, _ in copied.named_modules() if any(f".{h}." in f".{n}." for h in (*heads, *excluded))]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(targets),
        layers_to_transform=layers,
        exclude_modules=inside or None,
        modules_to_save=list(heads) or None,
        task_type=task.task_type,
    )
    return task, get_peft_model(copied, config).eval()


def away(task):
    """An adapter away from B = 0, so that A has a gradient too."""
    rng = np.random.default_rng(1)
    return {n: (t + 0.1 * rng.normal(size=t.shape)).astype(np.float32) for n, t in sorted(task.initial.items())}


def texts(lengths, ends=False, seed=0):
    """Random examples; `ends`: each with the token that an encoder-decoder pools at."""
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    if ends:
        tokens[offsets[1:] - 1] = 2
    return Examples(tokens, offsets, np.zeros(len(lengths), np.int64))


def singles(task, model, examples, adapter):
    """The loss of each example, (examples,), and its gradient over all tensors, (examples, numbers)."""
    named = {_public(n): p for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in adapter.items():
            named[name].copy_(torch.from_numpy(value))
    model.requires_grad_(False)
    parameters = [named[name].requires_grad_() for name in sorted(task.layout)]
    losses, gradients = [], []
    for i in range(len(examples)):
        if task.tokens:
            ids = torch.from_numpy(examples.row(i).astype(np.int64))[None]
            told = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            told = {"pixel_values": task.batch(examples, np.array([i]))["pixel_values"]}
        if examples.types is not None:
            told["token_type_ids"] = torch.from_numpy(examples.types_of(i).astype(np.int64))[None]
        out = model(**told).logits
        rows, aims = (
            (out, torch.from_numpy(examples.targets[i : i + 1])) if task.pools else (out[0, :-1], ids[0, 1:])
        )
        losses.append(torch.nn.functional.cross_entropy(rows, aims))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses[-1], parameters)]))
    return torch.stack(losses).detach(), torch.stack(gradients)


def privately(task, adapter, examples):
    """The same gradients as a private client's pass over all of them makes them."""
    from fedlora.passes.gradients import apart

    names = tuple(sorted(task.layout))
    made = apart(task, adapter, names, task.batch(examples, np.arange(len(examples))))
    return torch.cat([g.flatten(1) for g in made], 1)
