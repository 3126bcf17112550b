"""Directions that fade, by hand."""

import numpy as np
import pytest

from fedlora import plugins, strategy, suitability
from fedlora.adapter import Slot
from fedlora.errors import SettingError
from fedlora.kinds.core import Core
from fedlora.kinds.lora import Lora
from fedlora.schedules.decay import Decay

CORE = {"g": Slot("g", (3, 3), "core", "q"), "a": Slot("a", (3, 4), "A", "q"), "b": Slot("b", (5, 3), "B", "q")}


def bound(kind, layout, **options):
    made = Decay(**options)
    made.bind(layout, kind, 7, {"q": (5, 4)})
    return made


def test_what_lies_beyond_the_share_is_halved():
    """Energies 16, 4 and 1 of 21: two directions hold 0.95 of it, one 0.76."""
    held = {"g": np.diag([1.0, -4.0, 2.0]).astype(np.float32)}
    made = [bound(Core(3, 3.0, ()), CORE, share=share).after(1, held).adapter["g"] for share in (0.95, 0.75, 1.0)]
    for g, values in zip(made, ([0.5, -4, 2], [0.5, -4, 1], [1, -4, 2]), strict=True):
        np.testing.assert_allclose(g, np.diag(values), atol=1e-6)


def test_directions_are_those_of_the_change_and_not_of_b():
    """Rows of A of unequal length: what is small in B is large in B A; the change stays one over the same A."""
    a = np.array([[100, 0, 0], [0, 1, 0]], np.float32)
    b = np.array([[0.1, 0], [0, 5]], np.float32)  # B A has the values 10 and 5
    layout = {"a": Slot("a", (2, 3), "A", "q"), "b": Slot("b", (2, 2), "B", "q")}
    turned = bound(Lora(2, 2.0, ()), layout, share=0.7, factor=0.0).after(1, {"a": a, "b": b})
    assert turned.adapter.keys() == {"b"} and not turned.anew
    np.testing.assert_allclose(turned.adapter["b"], [[0.1, 0], [0, 0]], atol=1e-6)


def test_between_its_rounds_it_does_nothing_and_of_nothing_it_makes_nothing():
    held = {"g": np.zeros((3, 3), np.float32)}
    made = bound(Core(3, 3.0, ()), CORE, every=3)
    assert not made.after(1, held).adapter and not made.after(3, held).adapter["g"].any()


@pytest.mark.parametrize("kind", plugins.names("kinds"))
def test_it_takes_kinds_in_which_a_matrix_trains(kind, tiny):
    scenario = tiny(f"model.adapter.kind={kind}", "model.adapter.schedule={kind: decay}")
    made = strategy.load("fedavg_lora" if kind == "householder" else "ffa_lora", {})
    if kind in ("singular", "ldu", "tensor", "householder", "sparse", "block", "dual", "peft"):
        with pytest.raises(SettingError, match=r"decay: .*(trains no matrix|share a row of A|more than one)"):
            suitability.check(made, scenario)
    else:
        suitability.check(made, scenario)
