"""Feed damaged files and messages to everything that reads some, and let nothing through but our own errors.

    python -m tests.faults.fuzz [INPUTS]

Each input is a good one with some of its bytes changed, cut, doubled or moved, by a generator of its own seed, so
that a failure is found again by its number. What is read may turn out well or raise one of `fedlora.errors`; all
else ends the search with the number of the input.
"""

import json
import random
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora import scenario, wire
from fedlora.adapter import Update
from fedlora.errors import FedloraError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event
from fedlora.rounds import checkpoint
from fedlora.rounds.checkpoint import Checkpoint

WORDS = [
    b"1e999",
    b"-1",
    b"null",
    b"[" * 40,
    b"{}",
    b"\x00",
    b"\xff\xfe",
    b"NaN",
    b"9" * 40,
    b"&a *a",
    b"!!python/object:os.x",
]
EVENT = Event(noise_multiplier=1.25, sample_rate=0.1, steps=3, clip_norm=1.0)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes of `data` changed, cut, doubled, moved or replaced by words that parsers stumble over."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        a, b = sorted(rng.randrange(len(made) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                made[a : a + 1] = bytes([rng.randrange(256)])
            case 1:
                del made[a : min(b, a + 20)]
            case 2:
                made[a:a] = made[a : min(b, a + 50)]
            case 3:
                made[a:a] = rng.choice(WORDS)
            case 4:
                made[a : a + rng.randrange(9)] = rng.choice(WORDS)
            case 5:
                del made[b:]
    return bytes(made)


@cache
def scenarios() -> list[bytes]:
    return [scenario.find(name).read_bytes() for name in scenario.shipped()]


def read_scenario(rng: random.Random, folder: Path) -> None:
    text = damaged(rng.choice(scenarios()), rng)
    file = folder / "scenario.yaml"
    file.write_bytes(text)
    scenario.load(file)


@cache
def saved() -> dict[str, bytes]:
    """A good ledger and checkpoint, as bytes by the name of the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = ledger.Ledger(folder)
        for round in (1, 2, 3):
            record.spend(round, {0: EVENT, 1: EVENT}, delta=1e-5, unit="example", accountant="pld")
        tensors = {"a": np.ones((2, 3), np.float32)}
        checkpoint.save(folder / "c", Checkpoint(round=3, adapter=tensors, strategy=tensors, words={"x": 1}))
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def read_ledger(rng: random.Random, folder: Path) -> None:
    hurt = rng.choice(["privacy.jsonl", "privacy.jsonl", "privacy.head"])
    for name in ("privacy.jsonl", "privacy.head"):
        data = saved()[name]
        (folder / name).write_bytes(damaged(data, rng) if name == hurt else data)
    ledger.Ledger(folder)


def read_checkpoint(rng: random.Random, folder: Path) -> None:
    """Half of them with a manifest that fits the damage, as one who wants to do harm would write it."""
    place = folder / "c"
    place.mkdir(exist_ok=True)
    names = [name for name in saved() if name.startswith("c/")]
    hurt = rng.choice(names)
    for name in names:
        data = saved()[name]
        (folder / name).write_bytes(damaged(data, rng) if name == hurt else data)
    if hurt != "c/manifest.json" and rng.random() < 0.5:
        sums = {n[2:]: checkpoint._digest(folder / n) for n in names if n != "c/manifest.json"}
        (place / "manifest.json").write_text(json.dumps(sums))
    checkpoint.load(place)


@cache
def reply() -> bytes:
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    made = Update(adapter=tensors, weight=3.0, clients=(0,), metrics={"train_loss": 0.5})
    return wire.to_bytes(wire.pack_update(made, EVENT))


def read_update(rng: random.Random, folder: Path) -> None:
    """Half of them whole messages with damage in one array, as what Flower cannot read never gets here."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    if rng.random() < 0.3:
        content = wire.from_bytes(damaged(reply(), rng))
    else:
        content = wire.from_bytes(reply())
        good = Array(np.ones((2, 3), np.float32))
        shape = rng.choice([*[(2, 3)] * 6, (3, 2), (2**40, 2**40), (-2, -3), (6,), (), (1,) * 70])
        dtype = rng.choice(["float32", "object", "O", "float64", "<U9", ""])
        stype = rng.choice([*["numpy.ndarray"] * 6, "pickle", ""])
        content[wire.ARRAYS] = ArrayRecord(
            {"a": Array(dtype, shape, stype, damaged(good.data, rng) if rng.random() < 0.8 else good.data)}
        )
    ask = Message(content=RecordDict(), message_type="train", dst_node_id=1)
    answer = Message(content, reply_to=ask)
    wire.unpack_event(content)
    wire.unpack_words(content)
    wire.unpack_update(answer.content, 0)


READERS = {"scenario": read_scenario, "ledger": read_ledger, "checkpoint": read_checkpoint, "update": read_update}


def feed(what: str, number: int, folder: Path) -> bool:
    """Read one damaged input; whether it was taken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[what](random.Random(number), folder)
    except FedloraError as error:
        assert str(error), f"{what} {number}: an error without words"
        return False
    return True


def main(inputs: int) -> None:
    import logging

    logging.disable(logging.WARNING)
    print("| what is read | inputs | taken | refused | seconds |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        for what in READERS:
            began, taken = time.process_time(), 0
            for number in range(inputs):
                try:
                    taken += feed(what, number, Path(name))
                except BaseException:
                    print(f"{what} {number} is not told as an error of ours", file=sys.stderr)
                    raise
            seconds = time.process_time() - began
            print(f"| {what} | {inputs} | {taken} | {inputs - taken} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25_000)
