"""Choice of layers, by hand; what a run trains after its probe, and what the probe costs."""

import json

import numpy as np
import pytest

from fedlora import strategy, suitability
from fedlora.adapter import Slot
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.planning import plan
from fedlora.reports import single
from fedlora.rounds.checkpoint import read_tensors
from fedlora.schedules.probe import Probe
from fedlora.simulation import simulate

PROBE = "model.adapter.schedule={kind: probe, share: 0.25}"


def test_layers_whose_numbers_moved_most_are_chosen():
    """Squares 4, 9 and 8 over 1, 3 and 2 numbers: 4, 3 and 4; of those that are alike the first."""
    layout = {
        n: Slot(n, (1, size), "B", m) for n, m, size in (("x.b", "x", 1), ("y.b", "y", 3), ("z.b", "z", 2))
    } | {"x.a": Slot("x.a", (1, 1), "A", "x"), "h": Slot("h", (1,), "head", "h")}
    adapter = {
        "x.b": np.array([[2]], np.float32),
        "y.b": np.array([[2, 2, 1]], np.float32),
        "z.b": np.array([[2, 2]], np.float32),
        "x.a": np.array([[99]], np.float32),  # no change while B is zero
        "h": np.array([99], np.float32),
    }
    made = Probe(share=0.3)
    made.bind(layout, Lora(1, 1.0, ()), 0, {})
    assert made.scores(adapter) == {"x": 4.0, "y": 3.0, "z": 4.0}
    assert made.after(1, adapter).layers == ["x"] and made.after(2, adapter).layers is None
    made.share = 0.5  # 1.5 of three
    assert made.after(1, adapter).layers == ["x", "z"] and not made.after(1, adapter).adapter


@pytest.mark.parametrize("told", [("strategy.server={kind: adam, lr: 0.05}",), ("model.adapter.kind=core",)])
def test_a_run_trains_what_its_probe_chose(told, tiny, tmp_path):
    """One of four layers: the others stay as they began, and do not travel; the probe is paid as each round is."""
    scenario = tiny(PROBE, "rounds=3", *told)
    run, planned = simulate(scenario, out=tmp_path / "run"), plan(scenario)
    (chosen,) = run.summary["layers"]
    assert run.summary["failures"] == 0 and run.summary["epsilon"] == pytest.approx(planned.epsilon)
    paid = [json.loads(line) for line in (run.folder / "privacy.jsonl").read_text().splitlines()]
    assert sum(line["round"] == 1 for line in paid) == sum(line["round"] == 2 for line in paid) == 4
    made = read_tensors(run.folder / "adapter" / "adapter_model.safetensors")
    moved = {n for n, t in made.items() if n.endswith("lora_B.weight") and t.any()}
    assert moved == {f"base_model.model.{chosen}.lora_B.weight"}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["bytes_up"] > lines[1]["bytes_up"] == lines[2]["bytes_up"]
    assert lines[0]["bytes_down"] > lines[1]["bytes_down"]
    assert [line["bytes_up"] for line in planned.rounds] == [line["bytes_up"] for line in lines]
    assert f"After a probe 1 layers trained: {chosen}." in single.html(run)


def test_the_probe_itself_changes_nothing(tiny, tmp_path):
    begun = simulate(tiny(PROBE, "rounds=1"), out=tmp_path / "one")
    made = read_tensors(begun.folder / "adapter" / "adapter_model.safetensors")
    assert not any(t.any() for n, t in made.items() if n.endswith("lora_B.weight"))


def test_with_signal_and_no_noise_the_layer_that_matters_is_found(tiny, tmp_path):
    """Without noise the choice is that of the layers' own gradients."""
    run = simulate(tiny(PROBE, "rounds=2", "clients.local_steps=1", private=False), out=tmp_path / "run")
    plain = simulate(tiny("rounds=1", "clients.local_steps=1", private=False), out=tmp_path / "plain")
    made = read_tensors(plain.folder / "adapter" / "adapter_model.safetensors")
    sizes = {n: np.square(t).mean() for n, t in made.items() if n.endswith("lora_B.weight")}
    assert run.summary["layers"][0] in max(sizes, key=sizes.get)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("strategy.use=hetlora",), "probe goes on from a mean of changes"),
        (("model.start=x/y",), "probe begins with less than that has"),
        (("world={concurrency: 2}",), "probe begins anew, and updates that come late"),
        (
            ("secure_aggregation={noise: shared, honest: 0.8}", "clients.local_steps=1"),
            "probe lets some layers rest, and sites that share noise out",
        ),
    ],
    ids=["no mean", "start", "late", "shared"],
)
def test_what_does_not_go_with_it_is_refused_in_a_line(told, why, tiny):
    scenario = tiny(PROBE, *told)
    with pytest.raises(SettingError, match=why):
        suitability.check(strategy.load(scenario.strategy.use, {}), scenario)
