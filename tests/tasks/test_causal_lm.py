"""Chats: which tokens are an answer's, what is cut, and runs on them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlora import simulate
from fedlora.data.chats import Turn
from fedlora.data.reading import Rows
from fedlora.data.store import Examples
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.tasks import base_model, dialogues, loading
from fedlora.tasks.causal_lm import CausalLM

# As ChatML: what ends a turn is the tokenizer's end, and then comes a line's end, which MiniLM's tokenizer drops.
TEMPLATE = (
    "[CLS]{% for m in messages %}( {{ m['role'] }} ) {{ m['content'] }} [SEP] ;{% endfor %}"
    "{% if add_generation_prompt %}( assistant ) {% endif %}"
)
CHAT = tuple(
    Turn(role, content)
    for role, content in (
        ("system", "be brief"),
        ("user", "one two"),
        ("assistant", "yes"),
        ("user", "three"),
        ("assistant", "no never"),
    )
)


def chat_base(folder, base, template=TEMPLATE):
    """A copy of a base whose tokenizer has a chat template and `[SEP]` for its end."""
    tokenizer = base_model.load_tokenizer(base)
    tokenizer.chat_template, tokenizer.eos_token = template, "[SEP]"
    shutil.copytree(base, folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tiny_lm, tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("chat") / "lm", tiny_lm)


@pytest.fixture(scope="module")
def reader(base):
    return base_model.load_tokenizer(base)


def encoded(reader, turns=CHAT, scored="all", max_length=64):
    said = tuple(turn.content for turn in turns if turn.role == "assistant")
    rows = Rows([turns], [said if scored == "all" else said[-1:]])
    return CausalLM.encode(reader, rows, (), max_length)


def words(reader, ids):
    return " ".join(reader.convert_ids_to_tokens(list(ids)))


def test_all_turns_of_the_assistant_are_scored_with_what_ends_them(reader):
    made = encoded(reader)
    (ids,), (marks,) = made.tokens, made.marks
    whole = "[CLS] ( system ) be brief [SEP] ; ( user ) one two [SEP] ; ( assistant ) yes [SEP] ; "
    whole += "( user ) three [SEP] ; ( assistant ) no never [SEP]"
    assert words(reader, ids) == whole and set(marks) == {0, -100}
    assert words(reader, [i for i, m in zip(ids, marks, strict=True) if m == 0]) == "yes [SEP] no never [SEP]"
    assert words(reader, ids[made.targets[0] :]) == "no never [SEP]" and made.cut == 0


def test_the_last_alone_needs_no_marks(reader):
    made = encoded(reader, scored="last")
    assert made.marks is None and made.tokens == encoded(reader).tokens
    assert words(reader, made.tokens[0][made.targets[0] :]) == "no never [SEP]"


def test_a_model_that_is_asked_is_given_the_tokens_that_it_learnt_to_go_on_from(reader):
    made = encoded(reader)
    assert dialogues.question(reader, CHAT[:-1], 64) == made.tokens[0][: made.targets[0]]
    short = dialogues.question(reader, CHAT[:-1], 17)
    assert words(reader, short) == "[CLS] ( system ) be brief [SEP] ; ( user ) three [SEP] ; ( assistant )"
    assert dialogues.question(reader, CHAT[:-1], 4) == short[-4:]


def test_the_oldest_questions_are_left_out_and_then_the_last_answer_loses_its_end(reader):
    whole = len(encoded(reader).tokens[0])
    assert encoded(reader, max_length=whole).cut == 0
    made = encoded(reader, max_length=whole - 1)
    short = "[CLS] ( system ) be brief [SEP] ; ( user ) three [SEP] ; ( assistant ) no never [SEP]"
    assert words(reader, made.tokens[0]) == short and made.cut == 1
    assert words(reader, made.tokens[0][made.targets[0] :]) == "no never [SEP]"
    assert [m for m in made.marks[0] if m == 0] == [0, 0, 0]
    least = len(made.tokens[0])
    shorter = encoded(reader, max_length=least - 2)
    assert words(reader, shorter.tokens[0]) == short.removesuffix(" never [SEP]")
    assert shorter.marks[0] == [-100] * (least - 3) + [0]
    tiny = encoded(reader, max_length=4)
    assert words(reader, tiny.tokens[0]) == "( assistant ) no" and tiny.targets == [3]
    assert tiny.marks[0] == [-100, -100, -100, 0]


def test_a_template_without_an_end_in_its_turns_gets_one_at_the_end(reader, base, tmp_path):
    plain = "{% for m in messages %}( {{ m['role'] }} ) {{ m['content'] }} ;{% endfor %}"
    plain += "{% if add_generation_prompt %}( assistant ){% endif %}"
    other = base_model.load_tokenizer(chat_base(tmp_path / "x", base, plain))
    made = encoded(other)
    scored = [i for i, m in zip(made.tokens[0], made.marks[0], strict=True) if m == 0]
    assert words(other, scored) == "yes ; no never ; [SEP]"


@pytest.mark.parametrize(
    "template, key, what",
    [
        (
            "{{ raise_exception('secret ' ~ messages[0]['content']) }}",
            "data.messages",
            "refuses a chat of",
        ),
        (
            "{% for m in messages %}{{ loop.last }}{{ m['content'] }}{% endfor %}",
            "data.scored",
            "begins an answer",
        ),
        (None, "data.messages", "has no chat template"),
    ],
)
def test_a_template_that_does_not_fit_is_one_line_without_text(reader, base, tmp_path, template, key, what):
    other = base_model.load_tokenizer(base)
    other.chat_template = template
    with pytest.raises(SettingError) as caught:
        encoded(other)
    assert caught.value.key == key and what in str(caught.value) and "secret" not in str(caught.value)


def test_no_row_decides_whether_a_template_is_refused(base, caplog):
    """This one leaves thoughts out of earlier answers: a chat that has some teaches nothing, and the others do."""
    other = base_model.load_tokenizer(base)
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last else m.content.split('!')[-1] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ask, say = (lambda text: Turn("user", text)), (lambda text: Turn("assistant", text))
    plain = (ask("one"), say("two"), ask("one"), say("three"))
    thinks = (ask("one"), say("ill ! two"), ask("one"), say("three"))
    made = CausalLM.encode(other, Rows([plain, thinks], [("two", "three"), ("ill ! two", "three")]), (), 32)
    assert 0 in made.marks[0] and made.marks[1] == [-100] and made.targets[1] == len(made.tokens[1]) == 1
    assert "some chats teach nothing" in caplog.text and "ill" not in caplog.text


def test_another_template_is_another_encoding(reader, base):
    other = base_model.load_tokenizer(base)
    other.chat_template = TEMPLATE.replace(";", ".")
    assert base_model.encoding_fingerprint(other) != base_model.encoding_fingerprint(reader)


def test_another_token_of_the_end_is_another_encoding(reader, base):
    """Instructed models often have their base's tokenizer.json, and another end."""
    other = base_model.load_tokenizer(base)
    other.eos_token = "[MASK]" if other.eos_token != "[MASK]" else "[CLS]"
    rows = Rows(["so"], ["yes"])
    one, two = (CausalLM.encode(r, rows, (), 32).tokens for r in (reader, other))
    assert one != two and base_model.encoding_fingerprint(other) != base_model.encoding_fingerprint(reader)


def test_the_loss_is_the_mean_over_the_tokens_of_all_answers(reader, base):
    """By plain transformers' logits, for one example among others."""
    lm = loading.load("causal_lm", base, Lora(4, 8, ("q_proj",)), labels=(), seed=3, max_length=64)
    rows = Rows([CHAT, CHAT[1:3]], [("yes", "no never"), ("yes",)])
    made = CausalLM.encode(reader, rows, (), 64)
    examples = Examples(
        np.concatenate(made.tokens).astype(np.int32),
        np.cumsum([0, *map(len, made.tokens)]),
        np.array(made.targets),
        marks=np.concatenate(made.marks).astype(np.int32),
    )
    lm.begin({}, ())
    with torch.no_grad():
        losses = lm.losses(lm.batch(examples, np.arange(2)))
        for tokens, marks, loss in zip(made.tokens, made.marks, losses, strict=True):
            with lm.packing.away():
                log = lm.model(input_ids=torch.tensor(tokens)[None]).logits.log_softmax(-1)[0]
            at = [i for i, mark in enumerate(marks) if mark == 0]
            assert float(loss) == pytest.approx(-np.mean([float(log[i - 1, tokens[i]]) for i in at]), rel=1e-5)
    assert lm.evaluate({}, examples, np.arange(2))["tokens"] == 5 + 2


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A jsonl of 120 chats of one to three questions, in which the question gives the answer away."""
    file = tmp_path_factory.mktemp("data") / "talks.jsonl"
    rows = []
    for i in range(120):
        turns = [{"from": "system", "value": "be brief"}] if i % 2 else []
        for j in range(1 + i % 3):
            turns += [{"from": "human", "value": f"{i} {j}"}, {"from": "gpt", "value": ("yes", "no")[(i + j) % 2]}]
        rows.append(json.dumps({"talk": turns}))
    file.write_text("\n".join(rows))
    return file


def told(base, talks, *more):
    files = f"{{train: '{talks}'}}"
    return (
        *("task=causal_lm", f"model.base={base}", "model.adapter.targets=[q_proj, v_proj]", "rounds=1"),
        *(f"data.files={files}", "data.messages=talk", "data.max_length=32", *more),
    )


@pytest.mark.parametrize("more", [(), ("data.scored=last",), ("engine.fused=2",)])
def test_a_private_run_learns_chats(tiny, base, talks, tmp_path, more):
    run = simulate(
        tiny(*told(base, talks, "exact_match={examples: 3, max_new_tokens: 2}", *more)), out=tmp_path / "r"
    )
    assert run.metric == "perplexity" and run.summary["failures"] == 0 and run.summary["epsilon"] <= 8
    assert 0 <= run.summary["exact_match"] <= 1


def test_fused_clients_learn_what_each_learns_alone(tiny, base, talks, tmp_path):
    from safetensors.numpy import load_file

    made = [
        simulate(tiny(*told(base, talks, f"engine.fused={n}"), private=False), out=tmp_path / str(n))
        for n in (1, 4)
    ]
    one, other = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in made)
    assert all(np.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_chats_that_are_cut_are_counted(tiny, base, talks, tmp_path, caplog):
    simulate(tiny(*told(base, talks, "data.max_length=20"), private=False), out=tmp_path / "run")
    assert "test rows are longer than data.max_length (20 tokens) and are judged by what it leaves" in caplog.text


def test_a_base_without_a_template_is_told_by_the_scenarios_line(tiny, tiny_lm, talks, tmp_path):
    with pytest.raises(UserError, match=r"data\.messages: the base model's tokenizer has no chat template"):
        simulate(tiny(*told(tiny_lm, talks)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_of_one_token_alone_teaches_nothing(tiny_lm):
    task = loading.load("causal_lm", tiny_lm, Lora(4, 8, ("q_proj",)), labels=(), seed=3, max_length=24)
    task.begin({}, ())
    one = Examples(np.array([7, 8], np.int32), np.array([0, 1, 2]), np.zeros(2, np.int64))
    assert task.losses(task.batch(one, np.arange(2))).tolist() == [0.0, 0.0]
    assert task.figures(task.evaluate({}, one, np.arange(2))) == {"loss": 0.0, "perplexity": 1.0}


def test_answers_beyond_the_models_positions_are_told_at_load(tiny, tiny_lm, talks):
    """By the longest of the prompts that are asked, the second; the third is not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 30522, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    task = SimpleNamespace(
        model=GPT2LMHeadModel(GPT2Config(**small)), tokens=True, target="start", metric="perplexity"
    )
    some = Examples(np.full(60, 7, np.int32), np.array([0, 12, 30, 60]), np.array([4, 9, 25]))
    none = Examples(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    data = SimpleNamespace(test=some, validation=none, largest_token=7)

    def check(new):
        asked = f"exact_match={{examples: 2, max_new_tokens: {new}}}"
        loading.check(task, tiny(*told(tiny_lm, talks, asked)), data)

    check(23)
    with pytest.raises(
        SettingError, match="24 tokens after a prompt of 9, and the model has 32 positions: lower it"
    ):
        check(24)


def test_more_tokens_than_a_model_has_positions_for_are_one_line(reader):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 30522, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=101, eos_token_id=5, pad_token_id=0)).eval()
    with pytest.raises(SettingError, match="and the model has 32 positions: lower it"):
        CausalLM.complete(model, reader, ["secret"], 16, max_new_tokens=64)
    assert len(CausalLM.complete(model, reader, ["so"], 16, max_new_tokens=8)) == 1
