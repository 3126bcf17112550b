"""What every pruner promises: an ordinary folder, and in it a smaller model of the same make."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fedlora import plugins
from fedlora.compressing import compress
from fedlora.compressors.pruner import Pruner
from fedlora.errors import UserError

NAMES = [name for name in plugins.names("compressors") if issubclass(plugins.find("compressors", name), Pruner)]
BASES = pytest.mark.parametrize("base", ["tiny_base", "tiny_lm"])
CLASSES = {"tiny_base": AutoModel, "tiny_lm": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "public.txt"
    file.write_text("".join(f"note {i} says that the film was {'good' if i % 2 else 'bad'}\n" for i in range(40)))
    return file


def out(model):
    with torch.no_grad():
        return model.eval()(torch.arange(2, 12)[None])[0]


@pytest.mark.parametrize("name", NAMES)
@BASES
def test_transformers_loads_it_and_it_is_as_small_as_it_says(name, base, request, texts, tmp_path):
    folder = request.getfixturevalue(base)
    made = compress(folder, tmp_path / "cut", use=name, keep=0.5, texts=texts)
    whole, model = CLASSES[base].from_pretrained(folder), CLASSES[base].from_pretrained(made.folder)
    told = made.manifest["parameters"]
    assert told["before"] == whole.num_parameters() and told["after"] == model.num_parameters() < told["before"]
    assert type(model) is type(whole) and out(model).shape == out(whole).shape
    assert torch.isfinite(out(model)).all() and not torch.allclose(out(model), out(whole), atol=1e-3)
    assert made.manifest["loads_without_fedlora"] and json.loads((made.folder / "manifest.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@BASES
def test_all_kept_is_the_base_itself(name, base, request, texts, tmp_path):
    folder = request.getfixturevalue(base)
    made = compress(folder, tmp_path / "all", use=name, keep=1.0, texts=texts)
    load = CLASSES[base].from_pretrained
    assert torch.equal(out(load(made.folder)), out(load(folder)))
    assert all(layer["rank"] is None and layer["error"] == 0 for layer in made.manifest["layers"].values())


@pytest.mark.parametrize("name", NAMES)
def test_without_texts_it_says_what_it_needs(name, tiny_base, tmp_path):
    with pytest.raises(UserError, match=rf"--texts: {name} goes by .*texts: name a file of them"):
        compress(tiny_base, tmp_path / "cut", use=name)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_base_of_two_lists_of_blocks_is_refused(name, texts, tmp_path, tiny_base):
    from transformers import AutoTokenizer, T5Config, T5Model

    told = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5Model(told).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"--use: the model has 2 lists of blocks, and needs one: take lord"):
        compress(str(tmp_path / "t5"), tmp_path / "cut", use=name, texts=texts)
    assert not (tmp_path / "cut").exists()
