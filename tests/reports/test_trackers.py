"""The same figures wherever they go."""

import struct

import pytest

from fedlora import simulate
from fedlora.errors import UserError
from fedlora.reports.console import Bar, Silent, default_display
from fedlora.reports.trackers import PACKAGES, figures


def events(folder):
    """Scalars in TensorBoard's event files: records of a length, its checksum, an event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_numbers_of_a_line_are_told_and_nothing_else():
    line = {"round": 2, "accuracy": 0.5, "loss": None, "phases": {"train": 1}, "error": "x"}
    assert figures(line) == {"accuracy": 0.5, "phases/train": 1.0}


def test_tensorboard_gets_what_the_metrics_say_also_after_a_resume(tiny, tmp_path):
    simulate(tiny("trackers=[tensorboard]", "rounds=1", private=False), out=tmp_path / "run")
    again = tiny("trackers=[tensorboard]", "rounds=2", private=False)
    run = simulate(again, out=tmp_path / "run", resume=True)
    assert len(run.rounds) == 2
    told = events(run.folder / "tensorboard")
    for line in run.rounds:
        expected = figures(line)
        got = {tag: value for tag, value in told[line["round"]].items() if tag in expected}
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_and_writes_nothing(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setitem(PACKAGES, name, "no_such_package")
    with pytest.raises(
        UserError, match=rf"--set trackers.*: {name} comes with an extra: pip install 'fedlora\[{name}"
    ):
        simulate(tiny(f"trackers=[{name}]"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_bar_moves_by_rounds(tiny, capsys):
    bar = Bar()
    bar.begin(tiny(), "accuracy", 0)
    bar.round({"round": 1, "accuracy": 0.5, "epsilon": 1.25})
    bar.round({"round": 2, "accuracy": None, "epsilon": 1.5})
    told = capsys.readouterr().err
    assert "tiny" in told and "2/2" in told and "epsilon=1.5" in told
    assert isinstance(default_display(), Silent)  # this is no notebook
