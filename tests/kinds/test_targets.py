"""Which layers are meant, and the words where none is."""

import numpy as np
import pytest
import torch
import transformers as hf

from fedlora.errors import ScenarioError, SettingError
from fedlora.kinds.lora import Lora
from fedlora.kinds.lora_xs import LoraXS
from fedlora.kinds.targets import choose, is_pattern
from fedlora.tasks import loading
from tests.zoo.models import plain

QUERIES = {f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)}
VALUES = {name.replace("query", "value") for name in QUERIES}


@pytest.fixture(scope="module")
def bert():
    return plain("bert")


@pytest.mark.parametrize(
    "targets, more, meant",
    [
        (["query", "value"], {}, QUERIES | VALUES),
        (["self.query"], {}, QUERIES),
        ([r".*\.(query|value)"], {}, QUERIES | VALUES),
        ([r".*layer\.1\..*(query|value)"], {}, {n for n in QUERIES | VALUES if ".1." in n}),
        (["query", "value"], {"exclude": ["value"]}, QUERIES),
        (
            ["query", "value"],
            {"exclude": ["layer.0"], "layers": None},
            {n for n in QUERIES | VALUES if ".1." in n},
        ),
        (["query", "value"], {"exclude": [r".*0.*query"]}, {n for n in QUERIES if ".1." in n} | VALUES),
        (["all-linear"], {"exclude": ["output", "intermediate", "pooler", "key"]}, QUERIES | VALUES),
        ([r".*query"], {"layers": [1]}, {n for n in QUERIES if ".1." in n}),
    ],
    ids=lambda told: str(sorted(told) if isinstance(told, set) else told),
)
def test_names_ends_patterns_and_what_is_left_out(bert, targets, more, meant):
    assert set(choose(bert, ["classifier"], targets, **more)) == meant


@pytest.mark.parametrize("name, last", [("llama-lm", "lm_head"), ("gpt2", "score"), ("gpt2-lm", "lm_head")])
def test_all_linear_leaves_out_heads_and_what_puts_out_tokens(name, last):
    model = plain(name)
    found = choose(model, [] if "lm" in name else ["score"], ["all-linear"])
    layers = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert sorted([*found, last]) == sorted(layers)


@pytest.mark.parametrize(
    "name, told, key, said",
    [
        (
            "bert",
            {"targets": ["q_proj"]},
            "targets",
            r"'q_proj' matches no linear layer .*its layers are .*'query'",
        ),
        ("bert", {"targets": [r".*q_proj"]}, "targets", "matches no linear layer"),
        ("bert", {"targets": ["classifier"]}, "targets", "matches no linear layer"),
        ("bert", {"targets": ["word_embeddings"]}, "targets", "is Embedding, and factors stand beside linear"),
        ("qwen-moe", {"targets": ["experts.gate_up_proj"]}, "targets", "of all experts together"),
        ("bert", {"targets": ["query"], "exclude": ["tower"]}, "exclude", "'tower' is the name of no part"),
        ("bert", {"targets": ["query"], "exclude": ["encoder"]}, "targets", "all that is named is excluded"),
        ("bert", {"targets": ["query"], "layers": [7]}, "layers", "no layer 7 with targets"),
    ],
)
def test_what_is_not_there_is_told(name, told, key, said):
    heads = ["classifier"] if name == "bert" else []
    with pytest.raises(SettingError, match=said) as caught:
        choose(plain(name), heads, **told)
    assert caught.value.key == f"model.adapter.{key}" and "\n" not in str(caught.value)


def test_a_model_of_convolutions_alone_is_told():
    model = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(SettingError, match="has no linear layers, and 8 convolutions"):
        choose(model, ["classifier"], ["q_proj"])


@pytest.mark.parametrize("target", ["out_proj", "all-linear"])
def test_what_peft_takes_no_factors_for_is_told(target):
    with pytest.raises(SettingError, match=r"'out_proj' is incompatible with Mamba.*model.adapter.exclude"):
        Lora(4, 8, (target,)).wrap(plain("mamba"), [], "CAUSAL_LM")


@pytest.mark.parametrize("target, one", [("q_proj", False), ("a.b-c", False), (".*q", True), ("(a|b)", True)])
def test_a_pattern_is_what_holds_more_than_a_name_does(target, one):
    assert is_pattern(target) is one


def test_one_target_alone_is_written_without_a_list_and_a_broken_pattern_is_told(tiny):
    assert tiny("model.adapter.targets=all-linear").model.adapter.targets == ("all-linear",)
    assert tiny("model.adapter.exclude=pooler").model.adapter.exclude == ("pooler",)
    with pytest.raises(ScenarioError, match=r"'\*q' is not a regular expression"):
        tiny("model.adapter.targets=['*q']")


@pytest.mark.parametrize("kind", [Lora, LoraXS])
def test_rslora_divides_by_the_root_of_each_clients_own_rank(kind):
    """8 / sqrt(4) = 4 for the server, 8 / sqrt(1) = 8 for a client of rank 1."""
    made = kind(4, 8.0, ("query",), rslora=True)
    assert (made.scaling(), made.scaling(1), kind(4, 8.0, ("query",)).scaling(1)) == (4.0, 8.0, 8.0)
    model = made.wrap(plain("bert"), ["classifier"], "SEQ_CLS")
    layer = next(iter(made.held(model).values()))
    assert layer.scaling["default"] == 4.0 and model.peft_config["default"].use_rslora
    made.rescale(layer, 1)
    assert layer.scaling["default"] == 8.0


def test_plain_peft_has_the_layers_that_were_meant_even_where_names_end_alike(tmp_path):
    """`0.fc` is the end of `tower.0.fc` too, which is left out."""
    from peft import LoraConfig

    class Twice(hf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.fc = torch.nn.Linear(4, 4)
            self.tower = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})

        def get_output_embeddings(self):
            return None

    wrapped = Lora(2, 2.0, ("fc",), exclude=("tower",)).wrap(Twice(hf.BertConfig()), [], None)
    assert [n for n, m in wrapped.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.fc"]
    wrapped.peft_config["default"].save_pretrained(str(tmp_path))
    assert LoraConfig.from_pretrained(str(tmp_path)).target_modules == "fc"


def test_a_client_of_a_lower_rank_is_the_server_s_with_the_rest_zero_and_its_own_factor(tiny_base):
    """Of rank 2 in 4 the factor is 8 / sqrt(2), so B grows by sqrt(2) where it is read at 8 / sqrt(4)."""
    kind = Lora(4, 8.0, ("query",), rslora=True)
    task = loading.load("classification", tiny_base, kind, labels=("bad", "good"), seed=3, max_length=16)
    small, wide = {}, {}
    rng = np.random.default_rng(0)
    for name, slot in task.layout.items():
        small[name] = (0.3 * rng.standard_normal(kind.shape(slot, 2))).astype(np.float32)
        pad = [(0, full - own) for full, own in zip(slot.shape, small[name].shape, strict=True)]
        wide[name] = np.pad(small[name], pad) * np.float32(2**0.5 if slot.role == "B" else 1)
    batch = task.batch(task.trial, np.arange(len(task.trial)))
    logits = []
    for rank, adapter in ((2, small), (4, wide)):
        task.become(rank)
        task.begin(adapter, ())
        with torch.no_grad():
            logits.append(task.logits(batch))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
