"""The round before the first: a run's base is cut, by its weights or by a noised statistic of the clients' rows.

Each client adds up what its examples say of the layers (`fedlora.passes.statistic`), bounded one by one, and
noises the sum once. It pays before it looks at a row, in the same ledger that training pays in. The sums of all
are one statistic; cutting the base by it is a function of what was released. The smaller base is in the run's
folder, `base/`, from which every worker loads it, and a run that goes on takes it as it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora import compressing, prepare
from fedlora.compressors import contract
from fedlora.compressors.contract import Statistic
from fedlora.data.store import Partition
from fedlora.engine import Setup
from fedlora.engine.setup import Description
from fedlora.engine.worker import Worker
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.contract import under
from fedlora.passes.statistic import Collector
from fedlora.prepare import Prepared
from fedlora.privacy.accounting import Event
from fedlora.privacy.ledger import Holder, Ledger
from fedlora.privacy.mechanisms.statistic import StatisticGaussian
from fedlora.rounds import folder as folders
from fedlora.scenario import Scenario
from fedlora.scenario.keys import lasting
from fedlora.seeding import stream
from fedlora.tasks import located, smaller

if TYPE_CHECKING:
    from fedlora.tasks.contract import Batch, Task

BASE = "base"  # of a run's folder
OF = "base.of"  # beside it: differs where the base would be cut in another way, or by other rows

Sums = dict[str, NDArray[np.float64]]


def cut(ready: Prepared, folder: Path, begun: Mapping[str, Any], shown: Callable[[str], None]) -> Prepared:
    """What was prepared, with the base that the scenario asks for; as it was where it asks for none.

    Args:
        ready: with calibrated noise.
        folder: of the run; it is made where it is not there.
        begun: what the run begins with.
        shown: told what is being done.

    Raises:
        UserError: the base cannot be had or cut, or the ledger cannot be written.
    """
    scenario, base = ready.scenario, folder.absolute() / BASE
    if scenario.compress is None:
        return ready
    of = folder / OF
    if not (base / located.MANIFEST).is_file() or not of.is_file():
        _cut(ready, folder, begun, shown)
    elif of.read_text() != _of(ready, begun):
        raise SettingError(
            "compress", f"{base} was cut in another way, or of other rows: start again in another folder"
        )
    return replace(ready, setup=replace(ready.setup, base=base))


def _cut(ready: Prepared, folder: Path, begun: Mapping[str, Any], shown: Callable[[str], None]) -> None:
    scenario, told = ready.scenario, ready.scenario.compress
    assert told is not None
    shown("cutting the base")
    compressor = contract.load(told.use, {"keep": told.keep, **told.options})
    model = scenario.model
    loaded, reader = compressing.load(model.base, model.revision, told.targets, told.exclude)
    loaded = compressing.asked_for(compressor, loaded)
    collected = _collector(ready.setup, scenario, loaded) if scenario.statistics is not None else None
    if collected is not None:
        _, collector, named = collected
        compressing.check_known(compressor, loaded, {n for n, m in named.items() if m in collector.shared})
    if not (folder / "scenario.yaml").exists():  # nothing can be wrong with the input from here on
        folders.create(folder, scenario, ready.data, begun)
    known: dict[str, Statistic] = {}
    about: dict[str, Any] = {"base": model.base, "revision": model.revision, "base_fingerprint": begun["base"]}
    about["statistic"] = None
    (folder / OF).write_text(
        of := _of(ready, begun)
    )  # not in the base, which is to be a function of the noised sum
    if collected is not None:
        shown("taking the statistic")
        known = _statistic(ready, folder, of, *collected, about)
    compressing.write(folder.absolute() / BASE, loaded, reader, compressor, told.use, known, about)


def _of(ready: Prepared, begun: Mapping[str, Any]) -> str:
    """Differs where the base would be cut in another way, or by other rows."""
    scenario = ready.scenario
    told = {
        name: getattr(scenario, name) and getattr(scenario, name).model_dump()
        for name in ("compress", "statistics")
    }
    rows = ready.data.fingerprint if scenario.statistics is not None else ""
    head = [scenario.task, scenario.seed, str(scenario.model.head), scenario.model.pooler]
    words = json.dumps([told, begun["base"], rows, scenario.example_privacy and scenario.example_terms, head])
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _settings(scenario: Scenario) -> str:
    """Differs where a setting does that a run keeps when it goes on."""
    told = lasting(scenario.model_dump(mode="json", exclude={"name"}))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def planned(scenario: Scenario, event: Event | None) -> dict[str, Any] | None:
    """The statistic as a plan has it; None where there is none. Arguments are those of `words`."""
    if (asked := scenario.statistics) is None:
        return None
    return {**asked.model_dump(), "noise_multiplier": None if event is None else event.noise_multiplier}


def words(scenario: Scenario, event: Event | None) -> str:
    """What happens to the base before the first round, a sentence; empty where nothing does.

    Args:
        scenario: of the run.
        event: that each client pays for the statistic; None where nothing is noised.
    """
    told, asked = scenario.compress, scenario.statistics
    if told is None:
        return ""
    said = f"Before round 1 the base is cut by {told.use} to {told.keep:.0%} of what that cuts, "
    if asked is None:
        return f"{said}by its weights alone: no row is looked at."
    if event is None:
        return f"{said}by {asked.kind}, a statistic of clients' rows that nothing hides."
    privacy = scenario.example_privacy
    assert privacy is not None
    whole = "" if privacy.epsilon is None else f" of its {privacy.epsilon:g}"
    return (
        f"{said}by {asked.kind}, a statistic of clients' rows. Each spends epsilon {asked.epsilon:g}{whole} "
        f"on its sum, at noise multiplier {event.noise_multiplier:.3g}, and training has the rest."
    )


def _collector(
    setup: Setup, scenario: Scenario, loaded: compressing.Loaded
) -> tuple["Task", Collector, dict[str, str]]:
    """The task of the whole base, what collects in it, and the layer of it that each one to cut is.

    Raises:
        SettingError: no layer has a statistic, or there is no such block.
    """
    asked = scenario.statistics
    assert asked is not None
    worker = Worker(setup)
    task = worker.task
    if worker.kept is not None and task.prefix is not None:
        task.prefix.kept = lambda examples: None  # all blocks are passed
    held = dict(task.model.get_base_model().named_modules())
    named = smaller.paired([*loaded.layers], [name for name, module in held.items() if _linear(module)])
    for block in asked.layers or ():
        if not any(under(f"{name}.", str(block)) for name in named):
            raise SettingError("statistics.layers", f"no layer {block} is cut; the first is 0")
    if asked.layers is not None:
        named = {n: m for n, m in named.items() if any(under(f"{n}.", str(block)) for block in asked.layers)}
    modules = {name: held[name] for name in named.values()}
    trial = task.batch(task.trial, np.arange(len(task.trial)))
    count = len(trial["targets"])

    def tried() -> int:
        _pass(task, asked.kind, trial)
        return count

    sequences = len(trial["input_ids"]) // count if "input_ids" in trial else 1
    task.begin(task.initial, ())
    task.model.eval()
    try:
        with task.precisely(False):
            return task, Collector(modules, asked.kind, task.low_rank.find, tried, sequences), named
    except ContractError as error:
        raise SettingError("statistics.kind", f"{asked.kind} cannot be taken of this base: {error}") from error


def _linear(module: Any) -> bool:
    """Whether a module of a wrapped model stands for one linear layer of the base: itself, or one with factors."""
    from fedlora.kinds.targets import is_linear

    return is_linear(module) or (hasattr(module, "get_base_layer") and is_linear(module.get_base_layer()))


def _statistic(
    ready: Prepared,
    folder: Path,
    of: str,
    task: "Task",
    collector: Collector,
    named: Mapping[str, str],
    about: dict[str, Any],
) -> dict[str, Statistic]:
    """Pay, then take the statistic of every client; what is known of each layer that is to be cut."""
    scenario, asked = ready.scenario, ready.scenario.statistics
    assert asked is not None
    event, kind = prepare.statistic(scenario, prepare.known), asked.kind
    clients = [c for c in range(ready.data.num_clients) if ready.data.units(c)]
    if event is not None:
        ledger = Ledger(folder)  # what is there was paid for a base that nobody saw: its noise is drawn again
        owed: dict[Holder, Any] = {c: event for c in clients if not ledger.paid(c, event)}
        ledger.spend(0, owed, statistic=kind, **scenario.example_terms)
    total: Sums = {}
    for client in clients:
        sums, mechanism = _sum(task, collector, ready, client, event.noise_multiplier if event else None)
        if event is not None:
            # Noise that hides one sum must not hide another: whatever may change a sum changes the noise too.
            noise = stream(scenario.seed, 0, client, "statistic noise", of, _settings(scenario))
            sums = mechanism.noised(sums, noise)
        total = {name: total[name] + values if total else values for name, values in sums.items()}
    expected = asked.share * sum(ready.data.units(c) for c in clients)
    multiplier = 0.0 if event is None else event.noise_multiplier
    deviation = multiplier * len(clients) ** 0.5 / expected
    about["statistic"] = {"kind": kind, "of": "clients", "share": asked.share, "layers": asked.layers}
    about["statistic"]["bytes_up"] = len(clients) * sum(4 * _numbers(values) for values in total.values())
    if event is not None:
        terms = scenario.example_terms
        told = {
            "epsilon": asked.epsilon,
            "delta": terms["delta"],
            "unit": terms["unit"],
            "noise_multiplier": multiplier,
        }
        about["statistic"] |= told
    shared = {name: collector.shared[module] for name, module in named.items() if module in collector.shared}
    return {name: Statistic(kind, total[own] / expected, deviation) for name, own in shared.items()}


def _numbers(values: NDArray[np.float64]) -> int:
    """How many numbers a sum is: of a symmetric matrix half of it, with the diagonal."""
    return len(values) * (len(values) + 1) // 2 if values.ndim == 2 else len(values)


def tried(setup: Setup) -> Description:
    """What workers will build, of shapes alone: so that mistakes show before anybody pays."""
    return Worker(replace(setup, device="meta")).describe()


def _sum(
    task: "Task", collector: Collector, ready: Prepared, client: int, noise: float | None
) -> tuple[Sums, StatisticGaussian]:
    """What the examples of a client add up to, without noise, and the mechanism that it is a sum of."""
    scenario, asked = ready.scenario, ready.scenario.statistics
    assert asked is not None
    partition = ready.data.partition(client)
    mechanism = StatisticGaussian(
        noise_multiplier=noise or 1.0, sample_rate=asked.share, total=ready.data.units(client)
    )
    taken = mechanism.taken(stream(scenario.seed, 0, client, "statistic batch"))
    weights = dict(weighed(partition, taken))
    rows = np.array(sorted(weights), np.int64)
    task.begin(task.initial, ())
    task.model.eval()
    with task.precisely(False):
        if not len(rows):  # coins took none
            return collector.take(), mechanism
        for batch, part in task.micro_batches(partition.examples, rows, scenario.clients.micro_batch_size):
            mask = batch["attention_mask"] if task.packing is None and "attention_mask" in batch else None
            with collector.adding([weights[int(row)] for row in part], mask):
                _pass(task, asked.kind, batch)
    return collector.take(), mechanism


def weighed(partition: Partition, taken: NDArray[np.bool_]) -> Iterator[tuple[int, float]]:
    """The rows that are taken, each with its weight: those of a person together weigh 1.

    Args:
        partition: of a client.
        taken: which of its persons, or examples, (units,).
    """
    if partition.persons is None:
        yield from ((int(row), 1.0) for row in partition.rows[taken])
        return
    _, places, counts = np.unique(partition.persons, return_inverse=True, return_counts=True)
    for row, place in zip(partition.rows, places, strict=True):
        if taken[place]:
            yield int(row), 1.0 / int(counts[place])


def _pass(task: "Task", kind: str, batch: "Batch") -> None:
    """Forward, and for gradients back, with the adapter that the seed stands for, which changes nothing."""
    import torch

    if kind != "row_fisher":
        with torch.no_grad():
            task.logits(batch)
        return
    table = task.model.get_base_model().get_input_embeddings()
    handle = table.register_forward_hook(lambda module, given, out: out.requires_grad_(True))
    try:
        task.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        handle.remove()
