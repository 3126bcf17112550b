"""Models of images, of which each is right for every image or refused."""

import numpy as np
import pytest
import torch

from fedlora.errors import SettingError
from fedlora.passes.fused import Fused
from tests.zoo.images import FIT, UNFIT, make, some
from tests.zoo.models import away, privately


@pytest.mark.parametrize("name", FIT)
def test_an_images_loss_and_gradient_are_those_of_it_alone(name):
    task, _ = make(name, private=True)
    data, adapter, names = some(), away(task), tuple(sorted(task.layout))
    found = privately(task, adapter, data)
    for i in range(len(data)):
        parameters = task.begin(adapter, names)
        task.losses(task.batch(data, np.array([i]))).sum().backward()
        alone = torch.cat([p.grad.flatten() for p in parameters])
        assert float((found[i] - alone).norm() / alone.norm()) < 1e-4


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_whose_images_are_not_apart_is_refused_under_privacy(name):
    with pytest.raises(SettingError, match=UNFIT[name][3]) as told:
        make(name, private=True)
    assert told.value.key == "model.base" and "\n" not in str(told.value)


def test_clients_cannot_share_passes_of_windows():
    with pytest.raises(SettingError, match=r"q_proj runs on") as told:
        Fused(make("swin")[0])
    assert told.value.key == "engine.fused"


def test_no_client_moves_the_running_figures_of_a_frozen_base_and_another_base_is_told_by_them():
    task, _ = make("mobilevit")
    layers = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before, mark = [layer.running_mean.clone() for layer in layers], task.base_fingerprint()
    task.begin(away(task), tuple(task.layout))
    data = some()
    together = task.losses(task.batch(data, np.arange(3)))
    together.sum().backward()
    assert all(torch.equal(layer.running_mean, mean) for layer, mean in zip(layers, before, strict=True))
    alone = [task.losses(task.batch(data, np.array([i]))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert task.base_fingerprint() == mark
    layers[0].running_mean += 0.1
    assert task.base_fingerprint() != mark
