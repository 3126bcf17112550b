import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedlora.errors import ContractError
from fedlora.passes.lowrank import LowRank, add_sample, by_example
from fedlora.passes.packing import Segments

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


def test_what_all_examples_share_is_laid_out_for_each_and_its_gradient_is_each_ones_own():
    """Two examples, three rows that both see; the loss weighs the first's by 1 and the second's by 10."""
    model, layers, a, b = make()
    layers.singly, layers.examples = True, 2
    shared = X[None].clone().requires_grad_()
    y = model(shared)
    assert y.shape == (2, 3, 2) and y[0].tolist() == y[1].tolist() == [[4.0, 14.0], [10.0, 28.0], [16.0, 42.0]]
    (y * torch.tensor([1.0, 10.0])[:, None, None]).sum().backward()
    assert b.grad_sample.tolist() == [[[-9.0], [-9.0]], [[-90.0], [-90.0]]]  # 3 * sum of the three -1
    assert a.grad_sample.tolist() == [[[81.0, 108.0]], [[810.0, 1080.0]]]  # 3 * (2 + 1) * sum x
    assert shared.grad.tolist() == [[[143.0, -33.0]] * 3]  # 11 times what one example gives
    assert layers.shares == set(layers.layers)


def test_what_all_examples_share_adds_to_a_pass_over_the_examples_themselves():
    model, layers, a, _ = make()
    layers.singly, layers.examples = True, 3
    (model(X[:, None]) + model(X[None, :1])).sum().backward()
    own, one = X, X[:1]
    assert a.grad_sample.tolist() == [[((x + one[0]) * 9).tolist()] for x in own]


@pytest.mark.parametrize("shape", [(4, 1, 2), (12, 2), (3, 2, 2)], ids=["windows", "flattened", "sideways"])
def test_a_gradient_whose_first_dimension_is_not_the_examples_is_refused(shape):
    model, layers, *_ = make()
    layers.examples = 2
    y = model(torch.ones(shape))  # before anybody asked for gradients of examples
    layers.singly = True
    with pytest.raises(ContractError, match=rf"layer runs on {shape[0]} rows where there are 2 examples"):
        y.sum().backward()
    with pytest.raises(ContractError, match=r"whose a gradient is cannot be told"):
        model(torch.ones(shape))


def test_gradients_of_other_counts_do_not_add_up():
    parameter = torch.nn.Parameter(torch.zeros(2))
    add_sample(parameter, torch.zeros(3, 2))
    with pytest.raises(ContractError, match="gives 3 and 1 gradients"):
        add_sample(parameter, torch.zeros(1, 2))
