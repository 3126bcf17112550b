"""Second moments that travel: by hand, and in runs."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlora import traffic, wire
from fedlora.adapter import Sum, Update
from fedlora.engine.ray import RayEngine
from fedlora.errors import ContractError, ScenarioError
from fedlora.optimizers import averaged
from fedlora.optimizers.adamw import AdamW
from fedlora.optimizers.contract import Steps
from fedlora.planning import plan
from fedlora.prepare import calibrate, prepare
from fedlora.rounds import checkpoint
from fedlora.simulation import simulate

AVERAGED = "clients.optimizer={kind: adamw, betas: [0.9, 0.9], state: averaged}"
FRESH = AVERAGED.replace("averaged", "fresh")
SLOW = "clients.lr=0.01"


def row(second, weight):
    return np.array([second, weight], np.float32)


def fit(gradients, variance, begun=None, **options):
    """A client's round on a tensor `w` of two numbers: how far they went in each step, and what is sent."""
    settings = SimpleNamespace(optimizer={"state": "averaged"}, state=begun or {}, pace=(), lrs={}, lr=1.0)
    parameter = torch.nn.Parameter(torch.zeros(2))
    told = {"lr": 1.0, "betas": (0.0, 0.5), "eps": 1e-12, "floor": 0.25, **options}
    steps, moved = Steps(AdamW([parameter], **told), ["w"], [parameter], settings), []
    for step, gradient in enumerate(gradients):
        before, parameter.grad = parameter.detach().clone(), torch.tensor(gradient)
        steps.take(step, None if variance is None else {"w": variance})
        moved.append((before - parameter.detach()).tolist())
    return moved, steps.kept()


def test_two_clients_and_two_rounds_by_hand():
    """b1 = 0, b2 = 1/2, the floor a quarter of the noise; noise of variance 4 and weight 1, of 1 and weight 3.

    Round 1: squares 16 and 0, half of them 8 and 0, 4 in the mean, less half of 4: 2. Squares 1 and 1: 0.5, less
    0.5 is below the floor, 0.125. Their mean is (2 + 3 * 0.125) / 4 = 0.59375, in which gradients weigh a half.
    Round 2, the first client: v = 0.59375 + 0.5 * 4; a gradient of 4 and 2 makes it 9.296875 and 3.296875, less 3
    of noise, over 3/4: 8.39583 and 0.39583, which is below a quarter of 4. It goes 4 / sqrt(8.39583) and 2 / 1.
    """
    sent = [fit([[4.0, 0.0]], 4.0)[1], fit([[1.0, -1.0]], 1.0)[1]]
    assert [one["w"].tolist() for one in sent] == [[2.0, 0.5], [0.125, 0.5]]
    updates = [
        Update(adapter={}, weight=weight, clients=(k,), moments=averaged.rows(sent[k], ["w"]))
        for k, weight in enumerate((1.0, 3.0))
    ]
    held = averaged.mean(["w"], updates)
    assert held["w"].tolist() == [0.59375, 0.5]
    moved, sent = fit([[4.0, 2.0]], 4.0, held)
    assert moved == [pytest.approx([4 / (6.296875 / 0.75) ** 0.5, 2.0])]
    assert sent["w"].tolist() == [3.296875, 0.75]  # the mean of 9.296875 and 3.296875, less 3


def test_without_noise_a_client_alone_goes_on_as_if_there_were_no_rounds():
    """Where all numbers of a tensor are alike, and nothing is of the first moment."""
    gradients = [[1.0, 1.0], [2.0, 2.0], [0.5, 0.5], [3.0, 3.0]]
    whole, _ = fit(gradients, None)
    first, held = fit(gradients[:2], None)
    second, held = fit(gradients[2:], None, held)
    assert first + second == [pytest.approx(one) for one in whole]
    assert held["w"].tolist() == [pytest.approx(((1 / 2 + 4) / 2 + 0.25) / 4 + 9 / 2), 1 - 1 / 16]


def test_first_moments_begin_at_zero():
    """b1 = 1/2: of a first gradient m' is all of it, however much the second moment has seen."""
    moved, _ = fit([[3.0, 3.0]], None, {"w": row(9 * 0.75, 0.75)}, betas=(0.5, 0.5))
    assert moved == [pytest.approx([1.0, 1.0])]  # v' = 9 before and after


def test_noise_that_is_left_in_is_averaged_too():
    assert fit([[4.0, 0.0]], 4.0, correct_noise=False)[1]["w"].tolist() == [4.0, 0.5]


def test_what_rested_is_sent_as_it_came():
    assert fit([], 4.0)[1]["w"].tolist() == [0.0, 0.0]
    assert fit([], 4.0, {"w": row(2, 0.5)})[1]["w"].tolist() == [2.0, 0.5]


def test_who_stepped_more_weighs_more():
    """Two steps have 3/4 of the weight in them, and none has nothing: the second moment is that of the first."""
    updates = [
        Update(adapter={}, weight=1.0, clients=(k,), moments=one[None])
        for k, one in enumerate((row(6, 0.75), row(0, 0)))
    ]
    second, weight = averaged.mean(["w"], updates)["w"]
    assert second / weight == 8.0


def test_sums_on_the_way_carry_them():
    updates = [
        Update(adapter={"w": row(k, k)}, weight=float(k), clients=(k,), moments=row(k, k / 4)[None])
        for k in (1, 3)
    ]
    total = Sum()
    for update in updates:
        total.add(update)
    (summed,) = total.updates()
    assert summed.moments.tolist() == [[2.5, 0.625]] == averaged.mean(["w"], updates)["w"][None].tolist()


def test_a_mean_of_weights_of_1_is_1_whatever_clients_weigh():
    """In float32 the mean of ones is above 1 now and then; it is what the next round begins with."""
    rng, highest = np.random.default_rng(0), 0.0
    for _ in range(50):
        total, many = Sum(), [0.05 * int(n) for n in rng.integers(50, 900, size=40)]
        told = {"adapter": {"w": row(1, 1)}, "moments": row(0.5, 1)[None]}
        updates = [Update(weight=weight, clients=(i,), **told) for i, weight in enumerate(many)]
        for update in updates:
            total.add(update)
        (summed,) = total.updates()
        averaged.check(summed.moments, 1)
        highest = max(highest, float(summed.moments[0, 1]))
        for of in (updates, [summed]):
            averaged.check(made := averaged.mean(["w"], of)["w"][None], 1)
            assert made[0, 1] <= 1
    assert highest > 1


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((3, 2), np.float32),
        np.zeros((2, 2)),
        np.array([[0, 0], [-1e-9, 0.5]], np.float32),
        np.array([[0, 0], [np.nan, 0.5]], np.float32),
        np.array([[0, 0], [np.inf, 0.5]], np.float32),
        np.array([[0, 0], [2e24, 0.5]], np.float32),
        np.array([[0, 0], [1, 1.001]], np.float32),
        np.array([[0, 0], [1, np.nan]], np.float32),
        [[0.0, 0.0], [0.0, 0.0]],
    ],
)
def test_what_no_training_makes_is_refused(rows):
    averaged.check(np.array([[0, 0], [1e24, 1]], np.float32), 2)
    with pytest.raises(ContractError, match="second moments are "):
        averaged.check(rows, 2)


def test_a_workers_rows_are_the_means_of_squares(build):
    """Plain steps of rate 1 are the gradients; b2 = 0.9 leaves a tenth of their squares."""
    told = ("clients.local_steps=1", "clients.batch_size=200")
    plain = build(*told, "clients.lr=1", private=False)
    worker = build(*told, AVERAGED, SLOW, private=False)
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    asked = replace(instruction, moments=averaged.rows({}, instruction.send))
    for sums in (False, True):
        sent, made = plain.train(instruction, [0, 1], False), worker.train(asked, [0, 1], sums)
        want = [
            [0.1 * float(((instruction.adapter[n] - u.adapter[n]) ** 2).mean()) for n in instruction.send]
            for u in sent.updates
        ]
        weights = [u.weight for u in sent.updates]
        want = [np.average(want, axis=0, weights=weights)] if sums else want
        for update, seconds in zip(made.updates, want, strict=True):
            assert update.moments[:, 0] == pytest.approx(np.array(seconds), rel=1e-4)
            assert update.moments[:, 1] == pytest.approx(0.1)


def test_a_run_begins_each_round_at_the_mean_and_counts_its_bytes(tiny, tmp_path):
    """Two rounds of two steps: 1 - 0.9^4. A row takes eight bytes each way; the privacy is the same."""
    run, fresh = (simulate(tiny(o, SLOW), out=tmp_path / str(i)) for i, o in enumerate((AVERAGED, FRESH)))
    held = checkpoint.load(run.folder / "checkpoint").moments
    adapter = checkpoint.load(run.folder / "checkpoint").adapter
    trained = {name for name in adapter if ".lora_A." not in name}
    assert set(held) == trained and len(trained) > 3
    assert all(tensor[1] == pytest.approx(1 - 0.9**4) and tensor[0] > 0 for tensor in held.values())
    assert [c["epsilon"] for c in run.clients] == [c["epsilon"] for c in fresh.clients]
    other = checkpoint.load(fresh.folder / "checkpoint").adapter
    assert any(not np.array_equal(adapter[name], other[name]) for name in trained)
    assert not (run.folder / "personal").exists()
    for way in ("bytes_up", "bytes_down"):
        for one, plain in zip(run.clients, fresh.clients, strict=True):
            assert 8 * len(trained) < one[way] - plain[way] < 8 * len(trained) + 60
    planned = plan(tiny(AVERAGED, SLOW))
    for way in ("bytes_up_total", "bytes_down_total"):
        assert getattr(planned, way) == run.summary[way]


def test_bytes_are_those_of_the_serialised_messages(build):
    worker = build(AVERAGED, SLOW)
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    asked = replace(instruction, moments=averaged.rows({}, instruction.send))
    replies = worker.train(asked, [1], False)
    (update,), (report,) = replies.updates, replies.reports
    up = traffic.content_bytes(wire.pack_update(update, report.event))
    down = traffic.content_bytes(wire.pack_instruction(asked, worker.task.layout))
    assert report.bytes_up == pytest.approx(up, abs=8) and report.bytes_down == pytest.approx(down, abs=8)


def test_a_client_that_gives_no_state_back_fails(tiny, tmp_path):
    with pytest.raises(Exception, match="Forgetful gives no state back"):
        simulate(tiny("clients.use=tests.optimizers.own:Forgetful", AVERAGED, SLOW), out=tmp_path / "run")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_on_ray_send_what_one_here_does(tiny, build):
    """Bit for bit, summed on the way and not."""
    ready, worker = prepare(tiny(AVERAGED, SLOW)), build(AVERAGED, SLOW)
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    begun = averaged.rows({name: row(1e-4, 0.5) for name in instruction.send}, instruction.send)
    asked = replace(instruction, moments=begun)
    with contextlib.closing(RayEngine(4, workers=2)) as engine:
        engine.start(replace(ready.setup, noise=calibrate(ready.scenario, ready.data)))
        for sums in (True, False):
            here, there = worker.train(asked, range(4), sums), engine.train(asked, range(4), sums)
            assert len(there.updates) == (1 if sums else 4)
            for one, other in zip(here.updates, there.updates, strict=True):
                assert one.moments.tobytes() == other.moments.tobytes() and (one.moments[:, 1] > 0.5).all()
                assert all(one.adapter[n].tobytes() == other.adapter[n].tobytes() for n in one.adapter)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["privacy={unit: client, epsilon: 6, delta: 1.0e-5}", "clients.use=sgd"], "unit: client noises what"),
        (["secure_aggregation={}"], "masks sum what clients train alone"),
    ],
)
def test_what_nothing_hides_is_refused_at_load(told, words, tiny):
    with pytest.raises(ScenarioError) as caught:
        tiny(AVERAGED, *told)
    assert len(caught.value.lines) == 1 and words in caught.value.lines[0]


@pytest.mark.parametrize(
    ("use", "why"), [("fedask", "makes 2 trips"), ("fedsa_lora", "gives each client a model of its own")]
)
def test_strategies_that_make_no_one_mean_are_refused(use, why, tiny, tmp_path):
    scenario = tiny(f"strategy.use={use}", "data.client_test_share=0.2", AVERAGED)
    with pytest.raises(Exception, match=rf"clients.optimizer.state: {use} {why}: take kept or fresh"):
        simulate(scenario, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
