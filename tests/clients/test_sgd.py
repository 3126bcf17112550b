import numpy as np
import torch

from fedlora.client import Rng, Settings
from fedlora.clients.sgd import SGD


def test_equals_a_plain_training_loop(build):
    worker = build(private=False)
    task, part = worker.task, worker.dataset.partition(1)
    names = tuple(sorted(task.layout))
    settings = Settings(round=1, train=names, send=names, local_steps=2, batch_size=16, lr=0.3, micro_batch_size=5)
    update = SGD().fit(task, {}, part, settings, Rng(3, 1, 1))

    parameters = task.begin({}, names)
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    order = Rng(3, 1, 1)("batches").permutation(part.rows)
    losses = []
    for step in range(2):  # within one pass over the examples
        optimizer.zero_grad()
        loss = task.losses(task.batch(part.examples, order[step * 16 : step * 16 + 16])).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = task.read(names)
    for name in names:
        np.testing.assert_allclose(update.adapter[name], expected[name], rtol=1e-4, atol=1e-6)
    assert update.weight == len(part)
    np.testing.assert_allclose(update.metrics["train_loss"], np.mean(losses), rtol=1e-5)


def test_goes_round_again_when_the_examples_run_out(build):
    worker = build(private=False)
    task, part = worker.task, worker.dataset.partition(0)
    names = tuple(sorted(task.layout))
    settings = Settings(round=1, train=names, send=names, local_steps=30, batch_size=10_000, lr=0.3)
    update = SGD().fit(task, {}, part, settings, Rng(3, 1, 0))
    assert update.metrics["train_loss"] < 0.69  # thirty steps of all it has fit better than a coin
