"""Rotation, by hand; and what does not go with it, in a line."""

import numpy as np
import pytest

from fedlora import strategy, suitability
from fedlora.adapter import Slot
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.planning import plan
from fedlora.rounds.checkpoint import read_tensors
from fedlora.schedules import contract
from fedlora.schedules.rotate import Rotate
from fedlora.simulation import simulate

ROTATE = "model.adapter.schedule={kind: rotate, every: 2}"


def test_after_every_second_round_all_is_merged_and_drawn_anew():
    """s B A = 2 (1, 2)^T (3, 4): the base takes it, B is zero, and A is the next draw."""
    kind, made = Lora(1, 2.0, ()), Rotate(every=2)
    layout = {"a": Slot("a", (1, 2), "A", "q"), "b": Slot("b", (2, 1), "B", "q")}
    made.bind(layout, kind, 7, {"q": (2, 2)})
    held = {"a": np.array([[3, 4]], np.float32), "b": np.array([[1], [2]], np.float32)}
    assert [made.draw(round) for round in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]
    assert not made.after(1, held).adapter
    turned = made.after(2, held)
    np.testing.assert_array_equal(turned.base["q"][0] @ turned.base["q"][1], [[6, 8], [12, 16]])
    assert (
        turned.anew == ["b"]
        and not turned.adapter["b"].any()
        and not np.array_equal(turned.adapter["a"], held["a"])
    )
    drawn = contract.redrawn(kind, layout, 7, {"q": (2, 2)}, 1)
    assert drawn.keys() == {"a"} and np.array_equal(drawn["a"], turned.adapter["a"])
    assert not np.array_equal(drawn["a"], contract.redrawn(kind, layout, 7, {"q": (2, 2)}, 2)["a"])


@pytest.mark.parametrize(
    "told, rank",
    [
        (("model.adapter.kind=core",), 4),
        (("model.adapter.kind=tensor",), 16),
        (("model.adapter.kind=very_sparse",), 4),
        ((), 4),
    ],
)
def test_workers_begin_from_the_draw_that_the_server_has(told, rank, tiny, tmp_path):
    """A client whose frozen parts differ refuses to train; the rank of what was learnt grows by each merge."""
    run = simulate(tiny("rounds=4", ROTATE, *told), out=tmp_path / "run")
    assert run.summary["failures"] == 0 and len([*(run.folder / "merges").iterdir()]) == 2
    made = read_tensors(run.folder / "adapter" / "adapter_model.safetensors")
    ranks = {t.shape[0] for name, t in made.items() if name.endswith("lora_A.weight")}
    assert ranks == {2 * rank}  # two merges, and zeros
    planned = plan(tiny("rounds=4", ROTATE, *told))
    assert planned.bytes_down_total == run.summary["bytes_down_total"]  # the last merge goes to nobody
    without = simulate(tiny("rounds=4", *told), out=tmp_path / "without")
    assert run.summary["epsilon"] == without.summary["epsilon"]


def test_the_frames_of_a_core_are_the_same_with_and_without_the_weights(build):
    task = build("model.adapter.kind=core").task
    shapes = task.weights
    for draw in (0, 1):
        drawn = contract.redrawn(task.kind, task.layout, task.seed, shapes, draw)
        assert {task.layout[n].role for n in drawn} == {"A", "B"}
        assert all(np.array_equal(t, task.drawn(draw)[n]) for n, t in drawn.items())


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("model.adapter.kind=lora_xs",), "rotate: lora_xs takes A from the base"),
        (("model.adapter.kind=channel",), "rotate: channel takes A from the base"),
        (("model.adapter.kind=sparse",), "rotate: sparse has a change that is no product of thin factors"),
        (("strategy.use=fedavg_lora",), "rotate: lora has no frozen part to draw anew under this strategy"),
        (("strategy.use=flora",), "rotate goes on from a mean of changes, and what flora makes is none"),
        (("model.start=x/y",), "model.adapter.schedule: rotate draws new factors"),
        (("compression.up={kind: top_k, share: 0.1}",), "rotate begins anew, and what top_k left out"),
        (("clients.optimizer={kind: adamw, state: kept}",), "rotate begins anew, and moments that clients keep"),
        (("world={concurrency: 2}",), "rotate begins anew, and updates that come late"),
    ],
    ids=["derived", "chosen", "sparse", "nothing frozen", "no mean", "start", "left out", "kept", "late"],
)
def test_what_does_not_go_with_it_is_refused_in_a_line(told, why, tiny):
    scenario = tiny(ROTATE, *told, private=not told[0].startswith("compression"))
    with pytest.raises(SettingError, match=why):
        suitability.check(strategy.load(scenario.strategy.use, {}), scenario)
