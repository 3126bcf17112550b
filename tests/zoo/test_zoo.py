"""Each model trains with the right loss and gradient of every example, or is refused in one line."""

import logging

import numpy as np
import pytest
import torch

from fedlora.client import Pass
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.passes import alone
from fedlora.passes.fused import Fused
from fedlora.tasks.classification import Classification
from fedlora.tasks.loading import build
from tests.zoo.models import PAD, UNFIT, VOCABULARY, away, make, plain, privately, singles, texts

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's layers
LENGTHS = (31, 5, 17, 2, 8)
QUICK = ("bert", "deberta-v3", "modernbert", "mpnet", "gpt2", "opt", "falcon-alibi", "llama-lm", "bart")


@pytest.mark.parametrize("name", QUICK)
def test_losses_and_gradients_are_those_of_each_example_alone(name):
    """To 1e-5 of the largest, against plain transformers and peft without padding."""
    task, model = make(name, private=True)
    examples, adapter = texts(LENGTHS, ends=name in ("t5", "bart")), away(task)
    losses, gradients = singles(task, model, examples, adapter)
    found = privately(task, adapter, examples)
    task.begin(adapter, ())
    with torch.no_grad():
        together = task.losses(task.batch(examples, np.arange(len(examples))))
    torch.testing.assert_close(together, losses, rtol=1e-5, atol=1e-5 * float(losses.max()))
    assert float(((found - gradients).norm(dim=1) / gradients.norm(dim=1)).max()) < 1e-5
    assert float(gradients.norm(dim=1).min()) > 1e-3


@pytest.mark.parametrize("name", ("flattened", "expert", "sideways", "unmasked", "switches"))
def test_a_model_whose_examples_are_not_apart_is_refused_under_privacy(name):
    with pytest.raises(SettingError, match=UNFIT[name][3]) as told:
        make(name, private=True)
    assert told.value.key == "model.base" and "\n" not in str(told.value)


@pytest.mark.parametrize("name", ("flattened", "unmasked"))
def test_without_privacy_it_trains_and_is_warned_about_where_results_depend_on_padding(name, caplog):
    with caplog.at_level(logging.WARNING):
        task, model = make(name)
    examples, adapter = texts(LENGTHS), away(task)
    losses, _ = singles(task, model, examples, adapter)
    task.begin(adapter, ())
    with torch.no_grad():
        together = task.losses(task.batch(examples, np.arange(len(examples))))
    right = bool((together - losses).abs().max() < 1e-5 * losses.abs().max())
    assert right is ("not to be relied on" not in caplog.text)


@pytest.mark.parametrize("name", ["albert", "stablelm", "opt-lm", "gemma2", "gpt-oss", "llama4"])
def test_models_pack_whatever_they_hand_on_to_their_layers(name):
    """A pooler of one layer, blocks that hand nothing on, a body within the body, scores that are bent."""
    task, model = make(name)
    examples, adapter = texts(LENGTHS), away(task)
    losses, _ = singles(task, model, examples, adapter)
    task.begin(adapter, ())
    with torch.no_grad():
        packed = task.losses(task.batch(examples, np.arange(len(examples))))
    assert task.packing is not None
    torch.testing.assert_close(packed, losses, rtol=1e-5, atol=1e-5 * float(losses.max()))


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize(
    "name",
    ["deberta-v3", *(pytest.param(n, marks=pytest.mark.zoo) for n in ("deberta-v1", "llama", "gpt2"))],
)
def test_clients_that_share_passes_have_the_losses_and_gradients_of_each_example(name, private):
    """Three clients, of two, one and four examples."""
    task, model = make(name)
    groups, examples = ([0, 1], [2], [3, 4, 5, 6]), texts((9, 4, 12, 3, 7, 5, 2))
    adapters = [{n: t + np.float32(0.05 * k) for n, t in away(task).items()} for k in range(3)]

    def work(k):
        parameters = task.begin(adapters[k], tuple(sorted(task.layout)))
        loss = yield Pass(task.batch(examples, np.array(groups[k])), singly=private)
        found = [p.grad_sample if private else p.grad for p in parameters]
        return float(loss), torch.cat([g.flatten(1 if private else 0) for g in found], 1 if private else 0)

    made = Fused(task).run(task.rank, [work(k) for k in range(3)])
    for k, (loss, gradient) in enumerate(made):
        losses, gradients = singles(task, model, examples, adapters[k])
        expected = gradients[groups[k]] if private else gradients[groups[k]].sum(0)
        assert loss == pytest.approx(float(losses[groups[k]].sum()), rel=1e-5)
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_clients_cannot_share_passes_of_a_layer_that_does_not_see_examples_one_by_one():
    with pytest.raises(SettingError, match="fc1 runs on") as told:
        Fused(make("flattened")[0])
    assert told.value.key == "engine.fused"


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_one_more_example_moves_the_clipped_sum_by_the_bound_at_most(count):
    """DeBERTa v3, whose layers also run on a table that all examples share."""
    task, _ = make("deberta-v3")
    adapter, lengths = away(task), (9, 4, 12, 3, 7, 5, 2, 8, 6)
    with_it, without = (privately(task, adapter, texts(lengths[:n])) for n in (count + 1, count))
    bound = float(with_it.norm(dim=1).median())
    clipped = [(g * (bound / g.norm(dim=1)).clamp(max=1)[:, None]).sum(0) for g in (with_it, without)]
    assert float((clipped[0] - clipped[1]).norm()) < bound * 1.0001


@pytest.mark.parametrize("name, precision", [("falcon-alibi", "bf16"), ("bloom", "bf16"), ("bert", "fp32")])
def test_positions_over_the_whole_row_are_seen_by_what_they_do(name, precision, monkeypatch):
    """Were it not for the configuration that tells, the row of the check would."""
    monkeypatch.setattr(alone, "_unfit", lambda task, max_length: "")
    made, _ = make(name, precision=precision, max_length=48)
    assert (made.packing is not None) is (name == "bert")


@pytest.mark.parametrize("pad", [0, 1, VOCABULARY - 1])
def test_the_check_has_examples_of_many_tokens_wherever_the_padding_id_lies(pad):
    task, _ = make("gpt2", pad=pad, special=(pad, 7))
    made = task.samples(32, {pad, 7})
    assert made.lengths(np.arange(len(made))).tolist() == [2, 5, 13, 16, 32]
    held = set(made.tokens.tolist())
    assert len(held) > 50 and not held & {pad, 7, 0, 2} and max(held) < VOCABULARY


@pytest.mark.parametrize("private", [False, True])
def test_a_model_that_draws_random_numbers_is_not_relied_on(private, caplog):
    """Dropout that no configuration turns off."""
    model = plain("bert")
    layer = model.bert.encoder.layer[0].output
    layer.LayerNorm = torch.nn.Sequential(layer.LayerNorm, Noisy())

    def load():
        return build(
            Classification, model, Lora(4, 8, ("query",)), heads={"classifier": True}, seed=3, private=private
        )

    if private:
        with pytest.raises(SettingError, match="something else of the same example a second time"):
            load()
    else:
        with caplog.at_level(logging.WARNING):
            load()
        assert "a second time" in caplog.text


class Noisy(torch.nn.Module):
    def forward(self, x):
        return x + torch.randn(x.shape) if self.training else x


def test_dropout_of_a_module_of_its_own_is_off_too():
    model = plain("bert")
    layer = model.bert.encoder.layer[0].output
    layer.LayerNorm = torch.nn.Sequential(layer.LayerNorm, torch.nn.Dropout(0.5))
    task = build(
        Classification,
        model,
        Lora(4, 8, ("query",)),
        heads={"classifier": True},
        seed=3,
        pad=PAD,
        private=True,
        max_length=32,
    )
    assert task.packing is not None


def test_a_model_whose_packing_fails_is_as_it_was():
    """MPNet takes no rows; no hook of the attempt stays."""
    task, _ = make("mpnet")
    body = task.model.get_base_model().mpnet
    assert not body._forward_pre_hooks and not body._forward_hooks
    assert task.logits(task.batch(texts((5, 3, 9)), np.arange(3))).shape == (3, 3)


def test_what_a_layer_gives_may_be_changed_in_place():
    model = plain("bert")
    task = build(Classification, model, Lora(4, 8, ("query",)), heads={"classifier": True}, seed=3, pad=PAD)
    query = task.model.get_base_model().bert.encoder.layer[0].attention.self.query
    (query(torch.randn(2, 3, 32, requires_grad=True)).mul_(2.0)).sum().backward()
