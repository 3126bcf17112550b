"""Charts whose axes can be read."""

import pytest

from fedlora.reports import charts


def domain(*values, rule=None):
    rows = [{"round": i, "accuracy": value} for i, value in enumerate(values)]
    rows = [{**row, "majority": rule} for row in rows] if rule is not None else rows
    made = charts.lines(rows, ("round", "round"), ("accuracy", "accuracy"), rule="majority" if rule else None)
    scales = [layer["encoding"]["y"]["scale"] for layer in made.to_dict()["layer"]]
    assert all(scale == scales[0] for scale in scales)
    return scales[0].get("domain")


def test_an_axis_has_room_around_a_value_that_never_changes():
    assert domain(0.276, 0.276) == pytest.approx([0.2484, 0.3036])
    assert domain(0.0) == [-1.0, 1.0]
    assert domain(0.276, 0.28) is None and domain(0.276, rule=0.44) is None
