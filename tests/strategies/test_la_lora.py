from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlora.adapter import Slot
from fedlora.client import Settings, resting
from fedlora.optimizers.low_pass import smooth
from fedlora.strategies.la_lora import LALoRA

SLOTS = (Slot("A", (1, 9), "A", "q"), Slot("B", (9, 1), "B", "q"), Slot("h", (9,), "head", ""))
TASK = SimpleNamespace(layout={slot.name: slot for slot in SLOTS})


def settings(**config):
    return Settings(round=1, train=("A", "B", "h"), send=(), local_steps=3, batch_size=4, lr=1.0, config=config)


def test_b_moves_first_and_then_a_and_the_head_always():
    told = LALoRA().config(1)
    assert [resting(TASK, settings(**told), step) for step in range(3)] == [{"A"}, {"B"}, {"A"}]
    assert resting(TASK, settings(), 0) == set()


def test_only_noised_gradients_are_smoothed():
    plain, private = LALoRA(), LALoRA()
    private.private = True
    assert "low-pass" not in plain.config(1) and private.config(1)["low-pass"]
    off = LALoRA(low_pass=False)
    off.private = True
    assert "low-pass" not in off.config(1)


def test_the_filter_by_hand():
    spike = torch.tensor([0.0] * 4 + [16.0] + [0.0] * 4)
    tensors = {name: torch.zeros(TASK.layout[name].shape, requires_grad=True) for name in TASK.layout}
    for tensor in tensors.values():
        tensor.grad = spike.reshape(tensor.shape).clone()
    smooth(TASK, tensors, {"low-pass": 1})
    for name in ("A", "B"):
        np.testing.assert_allclose(tensors[name].grad.flatten(), [0, 0, 1, 4, 6, 4, 1, 0, 0])
    np.testing.assert_array_equal(tensors["h"].grad, spike)
    tensors["A"].grad = torch.full((1, 9), 3.0)
    smooth(TASK, tensors, {"low-pass": 1})
    np.testing.assert_allclose(tensors["A"].grad, np.full((1, 9), 3.0))  # a constant has no high part, nor ends


@pytest.mark.parametrize("private", [True, False])
def test_a_client_moves_what_has_its_turn(build, private):
    from fedlora import client as clients

    worker = build(private=private)
    layout = worker.task.layout
    made = clients.load("dp_sgd" if private else "sgd", {})
    names = tuple(sorted(layout))
    for steps, moved in ((1, {"B", "head"}), (2, {"A", "B", "head"})):
        told = Settings(
            round=1,
            train=names,
            send=names,
            local_steps=steps,
            batch_size=8,
            lr=0.5,
            noise_multiplier=1.0 if private else None,
            clip_norm=1.0 if private else None,
            config={"turns": "B,A", "low-pass": 1},
        )
        update = made.fit(worker.task, {}, worker.dataset.partition(0), told, clients.Rng(3, 1, 0))
        changed = {layout[n].role for n in names if not np.array_equal(update.adapter[n], worker.task.initial[n])}
        assert changed == moved
