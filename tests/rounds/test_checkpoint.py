import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedlora.errors import UserError
from fedlora.rounds import checkpoint
from fedlora.rounds.checkpoint import Checkpoint, load, save


def made(round: int) -> Checkpoint:
    draw = np.random.default_rng(round)
    return Checkpoint(
        round=round,
        adapter={
            "layer.0.A": draw.standard_normal((4, 32)).astype(np.float32),
            "layer.0.B": np.asfortranarray(draw.standard_normal((32, 4)).astype(np.float32)),
            "head.weight": draw.standard_normal((6, 3)).astype(np.float32).T[::2],  # neither order is contiguous
            "odd": np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32),
            "empty": np.zeros((0, 3), np.float32),
        },
        strategy={"momentum": draw.standard_normal(3), "steps": np.array(round), "t": [round, 0.1]},
        words={"bytes_up": 2**60 + round, "seconds": 0.1 + 0.2, "last": {"loss": None, "accuracy": 1 / 3}},
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def bits(values):
        plain = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
        arrays = {k: (v.dtype, v.shape, v.tobytes()) for k, v in values.items() if isinstance(v, np.ndarray)}
        return plain, arrays

    return all(bits(vars(one)[k]) == bits(vars(other)[k]) for k in ("adapter", "strategy", "words")) and (
        one.round == other.round
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoint"


def test_what_is_saved_is_loaded_bit_for_bit(folder):
    save(folder, made(1))
    assert same(load(folder), made(1)) and not same(load(folder), made(2))
    save(folder, made(2))
    assert same(load(folder), made(2))
    assert {p.name for p in folder.parent.iterdir()} == {"checkpoint", "checkpoint.old"}
    save(folder, made(3))
    assert same(load(folder.with_name("checkpoint.old")), made(2))


def test_a_stateless_strategy_and_no_words(folder):
    save(folder, Checkpoint(round=0, adapter={"A": np.ones(2, np.float32)}, strategy={}, words={}))
    again = load(folder)
    assert (again.round, again.strategy, again.words) == (0, {}, {})


def test_there_is_no_pickle_in_it(folder):
    save(folder, made(1))
    names = {p.name for p in folder.iterdir()}
    assert names == {"adapter.safetensors", "strategy.safetensors", "state.json", "manifest.json"}
    for name in ("state.json", "manifest.json"):
        json.loads((folder / name).read_text())
    for name in names:
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads((folder / name).read_bytes())
    source = Path(checkpoint.__file__).read_text()
    assert "import pickle" not in source and "torch" not in source


def test_none_before_the_first_is_finished(folder, crashing):
    assert load(folder) is None
    assert crash(folder, crashing, 4, 1) and load(folder) is None and folder.with_name("checkpoint.new").exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "strategy.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_whole_one_before(folder, name, how, caplog):
    save(folder, made(1))
    save(folder, made(2))
    assert same(load(folder), made(2)) and not caplog.records

    file = folder / name
    data = file.read_bytes()
    middle = len(data) // 2
    if how == "gone":
        file.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"flip": flipped, "cut": data[:middle], "empty": b""}[how])

    assert same(load(folder), made(1))
    (record,) = caplog.records
    assert record.getMessage() == f"{folder}: is damaged; going on after round 1, from checkpoint.old"
    shutil.rmtree(folder.with_name("checkpoint.old"))
    with pytest.raises(UserError, match="no whole checkpoint"):
        load(folder)


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture
def crashing(monkeypatch):
    """Counts what touches the disk, and dies just before the n-th time."""
    calls = {"left": -1}

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == -1:
                raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    wrap(shutil, "rmtree")
    wrap(os, "fsync")
    for name in ("rename", "mkdir", "open"):
        wrap(Path, name)
    return calls


def crash(folder: Path, crashing: dict, step: int, round: int) -> bool:
    """Save, and die at a step; whether it came to that."""
    crashing["left"] = step
    try:
        save(folder, made(round))
    except Crash:
        return True
    finally:
        crashing["left"] = -1
    return False


def test_a_crash_at_any_step_leaves_a_whole_checkpoint(folder, crashing):
    survivors, step = [], 0
    save(folder, made(1))
    while crash(folder, crashing, step, 2):
        left = load(folder)
        assert same(left, made(1)) or same(left, made(2))
        assert folder.exists() or left.round == 2  # between the two renames the new one counts
        survivors.append(left.round)
        save(folder, made(1))  # and the next save mends all
        assert same(load(folder), made(1)) and not folder.with_name("checkpoint.new").exists()
        step += 1
    assert survivors[0] == 1 and survivors[-1] == 2 and len(survivors) >= 10


def test_crash_after_crash_leaves_a_whole_checkpoint(folder, crashing):
    for first in range(12):
        for second in range(12):
            save(folder, made(1))
            crash(folder, crashing, first, 2)
            before = load(folder).round
            crash(folder, crashing, second, 3)
            assert load(folder).round in (1, before, 3)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", "state.json/../../secret"])
def test_a_manifest_cannot_name_files_elsewhere(folder, name, monkeypatch):
    save(folder, made(1))
    (folder.parent / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    read, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how, **more: read.append(self) or real(self, *how, **more))
    extended, swapped = {**manifest, name: digest}, {**manifest, "state.json": digest}
    for sums in (extended, swapped, {name: digest}, {}, [name], None, 3):
        (folder / "manifest.json").write_text(json.dumps(sums))
        with pytest.raises(UserError, match="no whole checkpoint"):
            load(folder)
    assert all(path.resolve().parent == folder.resolve() for path in read)


def test_two_runs_that_make_one_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="another run has begun there meanwhile: name another folder"):
        with checkpoint.whole_folder(tmp_path / "a run") as new:
            (new / "scenario.yaml").write_text("mine")
            with checkpoint.whole_folder(tmp_path / "a run") as other:
                (other / "scenario.yaml").write_text("theirs")
    assert (tmp_path / "a run" / "scenario.yaml").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1
