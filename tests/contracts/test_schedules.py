"""What every schedule of the adapter promises; the package is listed, so a new file is tested automatically."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from fedlora import lazy, plugins
from fedlora.adapter import Slot
from fedlora.kinds.core import Core
from fedlora.lazy import Thin, Total
from fedlora.reports.console import Silent
from fedlora.rounds.checkpoint import read_tensors
from fedlora.scenario import schedules as written
from fedlora.scenario.section import Section
from fedlora.schedules import contract
from fedlora.simulation import simulate

NAMES = plugins.names("schedules")
SECTIONS = {
    get_args(cls.model_fields["kind"].annotation)[0]: cls
    for cls in vars(written).values()
    if isinstance(cls, type) and issubclass(cls, Section) and cls is not Section
}
SHAPES = {"q": (6, 5), "v": (4, 7)}
KIND = Core(3, 6.0, ())
LAYOUT = {
    f"{module}.{role}": Slot(f"{module}.{role}", KIND.beside(role, out, into), role, module, part.trains)
    for module, (out, into) in SHAPES.items()
    for role, part in KIND.parts.items()
}


def bound(name, **options):
    made = contract.load(SECTIONS[name](kind=name, **options))
    made.bind(LAYOUT, KIND, 3, SHAPES)
    return made


def start():
    rng = np.random.default_rng(4)
    first = contract.redrawn(KIND, LAYOUT, 3, SHAPES, 0)
    cores = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in LAYOUT.items() if s.role == "core"}
    return {**first, **cores}


def test_each_has_a_section_and_each_section_one():
    assert sorted(SECTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_it_makes_is_of_the_adapter_s_shapes_and_finite(name):
    adapter, made = start(), bound(name)
    for round in range(1, 8):
        turned = made.after(round, adapter)
        adapter |= turned.adapter
        assert {n: t.shape for n, t in adapter.items()} == {n: s.shape for n, s in LAYOUT.items()}
        assert all(t.dtype == np.float32 and np.isfinite(t).all() for t in adapter.values())
        assert set(turned.anew) <= set(LAYOUT) and (made.merges or not turned.base)
        for module, (left, right) in turned.base.items():
            assert (left.shape[0], right.shape[1]) == SHAPES[module]


@pytest.mark.parametrize("name", NAMES)
def test_another_one_makes_the_same_of_the_same_rounds(name):
    """It holds no state: one that is made where a run goes on does what the first would have done."""
    adapter, first = start(), bound(name)
    for round in range(1, 8):
        one, two = first.after(round, adapter), bound(name).after(round, adapter)
        assert one.anew == two.anew and first.draw(round) == bound(name).draw(round)
        assert all(np.array_equal(one.adapter[n], two.adapter[n]) for n in {*one.adapter, *two.adapter})
        adapter |= one.adapter


class Stop(Silent):
    def round(self, line):
        if line["round"] == 2:
            raise KeyboardInterrupt


ASKED = {"nested": "clients.ranks={kind: list, values: [2, 4]}"}  # what one needs beside itself
TURNS = {n: ", every: {}" if "every" in SECTIONS[n].model_fields else "" for n in NAMES}


def told(name, every):
    """What a scenario says of a schedule that acts every few rounds, if it does."""
    needs = (ASKED[name],) if name in ASKED else ()
    return (*TOLD, f"model.adapter.schedule={{kind: {name}{TURNS[name].format(every)}}}", *needs)


TOLD = ("rounds=4", "model.adapter.kind=core", "strategy.server={kind: adam, lr: 0.02}")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bit_for_bit(name, tiny, tmp_path):
    scenario = tiny(*told(name, 1))
    whole = simulate(scenario, out=tmp_path / "whole")
    folder = simulate(scenario, out=tmp_path / "cut", display=Stop()).folder
    done = simulate(scenario, out=folder, resume=True)
    one, two = (read_tensors(run.folder / "adapter" / "adapter_model.safetensors") for run in (whole, done))
    assert set(one) == set(two) and all(np.array_equal(one[n], two[n]) for n in one)
    assert whole.summary["accuracy"] == done.summary["accuracy"] and not whole.summary["failures"]
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_it_sees_nothing_of_two_neighbours_but_what_is_released(name, tiny, tmp_path, monkeypatch):
    """Two data sets that differ in a row, and one noise: given what the other released, each decides as it did."""
    rows = Path(tiny().data.files.train).read_text().splitlines()
    (file := tmp_path / "rows.csv").write_text("\n".join([rows[0], "another row,good,site0", *rows[2:]]) + "\n")
    seen = [
        followed(name, tiny(*told(name, 2), *more), tmp_path, monkeypatch)
        for more in ((), (f"data.files.train={file}",))
    ]
    fresh = seen[1][0][0]
    assert any(not np.array_equal(one[2][n], two[2][n]) for one, two in zip(*seen, strict=True) for n in one[2])
    for (mine, round, released, turned), (_, _, _, other) in zip(*seen, strict=True):
        again = fresh.after(round, released)
        assert turned.adapter.keys() == other.adapter.keys() and turned.base.keys() == other.base.keys()
        assert turned.anew == other.anew and mine.draw(round) == fresh.draw(round)
        assert turned.layers == again.layers and mine.layers(round) == fresh.layers(round)
        assert all(np.array_equal(turned.adapter[n], again.adapter[n]) for n in turned.adapter)


def followed(name, scenario, tmp_path, monkeypatch):
    """Of each round of a run the schedule, the round, what was released, and what it made of that."""
    cls, steps = plugins.find("schedules", name), []
    real = cls.after

    def after(self, round, adapter):
        turned = real(self, round, adapter)
        steps.append((self, round, dict(adapter), turned))
        return turned

    with monkeypatch.context() as patch:
        patch.setattr(cls, "after", after)
        simulate(scenario, out=tmp_path / scenario.hash)
    return steps


@pytest.mark.parametrize("name", [n for n in NAMES if plugins.find("schedules", n).merges])
def test_a_merge_leaves_the_function_as_it_was(name):
    adapter, made = start(), bound(name, every=1)
    before = KIND.change(LAYOUT, adapter)
    turned = made.after(1, adapter)
    after = KIND.change(LAYOUT, {**adapter, **turned.adapter})
    for module, pair in before.items():
        terms = [
            (KIND.scaling(), Thin(*pair)),
            (-KIND.scaling(), Thin(*after[module])),
            (-1.0, Thin(*turned.base[module])),
        ]
        assert lazy.norm(Total(terms)) < 1e-5
