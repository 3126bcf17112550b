import dataclasses
import shutil

import numpy as np
import pytest
import torch

from fedlora import seeding
from fedlora.data.reading import Rows
from fedlora.data.store import Examples
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.lora import Lora
from fedlora.tasks import base_model, loading
from fedlora.tasks.causal_lm import CausalLM, _answer
from fedlora.tasks.classification import Classification

LABELS = ("bad", "good")


def load(base, kind="classification", targets=("query", "value"), max_length=64, **more):
    return loading.load(kind, base, Lora(4, 8, targets), labels=LABELS, seed=3, max_length=max_length, **more)


def examples(sequences, targets):
    offsets = np.cumsum([0, *map(len, sequences)])
    return Examples(np.concatenate(sequences).astype(np.int32), offsets, np.array(targets, np.int64))


@pytest.fixture(scope="module")
def tiny_task(tiny_base):
    return load(tiny_base)


@pytest.fixture(scope="module")
def ragged():
    rng = np.random.default_rng(0)
    return examples([rng.integers(5, 3000, n) for n in (3, 12, 7, 5, 9, 4)], [0, 1, 1, 0, 1, 0])


def test_the_layout_names_every_tensor_as_peft_saves_it(tiny_task, tmp_path):
    from safetensors.numpy import load_file

    tiny_task.model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: s.shape for n, s in tiny_task.layout.items()}
    roles = [s.role for s in tiny_task.layout.values()]
    assert (roles.count("A"), roles.count("B"), roles.count("head")) == (4, 4, 2)


def test_dropout_is_off_in_training(tiny_task, ragged):
    tiny_task.begin({}, list(tiny_task.layout))
    batch = tiny_task.batch(ragged, np.arange(6))
    torch.testing.assert_close(tiny_task.losses(batch), tiny_task.losses(batch), rtol=0, atol=0)
    assert tiny_task.model.training


def test_an_examples_loss_does_not_depend_on_its_batch(tiny_task, ragged):
    tiny_task.begin({}, ())
    together = tiny_task.losses(tiny_task.batch(ragged, np.arange(6)))
    alone = torch.cat([tiny_task.losses(tiny_task.batch(ragged, np.array([i]))) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_micro_batches_hold_each_row_once_and_like_lengths_together(tiny_task, ragged):
    parts = list(tiny_task.micro_batches(ragged, np.array([5, 1, 3, 0]), 2))
    assert [rows.tolist() for _, rows in parts] == [[0, 5], [3, 1]]
    assert parts[0][0]["input_ids"].shape == (2, 4)
    sizes = [[len(part) for _, part in tiny_task.micro_batches(ragged, np.arange(n), 4)] for n in (0, 5, 6)]
    assert sizes == [[], [5], [3, 3]]


def test_begin_leaves_nothing_of_the_client_before(tiny_task):
    name = next(n for n, s in tiny_task.layout.items() if s.role == "B")
    tiny_task.begin({name: np.ones(tiny_task.layout[name].shape, np.float32)}, [name])
    assert tiny_task.read([name])[name].all()
    (parameter,) = tiny_task.begin({}, [name])
    assert not tiny_task.read([name])[name].any()
    assert [p for p in tiny_task.model.parameters() if p.requires_grad] == [parameter]


def test_write_refuses_unknown_names_and_shapes(tiny_task):
    with pytest.raises(ContractError, match="no tensor 'x'"):
        tiny_task.write({"x": np.zeros(1, np.float32)})
    name = next(iter(tiny_task.layout))
    with pytest.raises(ContractError, match="has shape"):
        tiny_task.write({name: np.zeros((1, 1), np.float32)})


def test_evaluation_equals_a_plain_forward_pass(tiny_task, ragged):
    whole = tiny_task.figures(tiny_task.evaluate({}, ragged, np.arange(6)))
    parts = [tiny_task.evaluate({}, ragged, np.arange(a, a + 2)) for a in (0, 2, 4)]
    summed = tiny_task.figures({k: sum(p[k] for p in parts) for k in parts[0]})
    with torch.no_grad():
        losses = tiny_task.losses(tiny_task.batch(ragged, np.arange(6)))
    assert whole["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert summed == pytest.approx(whole, rel=1e-6)


def test_bf16_trains_in_half_and_evaluates_in_full(tiny_base, ragged, tiny_task):
    half = load(tiny_base, precision="bf16")
    parameters = half.begin({}, list(half.layout))
    linear = half.model.base_model.model.bert.encoder.layer[0].intermediate.dense
    assert linear.weight.dtype == torch.bfloat16
    with half.autocast():
        losses = half.losses(half.batch(ragged, np.arange(6)))
    losses.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    assert half.evaluate({}, ragged, np.arange(6)) == tiny_task.evaluate({}, ragged, np.arange(6))
    assert linear.weight.dtype == torch.float32


def test_training_in_bf16_holds_to_its_tolerance(tiny_base, ragged):
    """Losses to 3 %, and the gradient over all tensors to 5 % of its norm, of those in float32."""
    found = []
    for precision in ("fp32", "bf16"):
        made = load(tiny_base, precision=precision)
        rng = np.random.default_rng(1)
        away = {n: (0.1 * rng.normal(size=s.shape)).astype(np.float32) for n, s in made.layout.items()}
        parameters = made.begin(away, list(made.layout))
        with made.autocast():
            losses = made.losses(made.batch(ragged, np.arange(6)))
        losses.sum().backward()
        found.append((losses.detach(), torch.cat([p.grad.flatten() for p in parameters])))
    (full, gradient), (half, rough) = found
    torch.testing.assert_close(half, full, rtol=3e-2, atol=0)
    assert not torch.equal(half, full) and float((rough - gradient).norm() / gradient.norm()) < 5e-2


def test_a_frozen_head_federates_without_training(tiny_base):
    frozen = load(tiny_base, head="frozen")
    assert {s.trainable for s in frozen.layout.values() if s.role == "head"} == {False}
    assert {s.trainable for s in frozen.layout.values() if s.role != "head"} == {True}


def test_a_pooler_trains_when_asked(tiny_base):
    assert any("pooler" in n for n in load(tiny_base, pooler="trained").layout)
    assert not any("pooler" in n for n in load(tiny_base).layout)


def test_no_factors_inside_a_head(tiny_base):
    layout = load(tiny_base, targets=("dense",), pooler="trained").layout
    assert {s.role for n, s in layout.items() if "pooler" in n or "classifier" in n} == {"head"}
    assert any(".output.dense.lora_B" in n for n in layout)
    with pytest.raises(SettingError, match="matches no linear layer"):
        load(tiny_base, targets=("classifier",))


def test_a_target_that_matches_nothing_names_what_there_is(tiny_base):
    with pytest.raises(SettingError, match=r"'q_proj' matches no linear layer .* 'query'") as caught:
        load(tiny_base, targets=("query", "q_proj"))
    assert caught.value.key == "model.adapter.targets"


@pytest.mark.parametrize("what", ["missing", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_or_broken_base_is_one_line(tiny_base, tmp_path, what):
    import shutil

    base = tmp_path / "base"
    if what != "missing":
        shutil.copytree(tiny_base, base)
        (base / what).write_text("{ not what it should be")
    with pytest.raises(SettingError, match=r"model\.base: (cannot load the|no such folder)") as caught:
        load(str(base))
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_name_is_one_line():
    with pytest.raises(SettingError, match="cannot load") as caught:
        load("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


def test_causal_loss_counts_the_completion_alone(tiny_lm):
    lm = load(tiny_lm, "causal_lm", targets=("q_proj", "v_proj"))
    lm.begin({}, ())
    rng = np.random.default_rng(1)
    prompt, answer, longer = rng.integers(5, 3000, 4), rng.integers(5, 3000, 3), rng.integers(5, 3000, 9)
    data = examples([np.concatenate([prompt, answer]), longer], [4, 0])
    with torch.no_grad():
        losses = lm.losses(lm.batch(data, np.arange(2)))
        ids = torch.tensor(np.concatenate([prompt, answer]))[None]
        log = lm.model(input_ids=ids).logits.log_softmax(-1)[0]
    expected = -np.mean([float(log[i - 1, ids[0, i]]) for i in (4, 5, 6)])
    assert float(losses[0]) == pytest.approx(expected, rel=1e-5)
    sums = lm.evaluate({}, data, np.arange(2))
    assert sums["tokens"] == 3 + 8
    assert lm.figures(sums)["perplexity"] == pytest.approx(np.exp(sums["loss"] / 11))


def test_causal_encoding_keeps_the_end_of_a_long_prompt_and_one_scored_token(tiny_lm):
    tokenizer = base_model.load_tokenizer(tiny_lm)
    rows = Rows(["one two three four five six", "short"], ["seven eight", "nine"])
    encoded = CausalLM.encode(tokenizer, rows, (), 6)
    for tokens, start in zip(encoded.tokens, encoded.targets, strict=True):
        assert len(tokens) <= 6 and 0 <= start < len(tokens)
    assert tokenizer.decode(encoded.tokens[0][encoded.targets[0] :]) == "seven eight"
    assert tokenizer.decode(encoded.tokens[1][: encoded.targets[1]]).count("short") == 1


def test_classification_encoding(tiny_base):
    tokenizer = base_model.load_tokenizer(tiny_base)
    encoded = Classification.encode(tokenizer, Rows(["a b c d e f", "g"], ["good", "bad"]), LABELS, 5)
    assert [len(t) for t in encoded.tokens] == [5, 3] and encoded.held.tolist() == [1, 0]


@pytest.mark.parametrize(
    "text, pattern, expected",
    [
        (" seven \n", None, "seven"),
        ("so 3 * 4 = 12\n#### 12", r"#### *(-?[0-9]+)", "12"),
        ("first 5, then 7", r"[0-9]+", "7"),
        ("I do not know", r"#### *([0-9]+)", None),
    ],
)
def test_what_of_an_answer_is_compared(text, pattern, expected):
    assert _answer(text, pattern) == expected


def test_answers_are_written_as_plain_transformers_writes_them_and_compared(tiny_lm):
    """Eleven prompts of unequal lengths; some are given the model's own answer, which then matches."""
    from transformers import AutoModelForCausalLM

    lm, tokenizer = load(tiny_lm, "causal_lm", targets=("q_proj", "v_proj")), base_model.load_tokenizer(tiny_lm)
    plain, rng = AutoModelForCausalLM.from_pretrained(tiny_lm).eval(), np.random.default_rng(2)
    prompts = [rng.integers(1000, 3000, n) for n in (3, 9, 5, 4, 7, 6, 8, 2, 5, 3, 4)]
    own = [
        plain.generate(
            input_ids=torch.tensor(p)[None],
            attention_mask=torch.ones(1, len(p)),
            max_new_tokens=4,
            do_sample=False,
        )[0, len(p) :].numpy()
        for p in prompts
    ]
    given = [answer if i % 2 else answer[::-1] for i, answer in enumerate(own)]
    same = sum(tokenizer.decode(a) == tokenizer.decode(b) for a, b in zip(own, given, strict=True))
    data = examples([np.concatenate(pair) for pair in zip(prompts, given, strict=True)], [len(p) for p in prompts])
    before = lm.evaluate({}, data, np.arange(11))
    assert lm.packing is not None and 5 <= same < 11
    made = lm.match(tokenizer, data, np.arange(11), 4, None)
    assert (made["asked"], made["matched"]) == (11, same) and same <= made["overlap"] <= 11
    assert lm.evaluate({}, data, np.arange(11)) == before  # rows again
    told = lm.figures({"loss": 2.0, "tokens": 1.0, "asked": 4.0, "matched": 3.0, "overlap": 3.5})
    assert (told["exact_match"], told["rouge_l"]) == (0.75, 0.875)


def test_a_chat_template_frames_one_dialogue_and_the_answer_alone_is_scored(tiny_lm):
    tokenizer = base_model.load_tokenizer(tiny_lm)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    encoded = CausalLM.encode(tokenizer, Rows(["two plus two", "one"], ["four", "five"]), (), 32)
    said = [
        (tokenizer.decode(t[:s]), tokenizer.decode(t[s:]))
        for t, s in zip(encoded.tokens, encoded.targets, strict=True)
    ]
    assert [answer.replace(" ", "") for _, answer in said] == [
        f"{w}{tokenizer.eos_token or ''}" for w in ("four", "five")
    ]
    assert all(prompt.count("user") == prompt.count("assistant") == 1 for prompt, _ in said)
    assert "two plus two" in said[0][0] and "two plus two" not in said[1][0]


def test_few_bits_need_what_holds_them(tiny_base, monkeypatch):
    from importlib import util

    known = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else known(name, *a))
    with pytest.raises(SettingError, match=r"needs bitsandbytes: pip install 'fedlora\[quantize\]'") as told:
        load(tiny_base, quantize="4bit")
    assert told.value.key == "model.quantize"


PAIRS = [("the film was fine", "it was lovely indeed"), ("sad", "poor and awful and long"), ("one two", "three")]


@pytest.mark.parametrize("how", ["packed", "padded", "known below", "joined"])
def test_which_text_of_a_pair_a_token_is_of_reaches_the_model(tiny_base, how):
    """Logits are those that plain transformers makes of what the tokenizer gives."""
    from transformers import AutoModelForSequenceClassification

    made, tokenizer = load(tiny_base, max_length=32, private=True), base_model.load_tokenizer(tiny_base)
    if how == "known below":
        upper = Lora(4, 8, ("query",), (1,))
        made = loading.load("classification", tiny_base, upper, labels=LABELS, seed=3, max_length=32)
    encoded = Classification.encode(tokenizer, Rows(PAIRS, ["bad", "good", "bad"]), LABELS, 32)
    data = examples(encoded.tokens, encoded.targets)
    data = dataclasses.replace(data, types=np.concatenate(encoded.types).astype(np.uint8))
    if how == "padded":
        made.packing.remove()
        made.packing = None
    made.begin({}, ())
    rows = np.arange(3)
    if how == "known below":
        row = made.below(data, rows, half=False)[0].numpy()
        made.prefix.kept = lambda examples: row
    with torch.no_grad():
        whole = made.batch(data, rows)
        assert ("prefix" in whole) is (how == "known below")
        logits = made.logits(made.join([made.batch(data, rows[:1]), made.batch(data, rows[1:])]))
        torch.testing.assert_close(logits, made.logits(whole))
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2).eval()
    head = {n.split("classifier.")[1]: torch.from_numpy(t) for n, t in made.initial.items() if "classifier" in n}
    plain.classifier.load_state_dict(head)
    with torch.no_grad():
        expected = [plain(**tokenizer(*pair, return_tensors="pt")).logits for pair in PAIRS]
        dropped = plain(input_ids=tokenizer(*PAIRS[0], return_tensors="pt")["input_ids"]).logits
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert float((dropped - expected[0]).abs().max()) > 1e-3


def test_pairs_keep_their_texts_apart_on_disk_and_single_texts_keep_nothing(tiny_base, tiny, tmp_path):
    from fedlora.prepare import prepare

    pairs = [(f"one {i}", "two " * (i % 3)) for i in range(1, 40)]
    rows = [f"{a},{b},{('good', 'bad')[i % 2]}" for i, (a, b) in enumerate(pairs)]
    (file := tmp_path / "pairs.csv").write_text("\n".join(["a,b,label", *rows]) + "\n")
    data = prepare(tiny(f"data.files={{train: {file}, text: [a, b], label: label}}")).data
    cut = base_model.load_tokenizer(tiny_base)([a for a, _ in pairs], [b for _, b in pairs])
    known = {tuple(ids): types for ids, types in zip(cut["input_ids"], cut["token_type_ids"], strict=True)}
    for split in (data.train, data.test):
        assert len(split) and all(
            split.types_of(i).tolist() == known[tuple(split.row(i))] for i in range(len(split))
        )
    assert prepare(tiny()).data.train.types is None


@pytest.mark.parametrize("told", [None, -1, 0, 2000], ids=str)
@pytest.mark.parametrize("missing", [False, True], ids=["a token to pad with", "none"])
def test_a_decoder_classifies_by_the_last_token_of_the_text(tiny_lm, tmp_path, told, missing):
    """Whatever the base's configuration says is padding: the first example ends in one that it names."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

    base = str(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    if missing:
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(base)
    LlamaForCausalLM.from_pretrained(tiny_lm, pad_token_id=told).save_pretrained(base)
    made = load(base, targets=("q_proj",), max_length=32, private=True)
    pad = 102 if missing else 0
    assert made.pad == made.model.config.pad_token_id == pad
    data = examples([[5, 6, 2000], [7, 8, 9, 10, 11, 12, 13], [14, 2000, 15, 16]], [0, 1, 0])
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=None).eval()
    plain.score.weight.data = torch.from_numpy(next(t for n, t in made.initial.items() if "score" in n))
    made.begin({}, ())
    with torch.no_grad():
        expected = torch.cat([plain(input_ids=torch.tensor([data.row(i).tolist()])).logits for i in range(3)])
        torch.testing.assert_close(made.logits(made.batch(data, np.arange(3))), expected, rtol=1e-5, atol=1e-6)


def test_a_padding_token_that_the_model_does_not_know_is_not_padded_with(tiny_lm, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_lm, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_special_tokens({"pad_token": "<nothing>"})
    tokenizer.save_pretrained(base)
    assert tokenizer.pad_token_id == 30522
    made = load(str(base), "causal_lm", targets=("q_proj",), max_length=32)
    assert made.pad < 30522 and made.packing is not None
    with pytest.raises(SettingError, match="tokens up to number 30522, and it has embeddings of 30522"):
        load(str(base), "causal_lm", targets=("q_proj",), max_length=32, private=True)


def test_a_model_without_a_place_for_every_token_of_a_text_is_refused(tiny_base):
    with pytest.raises(SettingError, match="65 tokens, and the model has 64 positions: lower it"):
        load(tiny_base, max_length=65)


def save(model, tokenizer, folder):
    """A base of a model and another's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(f"{tokenizer}/{name}", folder)
    return str(folder)


@pytest.mark.parametrize("what", ["body", "head of another task", "whole"])
def test_of_a_head_what_was_loaded_stays_and_a_norm_begins_as_transformers_begins_it(tiny_base, tmp_path, what):
    from transformers import (
        ModernBertConfig,
        ModernBertForMaskedLM,
        ModernBertForSequenceClassification,
        ModernBertModel,
    )

    kinds = {"body": ModernBertModel, "head of another task": ModernBertForMaskedLM}
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, cls_token_id=101, sep_token_id=102, bos_token_id=101,
        eos_token_id=102, initializer_range=0.3, num_labels=2,
    )  # fmt: skip
    model = kinds.get(what, ModernBertForSequenceClassification)(config)
    if what != "body":
        model.head.norm.weight.data.uniform_(0.5, 1.5)
    base = save(model, tiny_base, tmp_path)
    made = load(base, targets=("Wqkv",), max_length=32, private=True)
    start = {n.removeprefix("base_model.model."): t for n, t in made.initial.items() if "lora_" not in n}
    assert set(start) == {"head.norm.weight", "head.dense.weight", "classifier.weight", "classifier.bias"}
    own = dict(model.named_parameters())
    if what == "body":
        assert (start["head.norm.weight"] == 1).all() and start["head.dense.weight"].any()
    kept = {"body": [], "head of another task": ["head.norm.weight", "head.dense.weight"]}.get(what, list(start))
    assert all(np.array_equal(start[n], own[n].detach().numpy()) for n in kept)
    made.begin({}, list(made.layout))
    data = examples([[101, 5, 6, 102], [101, 7, 102]], [0, 1])
    made.losses(made.batch(data, np.arange(2))).sum().backward()
    assert all(p.grad.any() for n, p in made.parameters.items() if ".lora_A." not in n)


def test_a_first_adapter_follows_from_seed_and_base_and_torchs_own_numbers_are_left_alone(tiny_base, tmp_path):
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0, cls_token_id=101, sep_token_id=102, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    base = save(ModernBertModel(config), tiny_base, tmp_path)
    made = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        made.append(load(base, targets=("Wqkv",), max_length=16).initial)
    assert all(np.array_equal(made[0][n], made[1][n]) for n in made[0])
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 3 + 2**32):
        with seeding.ambient(seed, "head"):
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2] and torch.equal(torch.get_rng_state(), before)


def test_what_another_round_of_merges_adds_to_a_tied_head_leaves_the_embeddings_alone(tiny_lm, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tied = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_lm, tie_word_embeddings=True))
    made = load(save(tied, tiny_lm, tmp_path), "causal_lm", targets=("lm_head",), max_length=16)
    base = made.model.get_base_model()
    assert base.lm_head.get_base_layer().weight is base.get_input_embeddings().weight
    before = base.get_input_embeddings().weight.clone()
    made.merge({"lm_head": (np.ones((30522, 1), np.float32), np.ones((1, 32), np.float32))})
    assert torch.equal(base.get_input_embeddings().weight, before)
    torch.testing.assert_close(made.weight("lm_head"), before + 1)
