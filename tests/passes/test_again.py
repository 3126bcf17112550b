"""Gradient checkpointing changes no gradient of an example, and does run blocks again."""

import numpy as np
import pytest
import torch

from fedlora.client import Pass
from fedlora.errors import SettingError
from fedlora.kinds import contract
from fedlora.passes.fused import Fused
from fedlora.tasks import loading
from tests.zoo.models import away, make, privately, texts

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's layers
LENGTHS = (31, 5, 17, 2, 8)


def blocks(task):
    """Counts the passes through the layer of one block that has factors."""
    name, layer = list(task._layers.items())[-1]
    inner, calls = layer.forward, []

    def counted(*args, **told):
        calls.append(name)
        return inner(*args, **told)

    layer.forward = counted
    return calls


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "gpt2", "llama-lm"])
def test_the_gradient_of_each_example_is_the_same(name):
    """Packed, with a shared table, by Opacus's hooks, and scored token by token."""
    one, again = (make(name, private=True, checkpointing=asked)[0] for asked in (False, True))
    assert (one.packing is None) is (again.packing is None)
    examples, adapter, calls = texts(LENGTHS), away(one), blocks(again)
    found, expected = (privately(task, adapter, examples) for task in (again, one))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert len(calls) == (4 if name == "deberta-v3" else 2)  # there once for tokens and once for positions


@pytest.mark.parametrize("kind", ["lora", "lora_xs"])
def test_of_a_kind_whose_tensors_lie_inside_of_blocks_too(kind, tiny_base):
    told = dict(labels=("bad", "good"), seed=3, max_length=16, private=True)
    made = contract.load(kind, 4, 8.0, ("query", "value"), None)
    one, again = (
        loading.load("classification", tiny_base, made, **told, checkpointing=asked) for asked in (False, True)
    )
    adapter = away(one)
    from fedlora.passes.gradients import apart

    names = tuple(n for n, slot in one.layout.items() if slot.trainable)
    both = [apart(task, adapter, names, task.batch(one.trial, np.arange(len(one.trial)))) for task in (one, again)]
    for mine, right in zip(*both, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)


def test_clients_that_share_passes_have_their_own_gradients_too():
    one, again = (make("llama-lm", checkpointing=asked)[0] for asked in (False, True))
    examples, groups = texts(LENGTHS), ([0, 1], [2, 3, 4])
    adapter = away(one)

    def work(task, k):
        parameters = task.begin(adapter, tuple(sorted(task.layout)))
        yield Pass(task.batch(examples, np.array(groups[k])), singly=True)
        return torch.cat([p.grad_sample.flatten(1) for p in parameters], 1)

    both = [Fused(task).run(task.rank, [work(task, k) for k in (0, 1)]) for task in (one, again)]
    for mine, right in zip(*both, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)


def test_evaluation_keeps_nothing_and_so_makes_nothing_again():
    task, _ = make("llama-lm", checkpointing=True)
    calls = blocks(task)
    task.evaluate(away(task), texts((5, 3)), np.arange(2))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["albert", "mpnet"])
def test_a_model_that_has_none_is_told(name):
    with pytest.raises(SettingError, match=r"no checkpoints for \w+: leave it out") as told:
        make(name, checkpointing=True)
    assert told.value.key == "model.checkpointing"


def test_a_scenario_asks_for_it(build, tiny):
    assert tiny().model.checkpointing is False
    assert build("model.checkpointing=true").task.model.get_base_model().is_gradient_checkpointing
