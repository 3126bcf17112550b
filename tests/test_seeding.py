import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlora
from fedlora.data.partitions import split
from fedlora.scenario import Dirichlet
from fedlora.seeding import generator, key, stream

PARTS = st.lists(st.integers(-5, 10**6) | st.text("/is01a", max_size=4), max_size=4)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((0,), "a4e167a76a05add8"),
        ((7, 1, 2, "noise"), "560bb9a6116d48b7"),
        ((7, "1", 2, "noise"), "e4f45b48a058e287"),
    ],
)
def test_keys_are_what_they_were_in_every_release(path, expected):
    assert key(*path).hex()[:16] == expected


def test_a_key_is_a_hash_of_the_path():
    assert key(7, 1, 2, "noise") == hashlib.sha256(b"i7/i1/i2/snoise").digest()
    assert key(b"\x01\xff", 1) == hashlib.sha256(b"s01ff/i1").digest()


@given(PARTS, PARTS)
def test_keys_are_equal_only_for_equal_paths(one, other):
    same = [(type(p), p) for p in one] == [(type(p), p) for p in other]
    assert (key(3, *one) == key(3, *other)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1), (0, "1")),  # a number and its text
        ((0, 1, "noise"), (0, 1, "batches")),
        ((0, 1, 2), (0, 2, 1)),
        ((0, 12), (0, 1, 2)),
        ((0, "a/sb"), (0, "a", "b")),  # a separator within a part
        ((0,), (1,)),
        ((2**70,), (2**70 + 2**64,)),  # seeds that agree in 64 bits
    ],
)
def test_different_paths_give_different_streams(one, other):
    assert key(*one) != key(*other)
    assert not np.isclose(generator(*one).random(), generator(*other).random())
    assert not np.isclose(stream(*one).random(), stream(*other).random())


def test_numpy_integers_count_as_integers():
    assert key(np.int64(7), np.int64(1)) == key(7, 1)


def test_every_bit_of_a_key_reaches_a_generator(monkeypatch):
    """Keys that differ in one bit, whichever it is."""
    first = {generator(0, "x").integers(2**63)}
    for bit in range(256):
        flipped = (int.from_bytes(key(0, "x"), "big") ^ 1 << bit).to_bytes(32, "big")
        monkeypatch.setattr("fedlora.seeding.key", lambda *path, flipped=flipped: flipped)
        first.add(generator(0, "x").integers(2**63))
        monkeypatch.undo()
    assert len(first) == 257


def test_streams_repeat_and_those_of_neighbouring_paths_are_not_correlated():
    np.testing.assert_array_equal(generator(5, "x").random(4), generator(5, "x").random(4))
    for make in (generator, stream):
        draws = np.stack([make(0, client, "noise").standard_normal(2000) for client in range(5)])
        away = np.corrcoef(draws) - np.eye(5)
        assert np.abs(away).max() < 5 / np.sqrt(2000)  # five standard errors


def test_partitioners_take_a_seed_of_all_bits():
    targets = np.arange(200) % 2
    one, again = (split(Dirichlet(kind="dirichlet", alpha=1.0), targets, None, 4, 7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert sorted(np.concatenate(one)) == list(range(200))


MAKERS = {"default_rng", "Generator", "RandomState", "SeedSequence", "manual_seed", "seed", "PCG64", "Philox"}
MAKERS |= {"SFC64", "urandom", "getrandbits", "randbits", "token_bytes", "fork_rng", "rand_like", "randn_like"}
MODULES = {"random", "secrets"}
HERE = ("seeding.py", "privacy/noise.py")


def test_no_other_place_makes_random_numbers():
    """Looked for in the sources: a name that makes or seeds a generator, or a module that is one."""
    found = []
    root = Path(fedlora.__file__).parent
    beside = (folder for name in ("strategies", "clients") for folder in [(root / name).resolve()])
    files = {file.resolve() for folder in (root, *beside) for file in folder.rglob("*.py")}
    assert {"dp_sgd.py", "fedask.py"} < {file.name for file in files}
    for file in sorted(files):
        if any(file == root / name for name in HERE):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                where = getattr(node, "module", None)
                names = [where] if where else [alias.name for alias in node.names]
                bad = [name for name in names if name.split(".")[0] in MODULES]
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                bad = [name] if name in MAKERS else []
            else:
                continue
            found += [f"{file.name}:{node.lineno} {name}" for name in bad]
    assert found == []
