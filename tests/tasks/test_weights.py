"""Weights of labels and smoothed labels: an example's loss depends on that example alone."""

import numpy as np
import pytest

from fedlora.errors import SettingError
from fedlora.prepare import prepare, prepare_server
from fedlora.scenario import Scenario
from fedlora.tasks import weights
from fedlora.tasks.classification import Classification


def losses(logits, targets, told, smoothing):
    import torch

    class Given(Classification):
        device = "cpu"

        def __init__(self):
            pass

        def logits(self, batch):
            return torch.tensor(logits)

    (task := Given()).weigh(told, smoothing)
    return task.losses({"targets": torch.tensor(targets)}).numpy()


LOGITS, TARGETS = [[0.0, 0.0], [np.log(3.0), 0.0], [0.0, 0.0]], [0, 0, 1]


@pytest.mark.parametrize(
    ("told", "smoothing", "expected"),
    [
        (None, 0.0, [np.log(2), np.log(4 / 3), np.log(2)]),
        ([3.0, 0.5], 0.0, [3 * np.log(2), 3 * np.log(4 / 3), 0.5 * np.log(2)]),
        (None, 0.5, [np.log(2), 0.75 * np.log(4 / 3) + 0.25 * np.log(4), np.log(2)]),
    ],
)
def test_a_loss_by_hand(told, smoothing, expected):
    np.testing.assert_allclose(losses(LOGITS, TARGETS, told, smoothing), expected, rtol=1e-6)
    for i in range(3):  # whoever else is in the batch
        alone = losses(LOGITS[i : i + 1], TARGETS[i : i + 1], told, smoothing)
        np.testing.assert_allclose(alone, expected[i : i + 1], rtol=1e-6)


@pytest.mark.parametrize("private", [True, False])
def test_balanced_counts_the_test_rows_alone(tiny, private):
    ready = prepare(tiny("loss={class_weights: balanced}", private=private))
    found = Scenario.model_validate(ready.setup.scenario).loss.class_weights
    counts = np.bincount(ready.data.test.targets)
    assert found == pytest.approx(dict(zip(("bad", "good"), counts.sum() / 2 / counts, strict=True)))
    assert ready.scenario.loss.class_weights == "balanced"


def test_weights_of_no_label_and_of_sites_are_refused(tiny, reviews):
    with pytest.raises(SettingError, match="no label is called 'godo': did you mean 'good'"):
        weights.resolved((made := tiny("loss={class_weights: {godo: 2}}")), prepare(tiny()).data)
    with pytest.raises(SettingError, match="which sites do not see"):
        prepare_server(tiny("loss={class_weights: balanced}", f"data.files={{train: x, test: '{reviews}'}}"))
    assert made.loss.class_weights == {"godo": 2.0}


def test_a_worker_teaches_by_them(build):
    worker = build("loss={class_weights: {good: 3}, label_smoothing: 0.25}")
    assert worker.task.class_weights.tolist() == [1.0, 3.0] and worker.task.smoothing == 0.25
