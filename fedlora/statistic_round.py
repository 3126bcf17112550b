"""The round before the first: a run's base is cut, by its weights or by a noised statistic of the clients' rows.

Each client adds up what its examples say of the layers (`fedlora.passes.statistic`), bounded one by one, and
noises the sum once. It pays before it looks at a row, in the same ledger that training pays in. The sums of all
are one statistic, under masks where the scenario says so (`fedlora.engine.summed`); cutting the base by it is a
function of what was released. The smaller base is in the run's folder, `base/`, from which every worker loads it,
and a run that goes on takes it as it is. Sites do the same with their own rows and ledgers, and are sent the
factors (`fedlora.deploy.cutting`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import compressing, prepare, traffic
from fedlora.compressors import contract
from fedlora.compressors.contract import Compressor, LowRank, Statistic
from fedlora.engine import Description, Engine, Setup, secure, summed
from fedlora.engine.replies import Report, Said, Sums
from fedlora.engine.statistic import Taker, mechanism
from fedlora.engine.worker import Worker
from fedlora.errors import RoundError, SettingError
from fedlora.prepare import Prepared
from fedlora.privacy.accounting import Event, in_sums
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.grid import Vector
from fedlora.privacy.ledger import Holder, Ledger
from fedlora.rounds import folder as folders
from fedlora.scenario import Scenario
from fedlora.scenario.compress import Compress
from fedlora.scenario.keys import lasting
from fedlora.seeding import stream
from fedlora.tasks import located, smaller

BASE = "base"  # of a run's folder
OF = "base.of"  # beside it: differs where the base would be cut in another way, or by other rows


def cut(
    ready: Prepared, engine: Engine, folder: Path, begun: Mapping[str, Any], shown: Callable[[str], None]
) -> Prepared:
    """What was prepared, with the base that the scenario asks for; as it was where it asks for none.

    Args:
        ready: with calibrated noise.
        engine: where the clients are.
        folder: of the run; it is made where it is not there.
        begun: what the run begins with.
        shown: told what is being done.

    Raises:
        UserError: the base cannot be had or cut, or the ledger cannot be written.
        RoundError: no client gave its statistic.
    """
    scenario, base = ready.scenario, folder.absolute() / BASE
    if scenario.compress is None:
        return ready
    of = folder / OF
    if not (base / located.MANIFEST).is_file() or not of.is_file():
        _cut(ready, engine, folder, begun, shown)
    elif of.read_text() != _of(ready, begun):
        raise SettingError(
            "compress", f"{base} was cut in another way, or of other rows: start again in another folder"
        )
    return replace(ready, setup=replace(ready.setup, base=base))


def _cut(
    ready: Prepared, engine: Engine, folder: Path, begun: Mapping[str, Any], shown: Callable[[str], None]
) -> None:
    scenario, told = ready.scenario, ready.scenario.compress
    assert told is not None
    shown("cutting the base")
    compressor, loaded, reader, taker = _asked(ready, told)
    model = scenario.model
    if not (folder / "scenario.yaml").exists():  # nothing can be wrong with the input from here on
        folders.create(folder, scenario, ready.data, begun)
    known: dict[str, Statistic] = {}
    about: dict[str, Any] = {"base": model.base, "revision": model.revision, "base_fingerprint": begun["base"]}
    about["statistic"] = None
    # Not in the base, which is to be a function of the noised sum.
    (folder / OF).write_text(of := _of(ready, begun))
    if taker is not None:
        shown("taking the statistic")
        known = _statistic(ready, engine, folder, of, taker, about)
    compressing.write(folder.absolute() / BASE, loaded, reader, compressor, told.use, known, about)


def _asked(ready: Prepared, told: Compress) -> tuple[Compressor, compressing.Loaded, Any, Taker | None]:
    """The compressor, the whole base, what reads for it, and what takes the statistic, if one is asked for.

    Raises:
        SettingError: they do not go together.
    """
    scenario, model = ready.scenario, ready.scenario.model
    compressor = contract.load(told.use, {"keep": told.keep, **told.options})
    loaded, reader = compressing.load(model.base, model.revision, told.targets, told.exclude)
    loaded = compressing.asked_for(compressor, loaded)
    if scenario.statistics is None:
        return compressor, loaded, reader, None
    taker = Taker(Worker(ready.setup), loaded.layers)
    compressing.check_known(compressor, loaded, taker.own)
    return compressor, loaded, reader, taker


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


def planned(ready: Prepared, event: Event | None) -> dict[str, Any] | None:
    """The statistic as a plan has it; None where there is none.

    Args:
        ready: of the run.
        event: as in `words`.
    """
    asked, told = ready.scenario.statistics, ready.scenario.compress
    if asked is None or told is None:
        return None
    compressor, loaded, _, taker = _asked(ready, told)
    assert taker is not None
    span = _span(ready, taker, event)
    clients = [c for c in range(ready.data.num_clients) if ready.data.units(c)]
    each: float = traffic.statistic_bytes(taker.shapes, event)
    if ready.scenario.secure_aggregation is not None:
        each = secure.exchanged(len(clients))[0] + 4 * (summed.size(span.shapes) - 1)
    noise = None if event is None else _in_sum(event)
    seconds = _seconds(ready, taker, clients, noise) + _cut_seconds(compressor, loaded, taker)
    bytes_up = round(len(clients) * each)
    return {**asked.model_dump(), "noise_multiplier": noise, "bytes_up": bytes_up, "seconds": seconds}


def _seconds(ready: Prepared, taker: Taker, clients: Sequence[int], noise: float | None) -> float:
    """Of the sums of these clients and their noise, by a few rows and one draw."""
    rows = sum(len(ready.data.partition(c).rows) for c in clients) * taker.asked.share
    passes = taker.row_seconds(clients[0]) * rows
    if noise is None:
        return passes
    began = time.perf_counter()
    mechanism(1.0, 1, noise).noised(
        {name: np.zeros(shape) for name, shape in taker.shapes.items()}, stream(0, "a draw that is timed")
    )
    return passes + (time.perf_counter() - began) * len(clients)


def _cut_seconds(compressor: Compressor, loaded: compressing.Loaded, taker: Taker) -> float:
    """Of cutting all layers to low rank, by one of each shape; that of leaving parts out is not tried."""
    if not isinstance(compressor, LowRank):
        return 0.0
    weights, alike, total = loaded.weights(), dict[tuple[int, ...], list[str]](), 0.0
    for name in taker.own:
        alike.setdefault(weights[name].shape, []).append(name)
    for name, *others in alike.values():
        shape = taker.shapes[taker.own[name]]
        values = np.eye(shape[0]) if len(shape) == 2 else np.ones(shape)
        began = time.perf_counter()
        contract.compress(compressor, {name: weights[name]}, {name: Statistic(taker.asked.kind, values, 0.0)})
        total += (time.perf_counter() - began) * (1 + len(others))
    return total


def bytes_up(base: Path | None) -> int:
    """Bytes that clients sent of the statistic by which a base was cut; 0 where there was none."""
    told = None if base is None else smaller.manifest(base).get("statistic")
    return 0 if told is None else int(told["bytes_up"])


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
    masked = "" if scenario.secure_aggregation is None else ", which it masks"
    return (
        f"{said}by {asked.kind}, a statistic of clients' rows. Each spends epsilon {asked.epsilon:g}{whole} "
        f"on its sum{masked}, at noise multiplier {_in_sum(event):.3g}, and training has the rest."
    )


def _statistic(
    ready: Prepared, engine: Engine, folder: Path, of: str, taker: Taker, about: dict[str, Any]
) -> dict[str, Statistic]:
    """The statistic of all clients' rows, each paid for before it is used: of each layer that is to be cut."""
    asked, event = taker.asked, prepare.statistic(ready.scenario, prepare.known)
    ledger = Ledger(folder)
    said = engine.statistic(ready.setup, event, taker.shapes) or _here(ready, of, taker, ledger)
    total: Sums = {}
    units, clients, bytes_up, variance = 0, 0, 0, 0.0
    for one in said:
        if one.event is not None and not (one.again and ledger.paid(one.client, one.event)):
            ledger.spend(0, {one.client: one.event}, statistic=asked.kind, **ready.scenario.example_terms)
        bytes_up += one.bytes_up
        if one.sums is None:
            continue
        total = {name: total[name] + values if total else values for name, values in one.sums.items()}
        units, clients, variance = units + one.units, clients + one.clients, variance + one.deviation**2
    if not clients:
        raise RoundError("no client gave the statistic by which the base is to be cut")
    expected = asked.share * units
    about["statistic"] = {"kind": asked.kind, "of": "clients", "share": asked.share, "layers": asked.layers}
    about["statistic"] |= {"clients": clients, "bytes_up": bytes_up}
    if event is not None:
        terms = {key: ready.scenario.example_terms[key] for key in ("delta", "unit")}
        about["statistic"] |= {"epsilon": asked.epsilon, **terms, "noise_multiplier": _in_sum(event)}
    deviation = variance**0.5 / expected
    return {name: Statistic(asked.kind, total[own] / expected, deviation) for name, own in taker.own.items()}


def _here(ready: Prepared, of: str, taker: Taker, ledger: Ledger) -> Iterator[Said]:
    """What clients say whose rows are on this machine; all pay before one looks at a row.

    Raises:
        SettingError: their sums do not go under masks.
    """
    scenario, share = ready.scenario, taker.asked.share
    units = {c: held for c in range(ready.data.num_clients) if (held := ready.data.units(c))}
    clients, masks = list(units), scenario.secure_aggregation
    event = prepare.statistic(scenario, prepare.known, len(clients))
    span = _span(ready, taker, event)
    if event is not None:  # what is there was paid for a base that nobody saw: its noise is drawn again
        owed: dict[Holder, Event] = {c: event for c in clients if not ledger.paid(c, event)}
        ledger.spend(0, owed, statistic=taker.asked.kind, **scenario.example_terms)

    def noised(client: int) -> Sums:
        sums = span.cut(taker.sums(client, stream(scenario.seed, 0, client, "statistic batch")))
        if event is None:
            return sums
        # Noise that hides one sum must not hide another: whatever may change a sum changes the noise too.
        noise = stream(scenario.seed, 0, client, "statistic noise", of, _settings(scenario))
        return mechanism(share, units[client], event.noise_multiplier).noised(sums, noise)

    if masks is None:
        sent = traffic.statistic_bytes(taker.shapes, event)
        for client in clients:
            yield Said(
                client=client, units=units[client], sums=noised(client), deviation=span.noise, bytes_up=sent
            )
        return

    def vector(client: int, among: int) -> Vector:
        return span.vector(noised(client), stream(scenario.seed, 0, client, "statistic rounding", of))

    reports = {client: Report(client=client, num_examples=held) for client, held in units.items()}
    exchange = secure.played(reports, vector, clients, masks, len(clients))
    names = stream(scenario.seed, 0, "statistic pseudonyms")
    yield from summed.said(exchange, reports, masks, names, lambda members: span)


def _span(ready: Prepared, taker: Taker, event: Event | None) -> summed.Span:
    """Which numbers clients send whose rows are on this machine.

    Raises:
        SettingError: their sums do not go under masks.
    """
    held = [held for c in range(ready.data.num_clients) if (held := ready.data.units(c))]
    span = summed.Span(summed.no_fewer(max(held)), taker.shapes, event)
    if ready.scenario.secure_aggregation is not None:
        if len(held) < LEAST:
            what = f"{len(held)} clients hold rows, and a sum of statistics takes {LEAST}"
            raise SettingError("secure_aggregation", what)
        span.check_grid()
    return span


def _in_sum(event: Event) -> float:
    """The noise multiplier of the sum that is seen of a client: its own sum, or that of all under masks."""
    return in_sums([event])[0].noise_multiplier


def tried(setup: Setup) -> Description:
    """What workers will build, of shapes alone: so that mistakes show before anybody pays."""
    return Worker(replace(setup, device="meta")).describe()
