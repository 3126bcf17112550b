"""Units of an MLP chosen and made up for, by hand; a gated MLP, one that stands the other way round, and noise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import simulate
from fedlora.compressing import compress
from fedlora.compressors.contract import Statistic
from fedlora.compressors.modegpt import MoDeGPT, narrowed
from fedlora.compressors.noised import symmetric
from fedlora.errors import SettingError, UserError


def test_a_unit_that_is_twice_another_is_made_up_for_by_hand():
    """h3 = 2 h1, and h2 is apart: C = [[1, 0, 2], [0, 1, 0], [2, 0, 4]]. Of h1 and h3 the larger one stays.

    What W_d reads of h1 is half of h3 then, so its column goes there: W_d = [1, 1, 1] becomes [1, 1 + 1/2].
    """
    gram = np.array([[1.0, 0, 2], [0, 1, 0], [2, 0, 4]])
    units, mended, error = narrowed(np.ones((1, 3)), *symmetric(gram, 0.0), 2)
    assert units.tolist() == [1, 2] and mended == pytest.approx(np.array([[1.0, 1.5]]), abs=1e-4)
    assert error == pytest.approx(0, abs=1e-4)


def test_where_all_units_are_alike_those_stay_that_weigh_most():
    units, mended, error = narrowed(np.array([[1.0, 3, 2]]), *symmetric(np.eye(3), 0.0), 2)
    assert units.tolist() == [1, 2] and mended == pytest.approx(np.array([[3.0, 2]]), rel=1e-5)
    assert error == pytest.approx((1 / 14) ** 0.5)  # 1 of 1 + 9 + 4


@given(seed=st.integers(0, 2**16), kept=st.integers(1, 11))
def test_no_other_layer_does_better_with_these_units(seed, kept):
    rng = np.random.default_rng(seed)
    h, weight = rng.standard_normal((50, 12)) * np.geomspace(1, 0.1, 12), rng.standard_normal((5, 12))
    units, mended, error = narrowed(weight, *symmetric(h.T @ h / 50, 0.0), kept)
    best, *_ = np.linalg.lstsq(h[:, units], h @ weight.T, rcond=None)
    least = np.linalg.norm(h[:, units] @ best - h @ weight.T) / np.linalg.norm(h @ weight.T)
    assert error == pytest.approx(least, abs=1e-4) and (np.diff(units) > 0).all()
    found = np.linalg.norm(h[:, units] @ mended.T - h @ weight.T) / np.linalg.norm(h @ weight.T)
    assert found == pytest.approx(error, abs=1e-5)


def test_noise_that_drowns_the_gram_leaves_the_choice_to_the_weights():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((8, 8))
    statistic = Statistic("gram", np.eye(8) / 8 + (noise + noise.T) / 2, deviation=1.0)
    weight = np.arange(1.0, 9.0)[None]
    units, *_ = narrowed(weight, *symmetric(statistic.values, statistic.deviation), 4)
    assert units.tolist() == [4, 5, 6, 7]


def gpt2(folder, tiny_base):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    told = GPT2Config(vocab_size=30522, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    GPT2LMHeadModel(told).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "public.txt"
    words = "the a film note good bad was is very in on of town seen people".split()
    rng = np.random.default_rng(0)
    file.write_text("".join(" ".join(rng.choice(words, 9)) + "\n" for _ in range(30)))
    return file


@pytest.mark.parametrize("base", ["tiny_base", "tiny_lm", "gpt2"])
def test_units_that_nothing_hangs_on_go_without_a_trace(base, request, tiny_base, texts, tmp_path):
    """Half of the units of each MLP are made silent; without them the model says the same."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from fedlora.compressors.pruner import mlps, turned

    folder = gpt2(tmp_path / "gpt2", tiny_base) if base == "gpt2" else request.getfixturevalue(base)
    auto = AutoModelForMaskedLM if base == "tiny_base" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    _, units, found = mlps(model)
    silent = torch.arange(0, units, 2)
    for mlp in found:
        for layer in map(model.get_submodule, mlp.ups):
            (layer.weight.data.T if turned(layer) else layer.weight.data)[silent] = 0
            if layer.bias is not None:
                layer.bias.data[silent] = 0
    model.save_pretrained(tmp_path / "base")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    made = compress(str(tmp_path / "base"), tmp_path / "cut", use="modegpt", keep=0.5, texts=texts)
    cut = auto.from_pretrained(made.folder).eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.allclose(cut(ids).logits, model(ids).logits, atol=2e-3)
    assert all(layer["rank"] == units // 2 for layer in made.manifest["layers"].values())
    assert max(layer["error"] for layer in made.manifest["layers"].values()) < 1e-3


def test_a_private_run_narrows_its_base_and_anything_may_be_added_to_it(tiny, tmp_path):
    """Only the layers after the units have a statistic, so that each example's part of it is the larger."""
    told = (
        "compress={use: modegpt, keep: 0.5}",
        "statistics={kind: gram, epsilon: 2}",
        "strategy={use: fedex_lora}",
    )
    run = simulate(tiny(*told), out=tmp_path / "run")
    cut = run.summary["compress"]
    assert (cut["layers"], cut["became"]) == ("2 MLPs", "narrower") and run.summary["epsilon"] <= 8
    assert cut["parameters"]["before"] - cut["parameters"]["after"] == 2 * 32 * (33 + 32)
    half = 4 * 2 * (64 * 65 // 2)  # bytes of 2 layers, half of 64 x 64 each
    assert 4 * half < cut["statistic"]["bytes_up"] < 4 * (half + 1000)  # of 4 clients, with what says what it is
    assert "2 MLPs narrower" in (run.folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (
            {"statistics": "{kind: gram, epsilon: 2, layers: [1]}"},
            "all parts are cut alike, and .* has no statistic",
        ),
        ({"compress": "{use: modegpt, exclude: [output.dense]}"}, "cuts all blocks alike, and .* is left out"),
    ],
)
def test_some_of_the_blocks_are_refused_before_anybody_pays(tiny, tmp_path, told, why):
    asked = {"compress": "{use: modegpt}", "statistics": "{kind: gram, epsilon: 2}", **told}
    with pytest.raises(UserError, match=why):
        simulate(tiny(*(f"{key}={value}" for key, value in asked.items())), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experts_are_no_mlp(tmp_path):
    from transformers import MixtralConfig, MixtralModel

    told = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(SettingError, match="has no MLP of two or three layers with units"):
        MoDeGPT(keep=0.5).goes_by(MixtralModel(told), [])
