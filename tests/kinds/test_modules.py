"""Values at places of a weight, against the weight made whole."""

import torch

from fedlora.kinds.modules import Scatter


def test_a_scatter_is_the_linear_layer_of_its_dense_weight():
    torch.manual_seed(1)
    layer = Scatter(3, 4, 2)
    layer.support.data = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    layer.values.data = torch.tensor([5.0, 7.0])
    dense = torch.zeros(3, 4)
    dense[0, 3], dense[2, 1] = 5, 7
    x, g = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 3)
    weight = dense.clone().requires_grad_()
    (dx, dw) = torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), g)
    torch.testing.assert_close(layer(x), x @ dense.t())
    found = torch.autograd.grad(layer(x), (x, layer.values), g)
    torch.testing.assert_close(found, (dx, dw[[0, 2], [3, 1]]))
    layer.apart = lambda: True  # a hook takes them
    (layer(x) * g).sum().backward()
    torch.testing.assert_close(x.grad, dx)
    assert layer.values.grad is None


def test_it_computes_in_the_precision_of_training():
    layer, x = Scatter(3, 4, 2), torch.randn(2, 6, 4, requires_grad=True)
    layer.support.data = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.values.grad.dtype == torch.float32
    torch.testing.assert_close(layer.values.grad, x.detach().sum((0, 1))[[3, 1]], atol=0.1, rtol=0.02)
