"""What is computed once changes no update."""

import numpy as np
import pytest

from fedlora import client as clients
from fedlora.client import Rng, Settings
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora

UPPER = ("model.adapter.layers=[1]", "rounds=8")
DECODER = ("task=causal_lm", "model.adapter.targets=[q_proj]")


@pytest.fixture(params=["encoder", "decoder"])
def model(request, tiny_lm):
    return (*UPPER, *((*DECODER, f"model.base={tiny_lm}") if request.param == "decoder" else ()))


def fit(worker, use, adapter, client=0):
    """A client of two steps."""
    names = tuple(sorted(worker.task.layout))
    private = {"noise_multiplier": 1e-9, "clip_norm": 0.5} if use == "dp_sgd" else {}
    told = Settings(round=1, train=names, send=names, local_steps=2, batch_size=8, lr=0.5, **private)
    part = worker.dataset.partition(client)
    return clients.load(use, {}).fit(worker.task, adapter, part, told, Rng(3, 1, client))


def away(worker):
    rng = np.random.default_rng(0)
    return {n: (0.3 * rng.normal(size=s.shape)).astype(np.float32) for n, s in worker.task.layout.items()}


@pytest.mark.parametrize("use", ["sgd", "dp_sgd"])
def test_an_update_is_the_same_to_1e_5(build, model, use, monkeypatch):
    worker = build(*model, private=use == "dp_sgd")
    adapter, base = away(worker), worker.task.model.get_base_model()
    body, computed = getattr(base, base.base_model_prefix), []
    known = fit(worker, use, adapter)
    lowest = next((body.encoder.layer if hasattr(body, "encoder") else body.layers)[0].children())
    counter = lowest.register_forward_hook(lambda module, args, out: computed.append(True))
    again = fit(worker, use, adapter)
    assert computed == []  # nothing below passes
    monkeypatch.setattr(worker.task.prefix, "kept", lambda examples: None)
    plain = fit(worker, use, adapter)
    counter.remove()
    assert len(computed) >= 2
    change = {n: plain.adapter[n] - adapter[n] for n in adapter}
    off = sum(float(((known.adapter[n] - plain.adapter[n]) ** 2).sum()) for n in adapter) ** 0.5
    assert off < 1e-5 * sum(float((c**2).sum()) for c in change.values()) ** 0.5
    assert all(np.array_equal(known.adapter[n], again.adapter[n]) for n in adapter)


def test_who_was_there_before_changes_no_bit(build, tmp_path):
    """What is kept of an example does not depend on the client that asked first."""
    worker = build(*UPPER, private=False)
    adapter = away(worker)
    alone = fit(worker, "sgd", adapter)
    worker.kept._open.clear()
    fit(worker, "sgd", adapter, client=1)
    again = fit(worker, "sgd", adapter)
    assert all(np.array_equal(alone.adapter[n], again.adapter[n]) for n in adapter)


def test_the_test_set_is_scored_as_without(build, monkeypatch):
    worker = build(*UPPER, private=False)
    adapter, test = away(worker), worker.dataset.test
    rows = np.arange(len(test))
    assert "prefix" in worker.task.batch(test, rows[:3])
    known = worker.task.figures(worker.task.evaluate(adapter, test, rows))
    monkeypatch.setattr(worker.task.prefix, "kept", lambda examples: None)
    plain = worker.task.figures(worker.task.evaluate(adapter, test, rows))
    assert known["accuracy"] == plain["accuracy"] and known["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_a_merge_is_above_what_is_kept(build):
    worker = build(*UPPER, private=False)
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
