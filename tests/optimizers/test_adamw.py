"""fedlora's own AdamW: torch's where there is no noise, and by hand where there is."""

import pytest
import torch

from fedlora.optimizers.adamw import AdamW
from fedlora.optimizers.low_pass import noise_left


def run(cls, gradients, **options):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = cls([parameter], lr=0.1, **options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach()


def test_without_noise_it_is_torchs():
    gradients = [[0.3, -1.0], [0.1, 0.0], [-0.7, 2.0]]
    told = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}
    assert torch.allclose(run(AdamW, gradients, **told), run(torch.optim.AdamW, gradients, **told), atol=1e-6)


def test_noise_is_taken_out_by_hand():
    """b1 = 0, b2 = 1/2, noise of variance 9, gradients 5 and then 4.

    v = 12.5, v' = 25, less 9: 16, and 5 / 4. Then v = 6.25 + 8 = 14.25, v' = 19, less 9: 10, and 4 / sqrt(10).
    The other number has gradient 3: v' - 9 = 0 is below the floor, a quarter of 9, and 3 / 1.5; both times.
    """
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamW([parameter], lr=1.0, betas=(0.0, 0.5), eps=1e-12, floor=0.25)
    seen = []
    for gradient in ([5.0, 3.0], [4.0, 3.0]):
        optimizer.expect(parameter, 9.0)
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        seen.append((before - parameter.detach()).tolist())
    assert seen == [pytest.approx([1.25, 2.0]), pytest.approx([4 / 10**0.5, 2.0])]


def test_noise_of_another_size_in_each_step_is_averaged_as_the_squares_are():
    """b2 = 1/2, variances 4 and then 1: n = 2, then 1.5, n' = 2. Gradients of 0 and 3: v' = 6, less 2: 4."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([parameter], lr=1.0, betas=(0.0, 0.5), eps=1e-12)
    for gradient, variance in ((0.0, 4.0), (3.0, 1.0)):
        optimizer.expect(parameter, variance)
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    assert parameter.item() == pytest.approx(-3 / 2)


def test_it_can_leave_the_noise_in():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([parameter], lr=1.0, correct_noise=False)
    optimizer.expect(parameter, 9.0)
    parameter.grad = torch.tensor([5.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("length", [3, 7, 9, 12, 40])
def test_what_a_filter_leaves_of_noise(length):
    """Of the variance of each number, against the filter written out over mirrored numbers."""
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    total = torch.zeros(length)
    for j in range(length):
        row = torch.zeros(length)
        for k in range(-2, 3):
            i = abs(j + k)
            row[i if i < length else 2 * (length - 1) - i] += weights[k + 2]
        total[j] = row.square().sum()
    assert torch.allclose(noise_left((4, length), "A", True), total)
    assert torch.allclose(noise_left((length, 4), "B", True)[:, 0], total)
    assert noise_left((4, length), "head", True) == 1.0 == noise_left((4, length), "A", False)
