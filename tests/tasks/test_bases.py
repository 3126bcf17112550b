"""Base models as people have them: each loads and trains, or is told in one line what can."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from fedlora import simulate
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.passes.prefix import Prefix
from fedlora.tasks import base_model, loading
from tests.zoo import homes, images
from tests.zoo.models import ATTENTION, BASE, DECODER, EYES, FIT, OPT, QV, decodes, make, plain, texts


def build(cls, **told):
    torch.manual_seed(0)
    kind = getattr(hf, cls)
    return kind(kind.config_class(**told))


def load(base, targets, task="classification", **more):
    told = {"labels": ("a", "b", "c"), "seed": 3, "max_length": 32, "private": True, **more}
    kind = targets if isinstance(targets, Lora) else Lora(4, 8, targets)
    return loading.load(task, base, kind, **told)


def line(base, targets, task="classification", **more):
    with pytest.raises(SettingError) as told:
        load(base, targets, task, **more)
    assert "\n" not in str(told.value)
    return str(told.value)


# Towers that take no part.


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_a_tower_that_takes_no_part_is_named_and_left_out_by_name(tmp_path, private, caplog):
    base = homes.home(plain("gemma3-vision"), tmp_path / "base")
    if private:
        said = line(base, ATTENTION)
    else:
        load(base, ATTENTION, private=False)
        said = caplog.messages[0]
    assert said.startswith(
        "model.adapter.targets: model.vision_tower.encoder.layers.0.self_attn.q_proj takes no part"
    )
    assert said.endswith("with model.adapter.exclude: [vision_tower]")
    made = load(base, Lora(4, 8, ATTENTION, exclude=("vision_tower",)), private=private)
    assert not any("vision" in name for name in made.layout) and made.packing is not None


def test_of_all_linear_layers_too_what_takes_no_part_is_named(tmp_path):
    base = homes.home(plain("gemma3-vision"), tmp_path / "base")
    assert line(base, ("all-linear",)).endswith("with model.adapter.exclude: [vision_tower]")
    made = load(base, Lora(4, 8, ("all-linear",), exclude=("vision_tower",)))
    assert len(made._layers) == 14  # seven of each block


def test_segments_are_not_told_apart_by_what_marks_images():
    assert base_model.text_kinds(plain("gemma3-vision")) == 0
    assert base_model.text_kinds(plain("bert")) == 2


def test_a_layer_whose_weight_its_model_reads_by_itself_is_told(tmp_path):
    base = homes.home(plain("mamba"), tmp_path / "base", homes.tokenizer(ends=False))
    for private in (True, False):
        said = line(base, ("dt_proj",), "causal_lm", private=private)
        assert "backbone.layers.0.mixer.dt_proj takes no part in the loss, nor does any other" in said


# What transformers has no class for.


@pytest.mark.parametrize(
    "name, task, instead",
    [
        ("t5", "causal_lm", "classification or multi_label or regression or token_classification"),
        ("mamba", "classification", "causal_lm or preference"),
        ("clip", "classification", "image_classification"),
        ("siglip", "regression", "image_classification"),
        ("vit", "classification", "image_classification"),
    ],
)
def test_the_tasks_that_go_with_an_architecture_are_named(tmp_path, name, task, instead):
    model = images.plain(name) if name in images.MODELS else plain(name)
    said = line(homes.home(model, tmp_path / "base"), ATTENTION, task)
    assert said == (
        f"model.base: transformers has no {model.config.model_type} for task: {task}; with it goes task: {instead}"
    )


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_tower_of_images_of_two_towers_classifies(tmp_path, name):
    base = homes.home(images.plain(name), tmp_path / "base", images.reader())
    made = load(base, ATTENTION, "image_classification")
    assert {slot.role for slot in made.layout.values() if "vision_model" not in slot.name} == {"head"}
    assert len(made._layers) == 4


# Encoder-decoders.


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("trained", ["classifier", "writer"])
def test_an_encoder_decoder_classifies_where_its_tokenizer_ends_a_text(tmp_path, name, trained):
    model = plain(name)
    if trained == "writer":
        model = build(
            type(model).__name__.replace("SequenceClassification", "ConditionalGeneration"), **FIT[name][1]
        )
    base = homes.home(model, tmp_path / "base")
    assert load(base, FIT[name][2]).private
    homes.tokenizer(ends=False).save_pretrained(base)
    said = line(base, FIT[name][2])
    assert "at the token that ends it, number 2, and its tokenizer ends texts otherwise: take" in said


# Blocks that give tuples, rows longer than the positions.


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensors", "tuples"])
def test_what_stands_in_for_blocks_is_what_they_give(wrapped):
    class Block(torch.nn.Module):
        def forward(self, hidden):
            return (hidden + 1, None) if wrapped else hidden + 1

    first, second = Block(), Block()
    prefix, start = Prefix([first, second]), torch.zeros(1, 2, 3)

    def run():
        out = first(start)
        return second(out[0] if wrapped else out)

    def value(out):
        return out[0] if wrapped else out

    prefix.row = torch.full((1, 2, 3), 5.0)
    assert torch.equal(value(run()), prefix.row)  # before a whole pass told what blocks give
    assert isinstance(run(), tuple) is wrapped and torch.equal(value(run()), prefix.row)
    prefix.row = None
    assert torch.equal(prefix.come(run), torch.full((1, 2, 3), 2.0))


def test_upper_layers_of_blocks_that_give_tuples_train(tmp_path):
    base = homes.home(plain("falcon"), tmp_path / "base")
    assert len(load(base, Lora(4, 8, ("query_key_value",), (1,)))._layers) == 1


def test_a_model_that_masks_by_a_table_of_its_own_is_padded_whatever_its_positions():
    """GPT-Neo with 600 positions, and a pass of 960 tokens."""
    task, _ = make("gpt-neo", changes=(("max_position_embeddings", 600),), max_length=48)
    data = texts([48] * 20)
    assert task.packing is None and task.logits(task.batch(data, np.arange(20))).shape == (20, 3)


# Tokens and positions.


@pytest.mark.parametrize(
    "cls, told, targets, room",
    [
        ("BertForSequenceClassification", BASE, QV, 64),
        ("RobertaForSequenceClassification", BASE, QV, 62),
        ("OPTForSequenceClassification", OPT, ATTENTION, 64),
        ("GPTNeoForSequenceClassification", FIT["gpt-neo"][1], ATTENTION, 600),
        ("DistilBertForSequenceClassification", FIT["distilbert"][1], ("q_lin",), 64),
        ("BartForSequenceClassification", FIT["bart"][1], ATTENTION, 64),
    ],
)
def test_a_longer_max_length_than_the_model_has_positions_is_told(tmp_path, cls, told, targets, room):
    model = build(cls, **told)
    assert base_model.positions(model) == room
    base = homes.home(model, tmp_path / "base")
    assert line(base, targets, max_length=room + 1) == (
        f"data.max_length: {room + 1} tokens, and the model has {room} positions: lower it"
    )


@pytest.mark.parametrize("name", ["llama", "deberta-v3", "t5", "gemma3-vision", "falcon-alibi"])
def test_a_model_that_computes_positions_has_room_for_all(name):
    assert base_model.positions(plain(name)) is None


def test_a_tokenizer_of_more_tokens_than_the_model_is_told_before_training(tmp_path):
    base = homes.home(plain("bert"), tmp_path / "base", homes.tokenizer(words=120))
    said = line(base, QV)
    assert "tokens up to number 119, and it has embeddings of 99: the tokenizer was given more" in said
    text = f"""
name: larger
model: {{base: "{base}"}}
data: {{files: {{train: "{homes.rows(tmp_path / "rows.csv")}", text: text, label: label}}, max_length: 16}}
clients: {{total: 2, local_steps: 1, batch_size: 4, lr: 0.1}}
rounds: 1
engine: {{kind: inline}}
"""
    from fedlora.scenario import parse

    assert simulate(parse(text, "larger.yaml"), out=tmp_path / "fine").state == "finished"
    with open(tmp_path / "rows.csv", "a") as out:
        out.write("w5 w110,a\n" * 4)
    with pytest.raises(UserError, match="the data hold token number 110, and it has embeddings of 99"):
        simulate(parse(text, "larger.yaml"), out=tmp_path / "larger")


@pytest.mark.parametrize("name", ["llama-lm", "bert", "llama"])
def test_a_padding_token_that_the_tokenizer_alone_was_given_is_not_padded_with(tmp_path, name):
    """The configuration names it too, as `model.config.pad_token_id = tokenizer.pad_token_id` leaves it."""
    reader = homes.tokenizer(ends=False, pad=None)
    reader.add_special_tokens({"pad_token": "[PAD]"})
    base = homes.home(plain(name), tmp_path / "base", reader)
    file = Path(base) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": reader.pad_token_id}))
    assert reader.pad_token_id == 99
    task = "causal_lm" if decodes(name) else "classification"
    made = load(base, FIT[name][2], task, private=False)
    assert made.pad == 2 and made.packing is not None
    assert "such as one to pad with; take the one" in line(base, FIT[name][2], task)


# Heads.


def test_the_head_of_other_labels_is_drawn_anew_and_of_the_same_labels_kept(tmp_path):
    def based(labels, place):
        model = build("BertForSequenceClassification", **{**BASE, "num_labels": len(labels)})
        model.config.id2label = dict(enumerate(labels))
        return model, homes.home(model, tmp_path / place)

    model, same = based("abc", "same")
    head = "base_model.model.classifier.weight"
    right = model.classifier.weight.detach().numpy()
    assert np.array_equal(load(same, QV).initial[head], right)
    _, order = based("cab", "order")
    assert not np.array_equal(load(order, QV).initial[head], right)
    assert np.array_equal(load(order, QV, head="kept").initial[head], right)
    _, more = based("abcde", "more")
    assert load(more, QV).initial[head].shape == (3, 32)
    assert "has no head for 3 labels to keep: take trained" in line(more, QV, head="kept")


def test_what_masked_language_modelling_left_without_a_pooler_is_told_to_train_one(tmp_path):
    base = homes.home(build("BertForMaskedLM", **BASE), tmp_path / "base")
    assert line(base, QV).endswith("such as bert.pooler.dense.bias: write model.pooler: trained")
    assert "base_model.model.bert.pooler.dense.weight" in load(base, QV, pooler="trained").layout
    assert not any("pooler" in name for name in load(base, ("dense",), pooling="mean").layout)


# Every part of a configuration.


def test_no_dropout_and_no_cache_in_any_part_of_a_configuration():
    config = hf.Gemma3Config(
        text_config={**DECODER, "attention_dropout": 0.5}, vision_config={**EYES, "attention_dropout": 0.5}
    )
    base_model.quiet_config(config)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0
    assert config.text_config.use_cache is False


def test_attention_is_as_transformers_chooses_where_plain_products_give_something_else():
    """Of Falcon with ALiBi logits differ by 2 %, and an adapter is used as transformers loads its base."""
    auto = hf.AutoModelForSequenceClassification
    assert base_model.attention_of(hf.FalconConfig(alibi=True), auto) is None
    assert base_model.attention_of(hf.BertConfig(), auto) == "eager"


def test_the_body_is_found_where_its_name_is_not_the_usual_one():
    assert base_model.body_of(images.plain("clip"))[0] == "vision_model"
    assert base_model.heads_of(images.plain("siglip")) == ["classifier"]
    assert base_model.body_of(plain("llama4"))[0] == "model"
    assert base_model.heads_of(plain("bert")) == ["classifier"]
