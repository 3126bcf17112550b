import numpy as np
import pytest
import torch

from fedlora import task
from fedlora.adapter import Lora
from fedlora.data import Examples, Rows
from fedlora.errors import ContractError, SettingError

LABELS = ("bad", "good")


def load(base, kind="classification", targets=("query", "value"), **more):
    return task.load(kind, base, Lora(4, 8, targets), labels=LABELS, seed=3, **more)


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
    tokenizer = task.load_tokenizer(tiny_lm)
    rows = Rows(["one two three four five six", "short"], ["seven eight", "nine"])
    encoded = task.encode_causal_lm(tokenizer, rows, max_length=6)
    for tokens, start in zip(encoded.tokens, encoded.targets, strict=True):
        assert len(tokens) <= 6 and 0 <= start < len(tokens)
    assert tokenizer.decode(encoded.tokens[0][encoded.targets[0] :]) == "seven eight"
    assert tokenizer.decode(encoded.tokens[1][: encoded.targets[1]]).count("short") == 1


def test_classification_encoding(tiny_base):
    tokenizer = task.load_tokenizer(tiny_base)
    encoded = task.encode_classification(tokenizer, Rows(["a b c d e f", "g"], ["good", "bad"]), LABELS, 5)
    assert [len(t) for t in encoded.tokens] == [5, 3] and encoded.targets == [1, 0]


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
    assert task._answer(text, pattern) == expected


def test_answers_are_written_as_plain_transformers_writes_them_and_compared(tiny_lm):
    """Eleven prompts of unequal lengths; some are given the model's own answer, which then matches."""
    from transformers import AutoModelForCausalLM

    lm, tokenizer = load(tiny_lm, "causal_lm", targets=("q_proj", "v_proj")), task.load_tokenizer(tiny_lm)
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
    assert lm.match(tokenizer, data, np.arange(11), 4, None) == {"asked": 11, "matched": same}
    assert lm.evaluate({}, data, np.arange(11)) == before  # rows again
    assert lm.figures({"loss": 2.0, "tokens": 1.0, "asked": 4.0, "matched": 3.0})["exact_match"] == 0.75


def test_a_chat_template_frames_one_dialogue_and_the_answer_alone_is_scored(tiny_lm):
    tokenizer = task.load_tokenizer(tiny_lm)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    encoded = task.encode_causal_lm(tokenizer, Rows(["two plus two", "one"], ["four", "five"]), max_length=32)
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
