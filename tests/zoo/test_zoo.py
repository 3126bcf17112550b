"""Each model trains with the right loss and gradient of every example, or is refused in one line."""

import logging

import numpy as np
import pytest
import torch

from fedlora.errors import SettingError
from tests.zoo.models import FIT, UNFIT, away, make, privately, singles, texts

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's layers
LENGTHS = (31, 5, 17, 2, 8)
QUICK = ("bert", "deberta-v3", "modernbert", "mpnet", "gpt2", "opt", "falcon-alibi", "llama-lm", "bart")


def some(names, quick):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.zoo) for n in names]


@pytest.mark.parametrize("name", some(FIT, QUICK))
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


@pytest.mark.parametrize("name", some(UNFIT, ("flattened", "expert", "sideways", "unmasked", "switches")))
def test_a_model_whose_examples_are_not_apart_is_refused_under_privacy(name):
    with pytest.raises(SettingError, match=UNFIT[name][3]) as told:
        make(name, private=True)
    assert told.value.key == "model.base" and "\n" not in str(told.value)


@pytest.mark.parametrize("name", some(UNFIT, ("flattened", "unmasked")))
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
