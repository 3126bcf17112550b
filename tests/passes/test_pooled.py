"""Encoder-decoders that pool at the token that ends a text: one text that spells it changes no other."""

import numpy as np
import pytest
import torch

from fedlora.data.store import Examples
from tests.zoo.models import away, make, privately, singles

END = 2


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
