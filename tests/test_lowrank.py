import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedlora.lowrank import LowRank, by_example
from fedlora.packing import Segments

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
LENGTHS = torch.tensor([[True, False], [True, True]])  # an example of one token and one of two


class Two(torch.nn.Module):
    """A layer that a pass goes through once or twice."""

    def __init__(self, times):
        super().__init__()
        self.layer, self.times = torch.nn.Linear(2, 2), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
        return x


def make(find=lambda tensor: None, times=1):
    """W = [[1, 2], [3, 4]], b = [5, 6], A = [[1, -1]], B = [[2], [1]], scaling 3."""
    model = get_peft_model(Two(times), LoraConfig(r=1, lora_alpha=3, target_modules=["layer"]))
    layer = model.base_model.model.layer
    values = {
        layer.base_layer.weight: [[1.0, 2.0], [3.0, 4.0]],
        layer.base_layer.bias: [5.0, 6.0],
        layer.lora_A["default"].weight: [[1.0, -1.0]],
        layer.lora_B["default"].weight: [[2.0], [1.0]],
    }
    for parameter, value in values.items():
        parameter.data = torch.tensor(value)
    return model, LowRank(model, find), layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_the_sums_over_the_tokens_of_each_example():
    left = torch.tensor([[1.0], [10.0], [100.0]])
    made = by_example(left, X, Segments(LENGTHS))
    assert made.tolist() == [[[1.0, 2.0]], [[530.0, 640.0]]]  # 10 * (3, 4) + 100 * (5, 6)


def test_a_layer_by_hand():
    model, _, a, b = make()
    x = X[None].clone().requires_grad_()
    y = model(x)
    # x A^T = -1 for each token, so s B A x = -3 * (2, 1); W x + b = (10, 17), (16, 31), (22, 45)
    assert y[0].tolist() == [[4.0, 14.0], [10.0, 28.0], [16.0, 42.0]]
    y.sum().backward()
    assert b.grad.tolist() == [[-9.0], [-9.0]]  # 3 * sum of the three -1
    assert a.grad.tolist() == [[81.0, 108.0]]  # 3 * (2 + 1) * sum x
    assert x.grad[0].tolist() == [[13.0, -3.0]] * 3  # (1, 1) W = (4, 6), and 3 * 3 * A


@pytest.mark.parametrize("packed", [False, True])
def test_examples_by_themselves(packed):
    lies = Segments(LENGTHS)
    model, layers, a, b = make(lambda tensor: lies if packed else None)
    layers.singly, layers.examples = True, 2
    x = X[None] if packed else lies.batch(X[None])
    (model(x) * (1.0 if packed else LENGTHS[:, :, None])).sum().backward()
    assert a.grad is None and b.grad is None
    assert b.grad_sample.tolist() == [[[-3.0], [-3.0]], [[-6.0], [-6.0]]]
    assert a.grad_sample.tolist() == [[[9.0, 18.0]], [[72.0, 90.0]]]


def test_a_layer_passed_twice_has_both_terms():
    model, layers, a, b = make(times=2)
    model(X[:, None]).sum().backward()
    whole = [p.grad.clone() for p in (a, b)]
    layers.singly, layers.examples = True, 3
    model(X[:, None]).sum().backward()
    for parameter, total in zip((a, b), whole, strict=True):
        torch.testing.assert_close(parameter.grad_sample.sum(0), total)


def test_factors_beside_another_layer_are_left_to_peft():
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1)), LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    )
    LowRank(model, lambda tensor: None)
    assert all("forward" not in vars(module) for module in model.modules())
