"""What is computed once changes no update."""

import numpy as np
import pytest

from fedlora import client as clients
from fedlora.client import Rng, Settings
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.passes import prefix

UPPER = "model.adapter.layers=[1]"
DECODER = ("task=causal_lm", "model.adapter.targets=[q_proj]")


@pytest.fixture(params=["encoder", "decoder"])
def model(request, tiny_lm):
    return (
        UPPER,
        *(DECODER if request.param == "decoder" else ()),
        *([f"model.base={tiny_lm}"] if request.param == "decoder" else ()),
    )


def fit(worker, use, passes, adapter, client=0):
    """A client of two steps, with what is below computed once or in each step."""
    names = tuple(sorted(worker.task.layout))
    private = {"noise_multiplier": 1e-9, "clip_norm": 0.5} if use == "dp_sgd" else {}
    told = Settings(round=1, train=names, send=names, local_steps=2, batch_size=8, lr=0.5, **private)
    part = worker.dataset.partition(client)
    with worker.task.knowing(part, passes, 5):
        return clients.load(use, {}).fit(worker.task, adapter, part, told, Rng(3, 1, client))


def away(worker):
    rng = np.random.default_rng(0)
    return {n: (0.3 * rng.normal(size=s.shape)).astype(np.float32) for n, s in worker.task.layout.items()}


@pytest.mark.parametrize("use", ["sgd", "dp_sgd"])
def test_an_update_is_the_same_to_1e_5(build, model, use):
    worker = build(*model, private=use == "dp_sgd")
    worker.task.prefix._kept.clear()  # other tests have this worker too
    adapter, computed = away(worker), []
    part, base = worker.dataset.partition(0), worker.task.model.get_base_model()
    body = getattr(base, base.base_model_prefix)
    lowest = next((body.encoder.layer if hasattr(body, "encoder") else body.layers)[0].children())
    counter = lowest.register_forward_hook(lambda module, args, out: computed.append(True))
    updates, counts = [], []
    for passes in (0, len(part), len(part)):
        updates.append(fit(worker, use, passes, adapter))
        counts.append(len(computed))
    counter.remove()
    plain, known, again = updates
    assert counts[0] >= 2 and counts[1] - counts[0] == -(-len(part) // 5) and counts[2] == counts[1]
    change = {n: plain.adapter[n] - adapter[n] for n in adapter}
    off = sum(float(((known.adapter[n] - plain.adapter[n]) ** 2).sum()) for n in adapter) ** 0.5
    assert off < 1e-5 * sum(float((c**2).sum()) for c in change.values()) ** 0.5
    assert all(np.array_equal(known.adapter[n], again.adapter[n]) for n in adapter)
    assert worker.task.prefix.row is None and worker.task.prefix.find(part.examples, part.rows[:2]) is None


def test_who_was_there_before_changes_no_bit(build, monkeypatch):
    worker = build(UPPER, private=False)
    monkeypatch.setattr(worker.task.prefix, "_kept", type(worker.task.prefix._kept)())
    passes, adapter = len(worker.dataset.partition(0)), away(worker)
    alone = fit(worker, "sgd", passes, adapter)
    size = next(iter(worker.task.prefix._kept.values())).size
    monkeypatch.setattr(prefix, "LIMIT", int(1.5 * size))  # room for one client
    fit(worker, "sgd", passes, adapter, client=1)
    assert list(worker.task.prefix._kept) == [1]
    again = fit(worker, "sgd", passes, adapter)
    assert list(worker.task.prefix._kept) == [0]
    assert all(np.array_equal(alone.adapter[n], again.adapter[n]) for n in adapter)


def test_a_client_that_takes_more_than_the_limit_is_not_kept(build, monkeypatch):
    worker = build(UPPER, private=False)
    monkeypatch.setattr(worker.task.prefix, "_kept", type(worker.task.prefix._kept)())
    monkeypatch.setattr(prefix, "LIMIT", 10)
    fit(worker, "sgd", 1000, away(worker))
    assert not worker.task.prefix._kept


def test_a_merge_is_above_what_is_kept(build):
    worker = build(UPPER, private=False)
    assert all(".layer.1." in module for module in worker.task.weights)
    assert build(private=False).task.prefix is None  # the lowest layer has factors


def test_a_layer_that_is_not_there_is_refused(tiny_base):
    from fedlora.tasks import loading

    with pytest.raises(SettingError, match="no layer 2 with targets"):
        loading.load(
            "classification",
            tiny_base,
            Lora(4, 8, ("query",), (1, 2)),
            labels=["a", "b"],
            seed=0,
            max_length=64,
        )


def test_the_rule_when_to_keep(build):
    """A client that trains on fewer examples than it holds would compute some for nothing."""
    worker = build(UPPER, private=False)
    part = worker.dataset.partition(0)
    with worker.task.knowing(part, len(part) - 1, 5):
        assert "prefix" not in worker.task.batch(part.examples, part.rows[:3])
    with worker.task.knowing(part, len(part), 5):
        batch = worker.task.batch(part.examples, part.rows[:3])
        assert batch["prefix"].shape == (1, int(batch["attention_mask"].sum()), 32)
