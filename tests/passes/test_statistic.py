"""What an example adds to a statistic: at most its bound, alone, packed or padded, whatever the others are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ContractError, UserError
from fedlora.passes.packing import Segments
from fedlora.passes.statistic import Collector

WIDTH = 6


class Two(torch.nn.Module):
    """Two layers that share their input, and one behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(x) + self.b(x))


MODEL = Two()
LAYERS = {name: getattr(MODEL, name) for name in "abc"}


def collector(kind, find=lambda x: None, layers=LAYERS):
    def trial():
        MODEL(torch.randn(3, 4, WIDTH, requires_grad=True))
        return 3

    return Collector(layers, kind, find if find(torch.zeros(1)) is None else lambda x: None, trial)


def collect(made, x, weights, mask=None, find=None):
    """The sums of a batch (examples, tokens, width)."""
    if find is not None:
        made.find = find
    with made.adding(weights, mask):
        loss = (MODEL(x.requires_grad_(True)) ** 2).sum()
        if made.kind == "row_fisher":
            loss.backward()
    return made.take()


def length(sums):
    return np.sqrt(sum((total**2).sum() for total in sums.values()))


KINDS = ["gram", "mean", "row_fisher"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-4, 1.0, 1e4]), count=st.integers(1, 5))
def test_one_example_moves_all_sums_together_by_at_most_its_weight(kind, seed, scale, count):
    rng = torch.Generator().manual_seed(seed)
    x = scale * torch.randn((count, 4, WIDTH), generator=rng)
    weights = [1.0, 0.5, 0.25, 1.0, 1.0][:count]
    made = collector(kind)
    whole = collect(made, x, weights)
    for i, weight in enumerate(weights):
        others = [j for j in range(count) if j != i]
        without = collect(made, x[others], [weights[j] for j in others]) if others else made.take()
        moved = length({name: whole[name] - without[name] for name in whole})
        assert (
            moved <= weight * (1 + 1e-6) + 1e-5 and moved >= 0.999 * weight - 1e-5
        )  # and alike, whatever its size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 512])
def test_an_example_of_tiny_numbers_is_not_scaled_up_beyond_its_bound(kind, tokens):
    """Squares of which float32 keeps a digit or none, in most places, and one place that is a little larger."""
    layer = torch.nn.Linear(300, 2, bias=False)

    def trial():
        layer(torch.ones(2, 3, 300).requires_grad_(True))
        return 2

    made = Collector({"layer": layer}, kind, lambda x: None, trial)
    for small in np.logspace(-9, -34, 26):
        x = torch.ones(1, tokens, 300)
        x[0, 0, 0] = 1.25
        x = x if kind == "row_fisher" else x * float(small)
        with made.adding([1.0]):
            y = layer(x.requires_grad_(True))
            if kind == "row_fisher":
                (y.sum() * float(small)).backward()
        found = length(made.take())
        assert found <= 1 and (small < 1e-28 or found > 0.999) and (small > 1e-32 or found == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_one_by_one_are_the_same(kind):
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    x = torch.randn(3, 4, WIDTH)
    weights = [1.0, 0.5, 1.0]
    made = collector(kind)
    alone = {name: np.zeros_like(total) for name, total in made.sums.items()}
    for i, weight in enumerate(weights):
        one = collect(made, x[i : i + 1, : int(mask[i].sum())].clone(), [weight])
        alone = {name: alone[name] + one[name] for name in one}
    # The loss of padding is no loss: as in a model that masks it.
    with made.adding(weights, mask):
        loss = (MODEL(x.clone().requires_grad_(True)) ** 2)[mask].sum()
        if kind == "row_fisher":
            loss.backward()
    padded = made.take()
    lies = Segments(mask)
    packed = collect(made, lies.row(x), weights, find=lambda t: lies)
    for other in (padded, packed):
        assert all(other[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6) for name in alone)


def test_a_gram_is_shared_by_layers_of_the_same_inputs():
    made = collector("gram")
    assert made.shared == {"a": "a", "b": "a", "c": "c"} and made.sums["a"].shape == (WIDTH, WIDTH)
    assert collector("row_fisher").shared == {name: name for name in "abc"}  # gradients differ
    assert collector("mean").sums["c"].shape == (WIDTH,)


def test_numbers_by_hand():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0]])
    x = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    bound = 1 - 1e-4
    for kind, right in (
        ("gram", np.diag([9.0, 16.0]) / np.hypot(9, 16)),
        ("mean", np.array([9.0, 16.0]) / np.hypot(9, 16)),
        (
            "row_fisher",
            np.array([9.0, 16.0]) / np.hypot(9, 16),
        ),  # of the sum of outputs: g = 1, and (3, 4) squared
    ):
        made = Collector({"x": layer}, kind, lambda t: None, lambda: len(layer(torch.ones(2, 1, 2))))
        with made.adding([1.0]):
            layer(x.clone().requires_grad_(True)).sum().backward()
        assert made.take()["x"] == pytest.approx(bound * right, rel=1e-5)


def test_an_example_that_is_not_finite_or_empty_adds_nothing():
    x = torch.ones(3, 2, WIDTH)
    x[0, 0, 0], x[1] = float("inf"), 0.0
    made = collector("gram")
    with made.adding([1.0] * 3):
        MODEL(x)
    sums = made.take()
    assert all(np.isfinite(total).all() for total in sums.values())
    assert np.linalg.norm(sums["a"]) == pytest.approx(2**-0.5, rel=1e-3)  # of the third, of two matrices


def test_a_layer_that_mixes_examples_or_runs_twice_has_no_statistic():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.mixed, self.twice = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return self.twice(self.twice(self.fine(x))).sum() + self.mixed(x.flatten(0, 1)).sum()

    odd = Odd()
    layers = {name: getattr(odd, name) for name in ("fine", "mixed", "twice")}
    made = Collector(layers, "gram", lambda t: None, lambda: (odd(torch.ones(2, 3, WIDTH)), 2)[1])
    assert made.shared == {"fine": "fine"}
    with pytest.raises(UserError, match="no layer here sees each example by itself"):
        Collector({"mixed": odd.mixed}, "gram", lambda t: None, lambda: (odd(torch.ones(2, 3, WIDTH)), 2)[1])


def test_a_pass_of_other_examples_or_of_none_is_refused():
    made = collector("gram")
    with pytest.raises(ContractError, match="does not hold each example once"), made.adding([1.0, 1.0]):
        MODEL(torch.ones(3, 2, WIDTH))
    with pytest.raises(ContractError, match="took no part"), made.adding([1.0]):
        pass
