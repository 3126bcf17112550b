"""Places and values, by hand."""

import numpy as np
import pytest
import torch

from fedlora import strategy, suitability
from fedlora.adapter import Slot
from fedlora.errors import ScenarioError, SettingError
from fedlora.kinds.contract import Saved
from fedlora.kinds.sparse import Sparse
from fedlora.scenario import parse

KIND = Sparse(2, 4.0, ())
LAYOUT = {
    slot.name: slot
    for slot in (
        Slot("b", (3, 2), "B", "q"),
        Slot("a", (2, 4), "A", "q", False),
        Slot("places", (2, 2), "support", "q", False),
        Slot("v", (2,), "values", "q"),
    )
}


def adapter():
    return {
        "b": np.zeros((3, 2), np.float32),
        "a": np.ones((2, 4), np.float32),
        "places": np.array([[0, 2], [3, 1]], np.float32),
        "v": np.array([5, 7], np.float32),
    }


def test_values_stand_at_their_places():
    made, held = KIND.lazy(LAYOUT, adapter())["q"], adapter()
    np.testing.assert_array_equal(made.times(np.eye(4)), [[0, 0, 0, 5], [0, 0, 0, 0], [0, 7, 0, 0]])
    held["b"][1] = [1, 2]
    np.testing.assert_array_equal(KIND.lazy(LAYOUT, held)["q"].times(np.eye(4))[1], [3, 3, 3, 3])
    gains = [KIND.noise_gain(LAYOUT, adapter(), moving)["q"] for moving in ({"values"}, {"B"}, {"B", "values"})]
    assert gains == pytest.approx([2 * 2**0.5, 2 * 24**0.5, 2 * 26**0.5])  # s = 2


def test_places_are_drawn_once_each_and_as_many_as_the_density_says():
    kind = Sparse(2, 2.0, (), density=0.5)
    slot = Slot("p", kind.beside("support", 6, 10), "support", "q", False)
    weights = {"q": torch.zeros(6, 10)}.__getitem__
    drawn = kind.initial(slot, np.random.default_rng(1), weights)
    assert slot.shape == (2, 30) and kind.numbers(6, 10) == 12 + 30
    assert len({*map(tuple, drawn.T)}) == 30 and (drawn.max(1) < [6, 10]).all() and (drawn >= 0).all()
    assert Sparse(2, 2.0, (), density=1e-9).count(6, 10) == 1


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan"), "half", True])
def test_a_support_of_nothing_is_refused(density, tiny):
    with pytest.raises(ValueError, match="should be above 0 and at most 1"):
        Sparse(2, 2.0, (), density=density)


def test_the_scenario_says_how_dense_it_is(tiny):
    ffa = strategy.load("ffa_lora", {})
    scenario = tiny("model.adapter.kind={use: sparse, density: 0.25}")
    assert suitability.kind_of(ffa, scenario).count(6, 10) == 15
    assert parse(scenario.to_yaml(), "again.yaml").model.adapter == scenario.model.adapter
    for told, why in (
        ("{use: sparse, densty: 0.1}", r"sparse has no option 'densty': did you mean 'density'"),
        ("{use: core, density: 0.1}", r"core has no option 'density': it takes none"),
        ("{use: sparse, density: 0}", r"sparse: density is 0, and should be above 0"),
    ):
        with pytest.raises(SettingError, match=why):
            suitability.kind_of(ffa, tiny(f"model.adapter.kind={told}"))
    with pytest.raises(ScenarioError, match=r"model\.adapter\.kind\.use: unknown kind of adapter 'spars'"):
        tiny("model.adapter.kind={use: spars}")


def test_a_change_that_it_cannot_write_is_refused():
    tensors = {"base_model.model.q.lora_B.weight": np.eye(3, 1), "base_model.model.q.lora_A.weight": np.eye(1, 4)}
    with pytest.raises(SettingError, match="is not made by the A and the places that this seed draws"):
        KIND.adopt(LAYOUT, adapter(), Saved(tensors, 1.0))
