"""Bits by layer under a budget, and the adapter that begins with what rounding lost."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import simulate
from fedlora.errors import SettingError, UserError
from fedlora.passes import quantized

pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantize]'")

from fedlora.passes import bits as few

LQ = "model.quantize={bits: 5, start: lq}"

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def weight(out=32, into=64, seed=0):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def test_what_a_layer_costs_by_hand():
    assert few.cost((32, 64), 8) == 8 * 2048 + 32 * 32  # a scale of 32 bits a row
    assert few.cost((32, 64), 4) == 4 * 2048 + 8 * 32 + 32 / 8  # 32 blocks of 64, an eighth of 256 of them


def test_the_layer_that_loses_most_gets_the_eight_bits_that_there_are():
    errors = np.array([[4.0, 1.0], [9.0, 1.0], [5.0, 1.0]])
    costs = np.array([[4.0, 8.0]] * 3)
    assert few.choose(errors, costs, 12.0).tolist() == [0, 0, 0]
    assert few.choose(errors, costs, 16.0).tolist() == [0, 1, 0]  # it saves 8, the others 3 and 4
    assert few.choose(errors, costs, 20.0).tolist() == [0, 1, 1] and few.choose(errors, costs, 24.0).all()
    with pytest.raises(SettingError, match="do not fit into so few bits"):
        few.choose(errors, costs, 11.9)


def test_a_layer_that_has_no_whole_blocks_is_held_in_eight_bits():
    errors = np.array([[np.inf, 1.0], [2.0, 1.0]])
    assert few.choose(errors, np.array([[4.0, 8.0]] * 2), 12.0).tolist() == [1, 0]
    assert not few.fits(torch.zeros(3, 7), 4) and few.fits(torch.zeros(3, 7), 8)


@given(seed=st.integers(0, 999), bits=st.sampled_from([4, 8]), rank=st.integers(1, 12))
@settings(max_examples=15)
def test_factors_mend_what_rounding_loses_and_the_error_is_said_as_it_is(seed, bits, rank):
    whole = weight(seed=seed)
    part, plain = few.split(whole, bits, rank), few.split(whole, bits, 0)
    left, right = part.factors
    made = torch.from_numpy(np.float64(left) @ right) + few.round_to(part.rest, bits).double()
    assert float((whole.double() - made).norm()) == pytest.approx(part.error, rel=1e-5)
    assert part.error < plain.error and plain.factors is None and torch.equal(plain.rest, whole)
    assert np.linalg.norm(right, axis=1) == pytest.approx(3**-0.5, abs=1e-4)  # as rows that are drawn
    assert (np.diff(np.linalg.norm(left, axis=0)) <= 1e-3).all()  # the strongest first


def test_a_weight_of_the_rank_itself_is_held_without_loss():
    low = weight(32, 3) @ weight(3, 64, seed=1)
    left, right = few.top(low.double().numpy(), 3)
    assert left @ right == pytest.approx(low.numpy(), abs=1e-3)
    assert few.split(low, 4, 3).error < 1e-3 * float(low.norm())


def load(base, told, **more):
    from fedlora.kinds.lora import Lora
    from fedlora.scenario.bits import Bits
    from fedlora.tasks import loading

    told = {"labels": ["a", "b"], "seed": 3, "quantize": told and Bits(**told), "max_length": 64, **more}
    return loading.load("classification", base, Lora(4, 8, ("query", "value")), **told)


@pytest.mark.parametrize("pooler", ["frozen", "trained"])
def test_a_base_is_within_its_budget_and_begins_nearer_to_the_whole(tiny_base, pooler):
    plain, rest = load(tiny_base, None, pooler=pooler), load(tiny_base, {"bits": 5}, pooler=pooler)
    mended = load(tiny_base, {"bits": 5, "start": "lq"}, pooler=pooler)
    layers = [m for m in rest.model.get_base_model().modules() if quantized.is_held(m)]
    assert len(layers) == 12 + (pooler == "frozen")
    held = [(8 if hasattr(m.weight, "SCB") and m.weight.SCB is not None else 4, m) for m in layers]
    spent = sum(few.cost((m.out_features, m.in_features), c) for c, m in held)
    assert spent <= 5 * sum(m.out_features * m.in_features for m in layers) and {c for c, _ in held} == {4, 8}
    off = {}
    for name, task in (("rest", rest), ("mended", mended)):
        change = task.kind.change(task.layout, task.initial)
        off[name] = sum(
            float((plain.weight(m) - task.weight(m) - 2 * torch.from_numpy(b @ a)).norm())
            for m, (b, a) in change.items()
        )
    assert off["mended"] < 0.8 * off["rest"]


def test_an_adapter_that_learnt_nothing_is_exported_as_none(tiny_base, tmp_path):
    """What it begins with is of the rounded weights, and the adapter that leaves is for the whole ones."""
    from safetensors.numpy import load_file

    task = load(tiny_base, {"bits": 5, "start": "lq"})
    task.export(task.initial, tmp_path / "adapter", None)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    sides = sorted(name for name in saved if "lora_B" in name)
    begun = sum(float(np.abs(b @ a).max()) for b, a in task.kind.change(task.layout, task.initial).values())
    for name in sides:
        made = saved[name] @ saved[name.replace("lora_B", "lora_A")] * told["lora_alpha"] / told["r"]
        assert np.abs(made).max() < 1e-5 * begun
    assert len(sides) == 4 and begun > 0.1


@pytest.mark.parametrize("strategy", ["ffa_lora", "fedavg_lora"])
def test_a_private_run_begins_so_and_repeats(tiny, tmp_path, strategy):
    told = (LQ, f"strategy.use={strategy}")
    run, again = (simulate(tiny(*told), out=tmp_path / name) for name in ("one", "two"))
    assert run.summary["epsilon"] <= 8 and run.summary["loss"] == again.summary["loss"]
    assert (
        run.summary["loss"] != simulate(tiny("model.quantize={bits: 5}"), out=tmp_path / "three").summary["loss"]
    )


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["model.adapter.kind=core"], "lq begins with a plain LoRA, and this is core"),
        (["strategy={use: fedsa_lora}", "data.client_test_share=0.2"], "lq is one beginning for all"),
        (["model.adapter.schedule={kind: rotate}"], "leave one of them out|lq begins|adds to the frozen"),
        (["model.quantize={bits: 3}"], "greater than or equal to 4.25|4.25"),
        (["model.quantize={bits: 5, start: loftq}"], "lq"),
    ],
)
def test_what_does_not_go_together_is_one_line(tiny, tmp_path, told, why):
    with pytest.raises(UserError, match=why):
        simulate(tiny(LQ, *told), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_sites_have_it_not_yet(tiny):
    from fedlora.strategy import load as strategy
    from fedlora.suitability import check_sites

    with pytest.raises(SettingError, match="is of simulations yet"):
        check_sites(strategy("ffa_lora", {}), tiny(LQ))
