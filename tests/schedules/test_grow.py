"""Growth, by hand; what travels while it grows, and that what joins changes nothing."""

import json

import numpy as np
import pytest

from fedlora import strategy, suitability
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.planning import plan
from fedlora.schedules.grow import Grow, block_of
from fedlora.simulation import simulate

RANK = "model.adapter.schedule={kind: grow, begin: 1, by: 2, every: 1}"
LAYERS = "model.adapter.schedule={kind: grow, of: layers, begin: 1, every: 2}"


def test_the_rank_rises_by_rounds_up_to_all(tiny):
    scenario = tiny("model.adapter.schedule={kind: grow, begin: 1, by: 2, every: 2}")
    assert [scenario.rank(0, round) for round in (1, 2, 3, 4, 5, 99)] == [1, 1, 3, 3, 4, 4]
    assert scenario.ranks(3) == [3] and tiny(LAYERS).ranks(1) == [4]
    unequal = tiny("model.adapter.schedule={kind: grow}", "clients.ranks={kind: list, values: [2, 4]}")
    assert [unequal.ranks(round) for round in (1, 6, 11)] == [[1], [2], [2, 3]]


def test_blocks_join_from_the_last_one_down():
    made = Grow(of="layers", begin=1, by=1, every=2)
    names = [f"bert.encoder.layer.{i}.attention.query" for i in range(3)]
    made.bind({}, Lora(1, 1.0, ()), 0, dict.fromkeys(names, (2, 2)))
    assert [made.layers(round) for round in (1, 2, 3, 5, 9)] == [names[2:], names[2:], names[1:], names, names]
    assert block_of("h.10.attn.0.q") == 10 and block_of("embed") is None
    with pytest.raises(SettingError, match=r"layers: embed is in no numbered block"):
        made.bind({}, Lora(1, 1.0, ()), 0, {"embed": (2, 2)})


@pytest.mark.parametrize("told", [("model.adapter.kind=core",), ("model.adapter.kind=sparse",)])
@pytest.mark.parametrize("grow", [RANK, LAYERS], ids=["rank", "layers"])
def test_more_travels_as_it_grows_and_the_plan_knows(told, grow, tiny, tmp_path):
    scenario = tiny(grow, "rounds=3", "strategy.server={kind: adam, lr: 0.05}", *told)
    run, planned = simulate(scenario, out=tmp_path / "run"), plan(scenario)
    assert run.summary["failures"] == 0
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    ups, downs = ([line[f"bytes_{way}"] for line in lines] for way in ("up", "down"))
    assert ups[0] < ups[2] and downs[0] < downs[2] and ups == sorted(ups)
    assert ups == [line["bytes_up"] for line in planned.rounds]
    assert downs == [line["bytes_down"] for line in planned.rounds]
    assert planned.epsilon == pytest.approx(run.summary["epsilon"])


@pytest.mark.parametrize("grow", [RANK, LAYERS], ids=["rank", "layers"])
def test_what_has_not_joined_is_as_it_began(grow, tiny, tmp_path):
    """After one round B's later columns, or the lower block, are zero."""
    from fedlora.rounds.checkpoint import read_tensors

    run = simulate(tiny(grow, "rounds=1"), out=tmp_path / "run")
    made = read_tensors(run.folder / "adapter" / "adapter_model.safetensors")
    for name, b in made.items():
        if name.endswith("lora_B.weight"):
            if grow is RANK:
                assert b[:, 0].any() and not b[:, 1:].any()
            else:
                assert b.any() == (".layer.1." in name)


def test_clients_protected_whole_and_masked_sums_grow_too(tiny, tmp_path):
    run = simulate(
        tiny(RANK, "privacy={unit: client, epsilon: 50, delta: 1e-3}", "clients.use=sgd", "rounds=3"),
        out=tmp_path / "run",
    )
    assert not run.summary["failures"] and np.isfinite(run.summary["loss"])
    masked = simulate(tiny(RANK, "secure_aggregation={}", "rounds=3"), out=tmp_path / "masked")
    assert not masked.summary["failures"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("model.start=x/y",), "grow begins with less than that has"),
        (("clients.optimizer={kind: adamw, state: kept}",), "grow begins anew, and moments that clients keep"),
        (("strategy.use=flexlora",), "grow goes on from a mean of changes"),
        (("strategy.shrink={}",), "grow gives numbers noise of their own"),
    ],
    ids=["start", "kept", "no mean", "shrink"],
)
def test_what_does_not_go_with_it_is_refused_in_a_line(told, why, tiny):
    scenario = tiny(RANK, *told)
    with pytest.raises(SettingError, match=why):
        suitability.check(strategy.load(scenario.strategy.use, {}), scenario)
