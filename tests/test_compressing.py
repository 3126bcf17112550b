"""`fedlora compress`: folders, what they hold, and what is refused before any is made."""

import json

import numpy as np
import pytest
import torch

from fedlora import public
from fedlora.cli import main
from fedlora.compressing import compress
from fedlora.errors import SettingError, UserError
from fedlora.tasks import located, smaller


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "public.txt"
    file.write_text(
        "".join(f"note {i} says that the film was {'good' if i % 2 else 'bad'}\n\n" for i in range(40))
    )
    return file


def hidden(path):
    """What a base makes of some tokens, its factors multiplied out."""
    from transformers import AutoModel

    model = smaller.pretrained(AutoModel, str(path)).eval()
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).last_hidden_state


def test_a_base_is_cut_and_the_folder_says_how(tiny_base, tmp_path, capsys):
    assert main(["compress", tiny_base, "--use", "lord", "--keep", "0.5", "--out", str(tmp_path / "cut")]) == 0
    told = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    query = told["layers"]["encoder.layer.0.attention.self.query"]
    assert (query["shape"], query["rank"], query["weighted"], query["transposed"]) == ([32, 32], 8, None, False)
    assert 0.3 < query["error"] < 1 and (told["use"], told["keep"], told["statistic"]) == ("lord", 0.5, None)
    assert told["base_fingerprint"] == located.fingerprint(tiny_base) and not told["loads_without_fedlora"]
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32  # of both blocks, and the pooler
    ranks = 2 * (4 * 8 * 64 + 2 * 10 * 96) + 8 * 64  # half of 64 x 32 is 10 ranks of 96
    assert told["parameters"]["before"] - told["parameters"]["after"] == layers - ranks
    printed = capsys.readouterr().out
    assert f"{told['parameters']['after']:,} now" in printed and "query" in printed
    assert "transformers cannot load" in printed
    assert {p.name for p in (tmp_path / "cut").iterdir()} >= {
        "config.json",
        "factors.safetensors",
        "tokenizer.json",
    }


def test_transformers_refuses_factors_and_loads_the_whole_form(tiny_base, tmp_path):
    from transformers import AutoModel

    thin, whole = (
        compress(tiny_base, tmp_path / name, use="welore", keep=0.6, whole=name == "whole").folder
        for name in ("thin", "whole")
    )
    with pytest.raises(OSError, match="no file named"):
        AutoModel.from_pretrained(thin)
    with torch.no_grad():
        plain = AutoModel.from_pretrained(whole).eval()(torch.arange(2, 12)[None]).last_hidden_state
    assert torch.allclose(plain, hidden(thin), atol=1e-4) and torch.equal(plain, hidden(whole))
    assert not torch.allclose(plain, hidden(tiny_base), atol=1e-2)  # it was cut


def test_all_kept_is_the_base_itself(tiny_base, tmp_path):
    folder = compress(tiny_base, tmp_path / "all", use="lord", keep=1.0).folder
    assert torch.equal(hidden(folder), hidden(tiny_base))


def test_a_statistic_of_texts_keeps_more_of_what_texts_need(tiny_base, texts, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    reader, model = AutoTokenizer.from_pretrained(tiny_base), AutoModel.from_pretrained(tiny_base).eval()
    given = reader("note 8 says that the film was good", return_tensors="pt")
    with torch.no_grad():
        right = model(**given).last_hidden_state
        off = {}
        for use, more in (("lord", {}), ("lord", {"texts": texts}), ("afm", {"texts": texts})):
            name = f"{use}{len(more)}"
            made = compress(tiny_base, tmp_path / name, use=use, keep=0.4, exclude=["pooler"], **more)
            cut = smaller.pretrained(AutoModel, str(made.folder)).eval()
            off[name] = float((cut(**given).last_hidden_state - right).norm())
    assert off["lord1"] < 0.7 * off["lord0"] and off["afm1"] < 0.7 * off["lord0"]
    told = made.manifest["statistic"]
    assert told == {"kind": "gram", "of": "texts", "texts": 40}
    assert all(0 <= layer["weighted"] <= 1 for layer in made.manifest["layers"].values() if layer["rank"])


def test_the_statistic_is_that_of_the_inputs(tiny_base, texts):
    """The second moments of a layer's inputs over real tokens, each text at the same length, by hand."""
    from fedlora.compressing import load

    loaded, reader = load(tiny_base, None, ["query", "key"], [])
    read = public.read(texts, None)[:20]
    found = public.statistic(loaded.model, loaded.layers, reader, "gram", read, 128)
    name, other = "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key"
    assert np.array_equal(found[name].values, found[other].values)  # of the same inputs
    whole, seen = 0.0, []
    handle = loaded.layers[name].register_forward_hook(lambda layer, given, out: seen.append(given[0][0].double()))
    for text in read:
        with torch.no_grad():
            loaded.model(**reader(text, return_tensors="pt"))
        gram = (seen[-1].T @ seen[-1]).numpy()
        whole = whole + gram / np.linalg.norm(gram)
    handle.remove()
    # Two blocks, each with one matrix for query and key: a length of 1 / sqrt(2) each.
    assert found[name].values == pytest.approx(whole / 20 / np.sqrt(2) * (1 - 1e-4), rel=1e-3, abs=1e-6)


def test_a_model_that_writes_is_judged_before_and_after(tiny_lm, texts, tmp_path, capsys):
    told = ["compress", tiny_lm, "--use", "lord", "--texts", str(texts), "--perplexity", str(texts)]
    assert main([*told, "--out", str(tmp_path / "cut"), "--keep", "0.5"]) == 0
    perplexity = json.loads((tmp_path / "cut" / "manifest.json").read_text())["perplexity"]
    assert 1 < perplexity["before"] and 1 < perplexity["after"] and perplexity["before"] != perplexity["after"]
    assert "perplexity" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    model = smaller.pretrained(AutoModelForCausalLM, str(tmp_path / "cut"))
    assert torch.equal(
        model.lm_head.weight, AutoModelForCausalLM.from_pretrained(tiny_lm).lm_head.weight
    )  # and the head is not cut


def test_weights_that_stand_the_other_way_round_are_cut_too(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    told = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(told).save_pretrained(tmp_path / "gpt2")
    made = compress(str(tmp_path / "gpt2"), tmp_path / "cut", use="lord", keep=0.5)
    assert made.manifest["layers"]["transformer.h.0.attn.c_attn"]["transposed"]
    assert made.manifest["layers"]["transformer.h.0.attn.c_attn"]["shape"] == [48, 16]
    thin = smaller.thinned(smaller.pretrained(AutoModelForCausalLM, str(made.folder)), str(made.folder)).eval()
    whole = smaller.pretrained(AutoModelForCausalLM, str(made.folder)).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(thin(ids).logits, whole(ids).logits, atol=1e-5)
    assert whole.lm_head.weight is whole.transformer.wte.weight  # tied still


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["--use", "lorde"], "--use: unknown compressor 'lorde': did you mean 'lord'"),
        (["--use", "lord", "--keep", "1.5"], "--keep: .*should be above 0 and at most 1"),
        (["--use", "afm"], "--texts: afm goes by gram of texts: name a file of them"),
        (["--use", "fwsvd", "--statistic", "gram"], "--statistic: fwsvd goes by row_fisher or mean"),
        (["--use", "welore", "--texts", "TEXTS"], "--texts: welore goes by the weights alone"),
        (["--use", "lord", "--targets", "nothing"], "--targets: 'nothing' matches no linear layer"),
        (["--use", "lord", "--perplexity", "TEXTS"], "--perplexity: .* writes no text"),
        (["--use", "lord", "--texts", "missing.txt"], "--texts: missing.txt: cannot be read"),
        (["--use", "lord", "--texts", "TEXTS", "--max-length", "999"], "--max-length: should be from 2 to"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tiny_base, texts, tmp_path, capsys, told, why):
    import re

    told = [str(texts) if word == "TEXTS" else word for word in told]
    assert main(["compress", tiny_base, *told, "--out", str(tmp_path / "cut")]) == 2
    said = capsys.readouterr().err
    assert re.search(why, said) and said.count("\n") == 1 and not (tmp_path / "cut").exists()


def test_a_folder_that_is_there_or_was_cut_is_refused(tiny_base, tmp_path):
    folder = compress(tiny_base, tmp_path / "cut", use="lord").folder
    with pytest.raises(UserError, match="is there already"):
        compress(tiny_base, folder, use="lord")
    with pytest.raises(UserError, match=r"BASE: .* was cut already"):
        compress(str(folder), tmp_path / "again", use="lord")


def test_a_folder_that_was_changed_is_refused(tiny_base, tmp_path):
    folder = compress(tiny_base, tmp_path / "cut", use="lord").folder
    file = folder / "factors.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(SettingError, match=r"is not what manifest\.json was written for"):
        hidden(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(SettingError, match="missing or damaged"):
        hidden(folder)


def test_texts_are_lines_or_a_column(tmp_path, reviews):
    assert public.read(reviews, "text")[0].startswith("note 0 says") and len(public.read(reviews, None)) == 240
    with pytest.raises(SettingError, match="no column 'txt'"):
        public.read(reviews, "txt")
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(SettingError, match="holds no text"):
        public.read(tmp_path / "none.txt", None)


def test_what_adds_to_the_base_is_refused(tiny, tiny_base, tmp_path):
    from fedlora import prepare

    folder = compress(tiny_base, tmp_path / "cut", use="lord").folder
    for base in (f"model.base={folder}", "compress={use: lord}"):
        with pytest.raises(SettingError, match="adds to the frozen weights"):
            prepare.check(tiny(base, "strategy={use: flora}", private=False))
    with pytest.raises(SettingError, match="adds to the frozen weights"):
        prepare.check(tiny(f"model.base={folder}", "model.adapter.schedule={kind: rotate}"))
    with pytest.raises(UserError, match=r"model.quantize.*factors, in full"):
        from fedlora import simulate

        simulate(tiny(f"model.base={folder}", "model.quantize=8bit"), out=tmp_path / "run")
