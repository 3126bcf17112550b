"""Clients that share passes, against each by itself."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from fedlora.client import Pass, Rng, Settings
from fedlora.clients.dp_sgd import DPSGD
from fedlora.clients.sgd import SGD
from fedlora.engine.worker import Worker
from fedlora.errors import SettingError
from fedlora.passes.fused import Fused, _alike
from fedlora.prepare import calibrate, prepare
from fedlora.privacy import ledger
from fedlora.simulation import simulate

# A worker that serves both ways keeps the hooks of clients that passed alone.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

CLIENTS = (0, 1, 2)
PRIVATE = {"noise_multiplier": 0.3, "clip_norm": 0.5}
LM = ("task=causal_lm", "model.adapter.targets=[q_proj,up_proj,lm_head]")
PAIRS = ("task=preference", "preference.beta=1.0", "model.adapter.targets=[q_proj,up_proj,lm_head]")
MODELS = {
    "encoder": (),
    "padded": ("name=padded",),
    "pooler": ("model.pooler=trained", "model.adapter.targets=[query,dense]"),
    "mean": ("model.pooling=mean",),
    "prefix": ("model.adapter.layers=[1]", "rounds=8"),
    "core": ("model.adapter.kind=lora_xs",),
    "block": ("model.adapter.kind=block",),
    "channel": ("model.adapter.kind=channel",),
    "decoder": LM,
    "tagger": ("task=token_classification",),
    "pairs": PAIRS,
    "padded pairs": (*PAIRS, "name=padded"),
}


@pytest.fixture
def task_of(build, tiny_lm, sentences, choices):
    """The worker of a model, by its name."""
    pairs = (f"model.base={tiny_lm}", f"data.files={{train: {choices}}}")
    own = {
        "decoder": (f"model.base={tiny_lm}",),
        "tagger": (f"data.files={{train: {sentences}}}",),
        "pairs": pairs,
        "padded pairs": pairs,
    }

    def make(name):
        worker = build(*MODELS[name], *own.get(name, ()), private=False)
        if name.startswith("padded") and worker.task.packing is not None:
            worker.task.packing.remove()
            worker.task.packing = None
        return worker

    return make


def told(task, **changes):
    names = tuple(sorted(task.layout))
    base = {"round": 1, "train": names, "send": names, "local_steps": 3, "batch_size": 9, "lr": 0.2}
    return Settings(**{**base, "micro_batch_size": 4, **changes})


def start(task, client):
    """Another adapter for each client, away from B = 0, so that A has a gradient too."""
    rng = np.random.default_rng(client)
    return {n: (0.3 * rng.normal(size=task.layout[n].shape)).astype(np.float32) for n in sorted(task.layout)}


def both(worker, client, settings, adapters=None):
    """Updates of each client alone, and of all together."""
    task = worker.task
    adapters = adapters or {c: start(task, c) for c in CLIENTS}
    inputs = [(task, adapters[c], worker.dataset.partition(c), settings, Rng(3, 1, c)) for c in CLIENTS]
    task.become()
    alone = [client.fit(*one) for one in inputs]
    together = Fused(task).run(task.rank, [client.passes(*one) for one in inputs])
    return adapters, alone, together


def length(one, other):
    return sum(float(((t.astype(np.float64) - other[n]) ** 2).sum()) for n, t in one.items()) ** 0.5


def assert_equal(adapters, alone, together, clients=CLIENTS):
    """To 1e-5 of the adapter, which has moved far more than that."""
    for c in clients:
        one, other = alone[c], together[c]
        size = length(one.adapter, dict.fromkeys(one.adapter, 0.0))
        assert length(one.adapter, adapters[c]) > 5e-3 * size
        assert length(one.adapter, other.adapter) < 1e-5 * size
        assert one.clients == other.clients and one.weight == other.weight
        assert other.metrics == pytest.approx(one.metrics, rel=1e-4)


@pytest.mark.parametrize("client", [SGD(), DPSGD()], ids=["sgd", "dp_sgd"])
@pytest.mark.parametrize("model", MODELS)
def test_a_client_gets_what_it_gets_alone(model, client, task_of):
    worker = task_of(model)
    assert (worker.task.packing is None) is model.startswith("padded")
    assert (worker.task.prefix is None) is (model != "prefix")
    private = {**PRIVATE, "share_metrics": True} if client.private else {}
    assert_equal(*both(worker, client, told(worker.task, **private)))
    step = {**private, "noise_multiplier": 1e-10} if private else {}
    adapters, alone, together = both(worker, client, told(worker.task, local_steps=1, lr=1e5, **step))
    for c in CLIENTS:  # the gradient by itself: beside it the start is nothing
        gap, way = (length(alone[c].adapter, to) for to in (together[c].adapter, adapters[c]))
        assert gap < 2e-5 * way  # of a sum in which the gradients of examples cancel


@pytest.mark.parametrize(
    "client, changes",
    [
        (DPSGD(), {**PRIVATE, "clip": "per_layer"}),
        (DPSGD(), {**PRIVATE, "clip": "quantile", "quantile": 0.5}),
        (DPSGD(), {**PRIVATE, "clip": "automatic"}),
        (DPSGD(), {**PRIVATE, "config": {"turns": "B,A", "low-pass": True, "proximal-mu": 0.1}}),
        (SGD(), {"config": {"turns": "B,A", "low-pass": True, "proximal-mu": 0.1}}),
        (SGD(), {"batch_size": 10_000, "local_steps": 2}),
    ],
    ids=["per_layer", "quantile", "automatic", "private turns", "turns", "more than there is"],
)
def test_whatever_the_client_does_between_passes(client, changes, task_of):
    worker = task_of("encoder")
    assert_equal(*both(worker, client, told(worker.task, **changes)))


@pytest.mark.parametrize("client", [SGD(), DPSGD()], ids=["sgd", "dp_sgd"])
def test_what_rests_stays(client, task_of):
    """FFA-LoRA: A is each client's own and does not train."""
    worker = task_of("encoder")
    train = tuple(n for n, slot in sorted(worker.task.layout.items()) if slot.role != "A")
    private = PRIVATE if client.private else {}
    adapters, alone, together = both(worker, client, told(worker.task, train=train, **private))
    assert_equal(adapters, alone, together)
    rest = set(worker.task.layout) - set(train)
    assert rest and all(np.array_equal(u.adapter[n], adapters[c][n]) for c, u in enumerate(together) for n in rest)


def test_a_long_text_does_not_fill_up_the_examples_of_others():
    """Ten texts of one window, one of 300, two of 2 windows, two of 3: by the power of two that they reach."""
    batches = {0: (10, 10), 1: (1, 300), 2: (2, 4), 3: (2, 6)}
    asked = {k: Pass({"targets": torch.zeros(n), "input_ids": torch.zeros(m, 8)}) for k, (n, m) in batches.items()}
    assert [[*group] for group in _alike(asked)] == [[0], [1], [2, 3]]


def test_empty_batches_of_some(task_of):
    """A client that draws nobody asks for no pass in that step; its noise is its own."""
    worker = task_of("encoder")
    drawn = []
    for c in CLIENTS:
        coins, part = Rng(3, 1, c)("batches"), worker.dataset.partition(c)
        drawn.append([int((coins.random(len(part)) < 1 / len(part)).sum()) for _ in range(4)])
    counts = np.array(drawn)
    assert (counts == 0).any() and ((counts == 0).sum(0) < len(CLIENTS)).any()
    assert_equal(*both(worker, DPSGD(), told(worker.task, batch_size=1, local_steps=4, **PRIVATE)))


@pytest.mark.parametrize("client", [SGD(), DPSGD()], ids=["sgd", "dp_sgd"])
@pytest.mark.parametrize("model", ["encoder", "padded", "decoder"])
def test_what_is_not_finite_with_one_reaches_no_other(model, client, task_of):
    worker = task_of(model)
    adapters = {c: start(worker.task, c) for c in CLIENTS}
    adapters[0] = {n: np.full_like(t, np.nan) for n, t in adapters[0].items()}
    private = PRIVATE if client.private else {}
    adapters, alone, together = both(worker, client, told(worker.task, **private), adapters)
    assert not any(np.isfinite(t).all() for t in together[0].adapter.values())
    assert_equal(adapters, alone, together, clients=(1, 2))


def test_where_they_cannot_pass_together_only_the_one_to_blame_fails(task_of, caplog):
    worker = task_of("encoder")
    task, part = worker.task, worker.dataset.partition
    bad = task.batch(part(1).examples, part(1).rows[:2])["input_ids"]
    losses = task.losses

    def picky(batch):
        if any(row.equal(bad[0, : len(row)]) for row in batch["input_ids"][:, : bad.shape[1]]):
            raise MemoryError("too much")
        return losses(batch)

    def work(c, rows):
        task.begin(start(task, c), tuple(task.layout))
        try:
            loss = yield Pass(task.batch(part(c).examples, rows))
        except MemoryError as error:
            return str(error)
        return float(loss)

    rows = {c: part(c).rows[:2] for c in CLIENTS}
    task.become()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(task, "losses", picky)
        made = Fused(task).run(task.rank, [work(c, rows[c]) for c in CLIENTS])
    assert made[1] == "too much" and "3 clients pass one by one: MemoryError: too much" in caplog.text
    for c in (0, 2):
        task.begin(start(task, c), ())
        assert made[c] == pytest.approx(float(losses(task.batch(part(c).examples, rows[c])).sum()), rel=1e-5)


def same(one, other):
    """Whether two runs of the same clients left the same adapters, to 1e-5 of the largest value."""
    for a, b in zip(one, other, strict=True):
        assert a.clients == b.clients and a.weight == b.weight
        top = max(float(np.abs(t).max()) for t in a.adapter.values())
        assert all(np.allclose(a.adapter[n], b.adapter[n], rtol=0, atol=1e-5 * top) for n in a.adapter)


def test_a_client_that_fails_fails_alone(build, monkeypatch):
    plain, fused = build(), build("engine.fused=3")
    instruction = plain.strategy.instruct(1, dict(plain.task.initial))
    expected = plain.train(instruction, range(4), False)
    original = fused.dataset.partition

    def broken(client):
        part = original(client)
        return dataclasses.replace(part, rows=part.rows + 10**6) if client == 1 else part

    monkeypatch.setattr(type(fused.dataset), "partition", lambda self, client: broken(client))
    replies = fused.train(instruction, range(4), False)
    assert [r.client for r in replies.reports] == [0, 1, 2, 3]
    assert [bool(r.error) for r in replies.reports] == [False, True, False, False]
    assert "IndexError" in replies.reports[1].error and replies.reports[1].event == expected.reports[1].event
    same([expected.updates[i] for i in (0, 2, 3)], replies.updates)


def test_clients_of_other_ranks_share_with_their_own(build):
    mixed = ("strategy.use=flexlora", "clients.ranks={kind: list, values: [2, 4]}", "clients.total=7")
    plain, fused = (build(*mixed, *more, private=False) for more in ((), ("engine.fused=5",)))
    ranks = [plain.scenario.rank(c, 1) for c in range(7)]
    assert len(set(ranks[:5])) == 2
    instruction = plain.strategy.instruct(1, dict(plain.task.initial), (2, 4))
    one, other = (worker.train(instruction, range(7), False) for worker in (plain, fused))
    assert not any(report.error for report in other.reports)
    same(one.updates, other.updates)


def lines(run, name, *without):
    rows = [json.loads(line) for line in (run.folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


@pytest.mark.parametrize(
    "overrides, private",
    [
        ((), True),
        (("strategy.use=fedsa_lora", "data.client_test_share=0.2"), False),
        (("strategy.use=fedask",), True),
    ],
    ids=["ffa_lora", "personal tensors", "trips"],
)
def test_a_whole_run_is_the_same(overrides, private, tiny, tmp_path):
    from safetensors.numpy import load_file

    runs = [
        simulate(tiny(*overrides, f"engine.fused={fused}", private=private), out=tmp_path / str(fused))
        for fused in (1, 3)
    ]
    one, other = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == other.keys() and all(np.allclose(one[n], other[n], rtol=1e-5, atol=1e-5) for n in one)
    if private:
        one, other = (ledger.read(run.folder / "privacy.jsonl") for run in runs)
        for line in (*one, *other):  # rounded otherwise, and so never taken for the same
            del line["digest"], line["chain"]
        assert one == other
    clients = [lines(run, "clients.jsonl", "seconds", "train_loss", "local_loss") for run in runs]
    assert clients[0] == clients[1] and len(clients[0]) == 8
    totals = [{k: run.summary[k] for k in ("bytes_up_total", "bytes_down_total", "epsilon")} for run in runs]
    assert totals[0] == totals[1]


def test_with_other_companions_a_client_has_another_digest(tiny):
    """Their examples decide how far its own are padded, and so its last bits: one digest is one update."""
    ready = prepare(tiny("engine.fused=2", "clients.total=5", "clients.batch_size=4"))
    worker = Worker(dataclasses.replace(ready.setup, noise=calibrate(ready.scenario, ready.data), kept=None))
    asked, seen = worker.strategy.instruct(1, worker.task.initial, [4]), {}
    for cohort in ([0, 1], [0, 2], [0, 1], [1, 0], [3, 4]):
        replies = worker.train(asked, cohort, False)
        for update, report in zip(replies.updates, replies.reports, strict=True):
            made = b"".join(update.adapter[name].tobytes() for name in sorted(update.adapter))
            seen.setdefault((report.client, report.digest), set()).add(made)
    assert all(len(made) == 1 for made in seen.values())
    assert [len([key for key in seen if key[0] == client]) for client in range(5)] == [3, 2, 1, 1, 1]


def test_a_client_with_a_fit_of_its_own_is_refused(tiny):
    with pytest.raises(SettingError, match=":Faulty trains by a fit of its own") as refused:
        prepare(tiny("clients.use=tests.engine.faulty:Faulty", "engine.fused=2"))
    assert refused.value.key == "engine.fused"


def test_a_fit_of_ones_own_is_told_by_check(tiny, tmp_path):
    from fedlora.cli import main

    (file := tmp_path / "mine.yaml").write_text(tiny("clients.use=tests.engine.faulty:Faulty").to_yaml())
    assert main(["check", str(file)]) == 0
    assert main(["check", str(file), "--set", "engine.fused=2"]) == 2


@pytest.mark.parametrize(
    "stray", [torch.nn.BatchNorm1d(3), None], ids=["normalises over the batch", "no plain layer"]
)
def test_models_whose_clients_cannot_share_are_refused(stray, task_of, monkeypatch):
    task = task_of("core").task
    if stray is None:
        bert = task.model.get_base_model().bert
        norm = bert.encoder.layer[0].output.LayerNorm
        monkeypatch.setitem(task._parameters, "norm", norm.weight)
    else:
        monkeypatch.setitem(task.model._modules, "stray", stray)
    with pytest.raises(SettingError, match=r"clients cannot share .*, a (BatchNorm1d|LayerNorm)"):
        Fused(task)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("client", [SGD(), DPSGD()], ids=["sgd", "dp_sgd"])
def test_on_a_gpu(client, tiny):
    from fedlora.engine import Worker

    ready = prepare(tiny(private=client.private))
    noise = calibrate(ready.scenario, ready.data)
    worker = Worker(dataclasses.replace(ready.setup, noise=noise, device="cuda"))
    private = PRIVATE if client.private else {}
    assert_equal(*both(worker, client, told(worker.task, **private)))
