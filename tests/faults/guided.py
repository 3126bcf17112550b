"""Look for inputs that crash a reader, guided by the lines they reach (atheris), where `fuzz` damages blindly.

    pip install atheris && python -m tests.faults.guided READER [INPUTS]

READER is scenario, ledger, checkpoint or update. The search starts from good inputs and keeps those that come to
new lines of fedlora. Chains and checksums are made to fit what was found, as one who wants to do harm would; all
but the errors of `fedlora.errors` end it and leave the input in a file.
"""

import hashlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from flwr.supercore.task_identity import TaskIdentity

with atheris.instrument_imports(include=["fedlora"]):
    from fedlora import scenario, wire
    from fedlora.errors import FedloraError
    from fedlora.privacy import ledger
    from fedlora.rounds import checkpoint

from tests.faults import fuzz


def read_scenario(data: bytes, folder: Path) -> None:
    (file := folder / "scenario.yaml").write_bytes(data)
    scenario.load(file)


def read_ledger(data: bytes, folder: Path) -> None:
    """Lines that are JSON objects are chained anew, and the head counts them."""
    chain, lines = "", []
    for text in data.split(b"\n"):
        try:
            line = json.loads(text)
            line.pop("chain", None)
            chain = hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()[:32]
            text = json.dumps({**line, "chain": chain}).encode()
        except (AttributeError, RecursionError, TypeError, ValueError):
            pass
        lines.append(text)
    (folder / "privacy.jsonl").write_bytes(b"\n".join(lines))
    (folder / "privacy.head").write_text(f"{len(lines) - 1} {chain}\n")
    ledger.Ledger(folder)
    ledger.epsilon_of(folder / "privacy.jsonl")


def read_checkpoint(data: bytes, folder: Path) -> None:
    """The first byte says which of a good checkpoint's files the others take the place of."""
    names = sorted(name for name in fuzz.saved() if name.startswith("c/"))
    hurt = names[data[0] % len(names)] if data else names[0]
    (folder / "c").mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(data[1:] if name == hurt else fuzz.saved()[name])
    if hurt != "c/manifest.json":
        sums = {n[2:]: checkpoint._digest(folder / n) for n in names if n != "c/manifest.json"}
        (folder / "c" / "manifest.json").write_text(json.dumps(sums))
    checkpoint.load(folder / "c")


def read_update(data: bytes, folder: Path) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    content = wire.from_bytes(data)
    wire.unpack_event(content)
    wire.unpack_words(content)
    wire.unpack_update(content, 0)


def good() -> dict[str, list[bytes]]:
    """Inputs that every reader takes, to begin with."""
    names = sorted(name for name in fuzz.saved() if name.startswith("c/"))
    return {
        "scenario": fuzz.scenarios(),
        "ledger": [fuzz.saved()["privacy.jsonl"]],
        "checkpoint": [bytes([i]) + fuzz.saved()[name] for i, name in enumerate(names)],
        "update": [fuzz.reply()],
    }


def main(what: str, inputs: int) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    read = globals()[f"read_{what}"]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        corpus, folder = Path(name) / "corpus", Path(name) / "here"
        corpus.mkdir()
        folder.mkdir()
        for number, data in enumerate(good()[what]):
            (corpus / str(number)).write_bytes(data)
            read(data, folder)

        def one(data: bytes) -> None:
            try:
                read(data, folder)
            except FedloraError as error:
                assert str(error), "an error without words"

        atheris.Setup([sys.argv[0], str(corpus), f"-runs={inputs}", "-seed=1", "-max_len=8192"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 30_000)
