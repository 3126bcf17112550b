"""What a head reads: the mean over a text's own tokens, or the token that ends it; no text changes another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlora.data.store import Examples
from fedlora.errors import SettingError
from fedlora.passes import pooled
from tests.zoo.models import away, make, plain, privately, singles, texts

END = 2


class States(torch.nn.Module):
    """A body of given states."""

    def forward(self, states, attention_mask=None):
        class Output(SimpleNamespace):
            def __contains__(self, name):
                return hasattr(self, name)

        return Output(last_hidden_state=states, pooler_output=states[:, 0])


def test_the_mean_is_over_a_text_s_own_tokens():
    """(1, 2) and (3, 6) of the first, whose padding holds 9; all three of the second, whose mean is (2, 0)."""
    pooled.Mean(body := States())
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[1.0, 1.0], [2.0, -1.0], [3.0, 0.0]]])
    out = body(states, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert out.pooler_output.tolist() == [[2.0, 4.0], [2.0, 0.0]]
    assert out.last_hidden_state.tolist() == [[[2.0, 4.0]], [[2.0, 0.0]]]
    assert body(states[1:]).pooler_output.tolist() == [[2.0, 0.0]]  # without a mask no token is padding


@pytest.mark.parametrize(
    ("name", "packs"),
    [
        ("bert", True),
        ("roberta", True),
        ("distilbert", True),
        ("electra", True),
        ("modernbert", True),
        ("albert", True),
        ("deberta-v3", False),
        ("mpnet", False),
    ],
)
def test_a_model_that_reads_the_mean_does_so_alone_packed_and_privately(name, packs):
    """Losses and gradients of single examples are those of plain peft with the code of the card."""
    task, alone = make(name, private=True, pooling="mean")
    assert (task.packing is not None) == packs
    data, adapter = texts([9, 2, 30, 5]), away(task)
    losses, gradients = singles(task, alone, data, adapter)
    task.begin(adapter, ())
    with torch.no_grad():
        torch.testing.assert_close(task.losses(task.batch(data, np.arange(4))), losses, rtol=1e-4, atol=1e-5)
    found = privately(task, adapter, data)
    assert float(((found - gradients).norm(dim=1) / gradients.norm(dim=1)).max()) < 1e-3
    first, _ = make(name, private=True, pooling="cls")
    first.begin({n: t for n, t in adapter.items() if n in first.layout}, ())
    with torch.no_grad():
        assert (first.losses(first.batch(data, np.arange(4))) - losses).abs().max() > 1e-3


def test_a_prefix_lies_below_a_mean_too():
    task, alone = make("bert", private=True, pooling="mean", layers=[1])
    data, adapter = texts([4, 7, 3]), away(task)
    losses, _ = singles(task, alone, data, adapter)
    task.begin(adapter, ())
    states = task.below(data, np.arange(3), False)[0].numpy()
    task.prefix.kept = lambda examples: states
    batch = task.batch(data, np.arange(3))
    assert "prefix" in batch
    with torch.no_grad():
        torch.testing.assert_close(task.losses(batch), losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_reads_the_last_token_is_refused(name, pooling):
    with pytest.raises(SettingError, match=r"model.pooling: \w+ is no encoder .* leave model.pooling out"):
        pooled.pool(plain(name), pooling)
    pooled.pool(plain(name), None)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_text_that_holds_the_token_passes_beside_others_as_it_does_alone(name):
    """The texts have it once, three times and twice."""
    task, alone = make(name, private=True)
    rows = [[7, 8, 9, END], [7, END, 11, END, 12, END], [20, END, END]]
    data = Examples(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)]), np.array([0, 1, 2]))
    adapter = away(task)
    losses, gradients = singles(task, alone, data, adapter)
    task.begin(adapter, ())
    with torch.no_grad():
        together = task.losses(task.batch(data, np.arange(3)))
    torch.testing.assert_close(together, losses, rtol=1e-5, atol=1e-6)
    found = privately(task, adapter, data)
    assert float(((found - gradients).norm(dim=1) / gradients.norm(dim=1)).max()) < 1e-4
