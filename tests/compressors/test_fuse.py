"""Blocks that do nothing go first; what is left is the model that passes them by."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedlora import simulate
from fedlora.cli import main
from fedlora.compressing import compress
from fedlora.compressors.fuse import passed_by
from fedlora.errors import UserError


@pytest.fixture(scope="module")
def deep(tiny_lm, tmp_path_factory):
    """A Llama of four blocks, of which the second and the last do nothing, and the first little; and texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_lm, num_hidden_layers=4, initializer_range=0.3)
    model = LlamaForCausalLM(config)
    for number, part in ((0, 0.1), (1, 0.0), (3, 0.0)):
        block = model.model.layers[number]
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data *= part
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    (folder / "texts.txt").write_text("".join(f"note {i} says that the film was good\n" for i in range(20)))
    return folder


def ids():
    return torch.arange(2, 12)[None]


def test_blocks_that_do_nothing_go_without_a_trace(deep, tmp_path, capsys):
    told = ["compress", str(deep), "--use", "fuse", "--keep", "0.5", "--texts", str(deep / "texts.txt")]
    assert main([*told, "--perplexity", str(deep / "texts.txt"), "--out", str(tmp_path / "cut")]) == 0
    cut, whole = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "cut", deep))
    with torch.no_grad():
        assert torch.allclose(cut(ids()).logits, whole(ids()).logits, atol=1e-4)
    assert cut.config.num_hidden_layers == 2 and cut.num_parameters() < whole.num_parameters()
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("block") and said.count("whole") == 2
    first, now = (float(word.split()[0]) for word in said.split("perplexity ")[1].split(", ")[:2])
    assert first == pytest.approx(now, rel=1e-3)


def test_the_third_to_go_is_the_one_that_does_little(deep, tmp_path):
    made = compress(str(deep), tmp_path / "cut", use="fuse", keep=0.25, texts=deep / "texts.txt")
    layers = made.manifest["layers"]
    assert [layer["rank"] for layer in layers.values()] == [0, 0, None, 0]
    assert layers["model.layers.1"]["error"] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < layers["model.layers.0"]["error"] < 1  # measured with the other two gone
    cut, whole = AutoModel.from_pretrained(made.folder).eval(), AutoModel.from_pretrained(deep).eval()
    with torch.no_grad(), passed_by([whole.layers[i] for i in (0, 1, 3)]):
        right = whole(ids()).last_hidden_state
    with torch.no_grad():
        assert torch.allclose(cut(ids()).last_hidden_state, right, atol=1e-5)


def test_the_influence_is_one_less_the_cosine_by_hand(deep, tmp_path):
    made = compress(str(deep), tmp_path / "cut", use="fuse", keep=0.25, texts=deep / "texts.txt")
    reader, model = AutoTokenizer.from_pretrained(deep), AutoModel.from_pretrained(deep).eval()
    near = []
    for line in (deep / "texts.txt").read_text().splitlines():
        given = reader(line, return_tensors="pt")
        given.pop("token_type_ids", None)
        with torch.no_grad():
            right = model(**given).last_hidden_state[0]
            with passed_by([model.layers[i] for i in (0, 1, 3)]):
                off = model(**given).last_hidden_state[0]
        near += torch.nn.functional.cosine_similarity(right, off).tolist()
    told = made.manifest["layers"]["model.layers.0"]["error"]
    assert told == pytest.approx(1 - sum(near) / len(near), abs=1e-5)


def test_kinds_of_attention_stay_with_their_blocks(tmp_path, tiny_base):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    told = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=30522, num_hidden_layers=3, layer_types=kinds, use_sliding_window=True, sliding_window=4, **told
    )
    model = Qwen2ForCausalLM(config)
    for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        layer.weight.data *= 0
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("a film that was good\nand one that was not\n")
    folder, texts = str(tmp_path / "base"), tmp_path / "texts.txt"
    made = compress(folder, tmp_path / "cut", use="fuse", keep=0.7, texts=texts)
    cut = AutoModelForCausalLM.from_pretrained(made.folder)
    assert cut.config.layer_types == ["full_attention", "sliding_attention"]
    with torch.no_grad():
        assert torch.allclose(cut.eval()(ids()).logits, model.eval()(ids()).logits, atol=1e-5)


def test_a_run_takes_such_a_folder_and_no_such_section(deep, tiny, tiny_base, tmp_path):
    texts = deep / "texts.txt"
    made = compress(tiny_base, tmp_path / "cut", use="fuse", keep=0.5, texts=texts)
    run = simulate(tiny(f"model.base={made.folder}"), out=tmp_path / "run")
    assert run.summary["epsilon"] <= 8
    with pytest.raises(UserError, match="fuse goes by public texts: run fedlora compress"):
        tiny("compress={use: fuse}")


@pytest.mark.parametrize("named", [["--targets", "query"], ["--exclude", "pooler"]])
def test_layers_cannot_be_named(deep, tmp_path, capsys, named):
    told = ["--use", "fuse", "--texts", str(deep / "texts.txt"), "--out", str(tmp_path / "cut"), *named]
    assert main(["compress", str(deep), *told]) == 2
    assert f"{named[0]}: fuse leaves whole blocks out, whatever their layers" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
