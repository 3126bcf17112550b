"""The end of a run at a site: what its server says of it, and the adapter where the site file asks for it.

The adapter is written as `fedlora simulate` writes one, so that `fedlora evaluate` and `predict` take it. What of
it stays with each site, such as FedSA-LoRA's B, is the site's own of its last round.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedlora import wire
from fedlora.adapter import Adapter
from fedlora.deploy.serving import Serving
from fedlora.deploy.site import Site
from fedlora.engine.intake import check_tensors
from fedlora.errors import ContractError
from fedlora.exporting import About, describe, replaced
from fedlora.record import ENDED
from fedlora.rounds.checkpoint import read_tensors, write_tensors
from fedlora.rounds.folder import write_json
from fedlora.tasks.located import named_elsewhere

FINAL = "final.safetensors"  # the adapter as tensors of the layout; with `ENDED` what training goes on from


def end(run: Serving, site: Site | None, folder: Path, content: RecordDict, client: int) -> RecordDict:
    """Write down that a run has ended, and its adapter, if it came and the site wants it.

    Args:
        run: of the message, with the merges that its server has.
        site: what the site file says.
        folder: of the run.
        content: of the message.
        client: which one the site is.

    Raises:
        ContractError: the message says what cannot be.
        OSError: the adapter cannot be written.
    """
    words, rounds = wire.unpack_words(content), run.worker.scenario.rounds
    round = wire.whole(words.get("round"), "round", 1, rounds)
    threshold = wire.figure(words.get("threshold"), "threshold")
    came = site is not None and site.receive == "adapter" and wire.ARRAYS in content.array_records
    merges = wire.whole(words.get("merges", 0), "merges", 0, len(run.merges) if came else rounds)
    if site is not None and came:
        adapter = _adapter(run, wire.from_arrays(content.array_records[wire.ARRAYS]), client, round)
        write_tensors(folder / FINAL, adapter)
        about = run.about(threshold)
        whose = f"after round {round}, as its server sent it to {site.name}"
        export(run, adapter, merges, about, folder / "adapter", whose)
    told = {"round": round, "merges": merges, "threshold": threshold, "adapter": came}
    write_json(folder / ENDED, {**told, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    return wire.pack_words({"ended": round})


def final(folder: Path) -> Adapter | None:
    """The adapter that a site received of a run; None where it did not."""
    return read_tensors(folder / FINAL) if (folder / FINAL).exists() else None


def export(run: Serving, adapter: Adapter, merges: int, about: About, folder: Path, whose: str) -> None:
    """Write an adapter of a run as people use it.

    Args:
        run: of the adapter.
        adapter: every tensor of the layout.
        merges: how many of the run's merges are part of it.
        about: what it was trained on.
        folder: to make, or to write again.
        whose: what the card says of it, after the run's name.
    """

    def write(new: Path) -> None:
        run.worker.export(adapter, new, run.merges.total(merges) or None)
        describe(new, about)
        (new / "README.md").write_text(_card(about, f"{run.key} {whose}"), encoding="utf-8")

    replaced(folder, write)


def _adapter(run: Serving, came: Mapping[str, Any], client: int, round: int) -> Adapter:
    """Every tensor: those that came, those that stayed here, and else what the seed gives.

    Raises:
        ContractError: those that came are not of this adapter, or not finite.
    """
    task, strategy = run.worker.task, run.worker.strategy
    if strange := sorted(came.keys() - task.layout.keys()):
        raise ContractError(f"the server sends {strange[0]:.100}, which is no tensor of this adapter")
    check_tensors(dict(came), {name: task.layout[name].shape for name in came})
    personal, kept = run.worker.personal, set(strategy.keeps(task.layout))
    own = personal.load(client, before=round + 1) if personal is not None and kept else {}
    fits = {n: t for n, t in own.items() if n in kept and t.shape == task.layout[n].shape}
    return {**task.initial, **came, **fits}


def _card(about: About, what: str) -> str:
    labels = f"- labels: {', '.join(about.labels)}\n" if about.labels else ""
    if about.pooling == "mean":
        labels += "- reads: the mean over tokens (`model.pooling: mean`), which plain peft does not\n"
    return f"""---
base_model: {named_elsewhere(about.base)}
library_name: peft
tags: [lora, federated-learning, fedlora]
---
# {what}

{labels}- `fedlora evaluate FOLDER --data FILE` judges it by rows of a file; `fedlora predict FOLDER TEXT` asks it.
- With fedlora, the tokenizer too: `model, tokenizer = fedlora.load_adapter("adapter")`.
"""
