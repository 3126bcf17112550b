"""From a scenario to a finished run folder."""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import client as clients
from fedlora import engine as engines
from fedlora import scenario as scenarios
from fedlora import strategy as strategies
from fedlora.adapter import Adapter
from fedlora.data import store as datasets
from fedlora.engine.worker import Setter
from fedlora.errors import SettingError, UserError
from fedlora.optimizers import contract as optimizers
from fedlora.privacy import accounting, cohorts, ledger
from fedlora.privacy.budget import Budget
from fedlora.privacy.central import Central
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import fresh_key
from fedlora.privacy.replay import versions
from fedlora.reports import trackers
from fedlora.reports.console import Display, default_display
from fedlora.reports.trackers import Tracked
from fedlora.rounds import checkpoint, server
from fedlora.rounds.checkpoint import Merges, whole_folder
from fedlora.rounds.loop import Loop, round_to
from fedlora.rounds.progress import Progress
from fedlora.rounds.world import World
from fedlora.run import METRICS, Run
from fedlora.scenario import Scenario
from fedlora.seeding import Root
from fedlora.tasks import contract as task

SHOWN = 1000  # clients in `partitions.json`, at most

logger = logging.getLogger(__name__)

# What a resumed run may change: how long it goes on, and what cannot change a result.
CHANGEABLE = (
    "rounds",
    "eval_every",
    "trackers",
    "engine.kind",
    "engine.workers",
    "engine.gpus_per_worker",
    "engine.deadline",
)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A scenario with everything checked that can be before a model is loaded."""

    scenario: Scenario
    strategy: strategies.Strategy
    client: clients.Client
    data: datasets.Dataset
    setup: engines.Setup


def simulate(
    scenario: Scenario | str | Path,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    ray_address: str | None = None,
    display: Display | None = None,
    watch: Callable[[engines.Engine], engines.Engine] | None = None,
) -> Run:
    """Run a scenario to its end.

    Args:
        scenario: a loaded one, a file, or the name of one that ships with fedlora.
        overrides: `a.b=value` settings; only with a file or a name.
        out: the run folder, by default `runs/<name>-<hash>`.
        resume: go on from the folder's checkpoint.
        ray_address: of a running Ray cluster to join.
        display: shown how the run goes; by default a progress bar in a notebook, and nothing elsewhere.
        watch: puts an engine of one's own around the one that runs the clients, to see what passes.

    Returns:
        The run. After Ctrl-C its summary says `stopped`, and holds what was finished.

    Raises:
        UserError: the input is wrong; nothing was written.
        RoundError: too few clients of a round replied, in every attempt at it.
    """
    if not isinstance(scenario, Scenario):
        scenario = scenarios.load(scenario, overrides)
    elif overrides:
        raise UserError("overrides go with a scenario's file or name, not with a loaded one")
    folder = Path(out) if out else Path("runs") / f"{scenario.name}-{scenario.hash}"
    check_folder(folder, scenario, resume)
    shown = Tracked(display or default_display(), folder)
    try:
        trackers.check(scenario.trackers)
        return _simulate(scenario, folder, resume, ray_address, shown, watch or (lambda engine: engine))
    except SettingError as error:
        raise scenario.located(error) from error
    finally:
        shown.close()


def _simulate(
    scenario: Scenario,
    folder: Path,
    resume: bool,
    address: str | None,
    shown: Display,
    watch: Callable[[engines.Engine], engines.Engine],
) -> Run:
    shown.stage("reading and tokenising the data")
    ready = prepare(scenario)
    stop = signal.default_int_handler
    with _signals(stop), contextlib.closing(watch(engines.make(scenario, address))) as engine:
        shown.stage("calibrating the noise")  # while workers import
        ready = replace(ready, setup=replace(ready.setup, noise=calibrate(scenario, ready.data)))
        return carry_out(ready, engine, folder, resume, shown)


def carry_out(ready: Prepared, engine: engines.Engine, folder: Path, resume: bool, shown: Display) -> Run:
    """Run what was prepared on an engine, from its first round, or the checkpoint's, to a finished folder.

    Raises:
        UserError: the input is wrong, or the disk is full or no longer to be written.
    """
    try:
        return _carry_out(ready, engine, folder, resume, shown)
    except OSError as error:
        if not (folder / "scenario.yaml").exists():
            raise
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{what}; what was finished is saved: mend that, and go on with --resume") from error


def _carry_out(ready: Prepared, engine: engines.Engine, folder: Path, resume: bool, shown: Display) -> Run:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    scenario, setup = ready.scenario, ready.setup
    whole = central(scenario, fresh_key() if setup.secret else scenario.seed)
    kept = scenario.clients.optimizer is not None and scenario.clients.optimizer.state == "kept"
    if ready.strategy.personal or ready.strategy.trips > 1 or scenario.feeds_back or kept:
        setup = replace(setup, personal=folder.absolute() / "personal")
    shown.stage("loading the model")
    found = engine.start(setup)
    ready.strategy.bind(found.layout, found.kind, found.initial, ready.client.private)
    check_strategy(ready.strategy)
    check_optimizer(ready)
    stage = server.make(scenario.strategy.server, found.layout, ready.strategy.held, scenario.rounds)
    now = Progress(round=0, adapter=dict(found.initial))
    origin = {
        "scenario": scenario.model_dump(mode="json"),
        "versions": _versions(found),
        "data": ready.data.fingerprint,
    }
    if resume:
        now, record = _restore(folder, ready, now, origin, stage)
    else:
        _create(folder, ready)
        record = Ledger(folder)
    merges = Merges(folder / "merges", found.weights)
    merges.restore(now.merges)
    for change in merges.changes:
        engine.merge(change)
    budget = Budget(
        scenario=scenario,
        client=ready.client,
        settings=Setter(scenario, setup.noise),
        data=ready.data,
        central=whole,
        ledger=record,
        repeatable=not setup.secret,
    )
    loop = Loop(
        scenario=scenario,
        strategy=ready.strategy,
        engine=engine,
        data=ready.data,
        budget=budget,
        ledger=record,
        merges=merges,
        central=whole,
        server=stage,
        folder=folder,
        origin=origin,
        on_round=shown.round,
    )
    shown.begin(scenario, found.metric, now.round)
    stopped = None
    try:
        with _stopping() as asked:
            loop.stop = asked
            now = loop.run(now)
        stopped = now.last.pop("stopped", None)
    except KeyboardInterrupt:
        stopped = f"interrupted after round {now.round}"
    with _undisturbed():
        if stopped is not None and now.round and found.metric not in now.last and not ready.strategy.personal:
            now.last.update(engine.evaluate(now.adapter))
        _export(engine, now.adapter, folder, merges)
        summary = _summary(ready, now, found, record, stopped)
        _write_json(folder / "summary.json", summary)
        _model_card(folder, ready, summary)
    return Run(folder, summary)


def prepare(scenario: Scenario) -> Prepared:
    """Everything that a run needs but the model and the calibrated noise.

    Raises:
        SettingError: a setting does not fit the data.
    """
    data, total = scenario.data, scenario.clients.total
    return _prepared(
        scenario, lambda encode, key: datasets.prepare(data, scenario.task, total, scenario.seed, encode, key)
    )


def prepare_server(scenario: Scenario) -> Prepared:
    """The same where clients are sites that keep their examples: the server has the test rows alone.

    Raises:
        SettingError: there are none, or the scenario asks for what sites cannot do.
    """
    if scenario.world is not None:
        raise SettingError("world", "is of simulated devices: leave it out to run on sites")
    data, total = scenario.data, scenario.clients.total
    test, labels = datasets.read_test(data, scenario.task)

    def hold(encode: datasets.Encode, key: str) -> datasets.Dataset:
        return datasets.hold(data, scenario.task, total, scenario.seed, encode, key, labels, test=test)

    ready = _prepared(scenario, hold, labels)
    return replace(ready, setup=replace(ready.setup, secret=True))


def prepare_site(
    scenario: Scenario, labels: Sequence[str], rows: datasets.Rows, client: int, own: bytes, **placed: Any
) -> engines.Setup:
    """What a site's worker needs, its noise calibrated to the rows that it holds.

    Args:
        scenario: that the server sent.
        labels: that the server sent, in order.
        rows: of the site's own file.
        client: which client the site is.
        own: a key of the site's own, which it draws the rows from that it holds out.
        placed: fields of `Setup` that are the site's own choice, such as `threads`.

    Raises:
        SettingError: a setting does not fit the rows.
    """
    data, total = scenario.data, scenario.clients.total

    def hold(encode: datasets.Encode, key: str) -> datasets.Dataset:
        return datasets.hold(data, scenario.task, total, own, encode, key, labels, train=rows, client=client)

    ready = _prepared(scenario, hold, labels)
    noise = calibrate(scenario, ready.data)
    return replace(ready.setup, noise=noise, secret=ready.client.private, **placed)


def _prepared(
    scenario: Scenario,
    hold: Callable[[datasets.Encode, str], datasets.Dataset],
    labels: Sequence[str] | None = None,
) -> Prepared:
    """Everything that a run needs but the noise, with what `hold` makes of the tokenizer for its data."""
    strategy = strategies.load(scenario.strategy.use, scenario.strategy.options)
    strategies.check(strategy, scenario)
    client = clients.load(scenario.clients.use, scenario.clients.options)
    clients.check_fused(client, scenario.engine.fused)
    optimizers.check(client, scenario)
    if client.private and scenario.example_privacy is None:
        raise SettingError("clients.use", f"{scenario.clients.use} needs a privacy section")
    if not client.private and scenario.example_privacy is not None:
        raise SettingError("clients.use", f"{scenario.clients.use} adds no noise, and a privacy section is given")
    if scenario.world is not None:
        World(scenario)  # reads its trace
    model, data = scenario.model, scenario.data
    images = scenario.task == "image_classification"
    reader = (task.load_processor if images else task.load_tokenizer)(model.base, model.revision)
    names = list(labels or data.labels or ())

    def encode(rows: datasets.Rows) -> datasets.Encoded:
        if scenario.task == "causal_lm":
            return task.encode_causal_lm(reader, rows, data.max_length)
        if not names:  # the training rows come first, and hold every label
            names.extend(sorted(set(rows.labels or ())))
        if images:
            return task.encode_images(reader, rows, names)
        return task.encode_classification(reader, rows, names, data.max_length)

    dataset = hold(encode, task.encoding_fingerprint(reader))
    setup = engines.Setup(
        scenario=scenario.model_dump(),
        dataset=dataset.folder,
        partitions=dataset.partition_folder,
        threads=engines.threads(scenario),
        precision=scenario.engine.precision,
        device=engines.device(scenario),
    )
    return Prepared(scenario=scenario, strategy=strategy, client=client, data=dataset, setup=setup)


def calibrate(scenario: Scenario, data: datasets.Dataset) -> dict[int, float] | None:
    """The noise multiplier for each number of examples that a client holds; None without privacy.

    Calibrated over all the steps that a client can be asked for: every round of the scenario.
    """
    told, asked = scenario.clients, scenario.example_privacy
    if asked is None:
        return None
    sizes = sorted(data.sizes().keys() - {0})  # 0: held elsewhere
    if asked.delta >= 1 / sizes[-1]:
        logger.warning(
            "privacy.delta: %g is not below 1/%d, one over the examples of the largest client: at such a delta a "
            "mechanism that gives a whole example away now and then counts as private; write %.0e or less",
            *(asked.delta, sizes[-1], 0.1 / sizes[-1]),
        )
    if told.batch_size > sizes[0]:
        raise SettingError(
            "clients.batch_size",
            f"a client has {sizes[0]} examples, and a private batch takes {told.batch_size} of them on "
            "average; lower it, use fewer clients, or raise data.partition.min_examples",
        )
    if asked.noise_multiplier is not None:
        return dict.fromkeys(sizes, asked.noise_multiplier)
    assert asked.epsilon is not None
    rates, steps = [told.batch_size / size for size in sizes], scenario.rounds * told.local_steps
    found = accounting.calibrations(asked.epsilon, asked.delta, rates, steps, asked.accountant)
    return dict(zip(sizes, found, strict=True))


def central(scenario: Scenario, root: Root) -> Central | None:
    """The server's side of client-level privacy, its noise calibrated over every round; None without.

    Args:
        scenario: of the run.
        root: of cohorts and noise.
    """
    told, asked = scenario.clients, scenario.client_privacy
    if asked is None:
        return None
    if asked.delta >= 1 / told.total:
        logger.warning(
            "privacy.delta: %g is not below 1/%d, one over the clients: at such a delta a mechanism that gives a "
            "whole client away now and then counts as private; write %.0e or less",
            *(asked.delta, told.total, 0.1 / told.total),
        )
    rate, noise = told.cohort_size / told.total, asked.noise_multiplier
    if noise is None:
        assert asked.epsilon is not None
        noise = accounting.calibrate(asked.epsilon, asked.delta, rate, scenario.rounds, asked.accountant)
    return Central(
        noise_multiplier=noise,
        sample_rate=rate,
        total=told.total,
        root=root,
        quantile=asked.quantile,
        shared=scenario.shares_noise,
    )


def check_folder(folder: Path, scenario: Scenario, resume: bool) -> None:
    """Refuse to write over a run, or to go on with another one.

    Raises:
        UserError: with what to do instead.
    """
    written = folder / "scenario.yaml"
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "already holds a run" if written.exists() else "is not an empty folder"
            raise UserError(f"{folder}: {what}; name another with --out, or go on with it with --resume")
        return
    if not written.exists():
        raise UserError(f"{folder}: holds no run to resume")
    same_run(folder, scenarios.load(written).model_dump(mode="json"), scenario.model_dump(mode="json"))


def same_run(folder: Path, before: Any, after: Any) -> None:
    """Refuse to go on with another scenario, by the names of the keys that differ.

    Raises:
        UserError: with those keys.
    """
    changed = [key for key in _differences(before, after) if key not in CHANGEABLE]
    if changed:
        raise UserError(
            f"{folder}: was run with another {', '.join(changed)}; a resumed run may only change "
            f"{', '.join(CHANGEABLE)}"
        )


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path


def check_strategy(strategy: strategies.Strategy) -> None:
    """Make sure that a bound strategy trains something of its model.

    Raises:
        SettingError: it does not.
    """
    layout = strategy.layout
    for what, names in (("federates", strategy.federates(layout)), ("trains", strategy.trains(1, layout))):
        if strange := sorted(set(names) - set(layout)):
            raise SettingError("strategy.use", f"{what} {strange[0]!r}, which the adapter does not have")
    if not any(layout[name].trainable for name in strategy.trains(1, layout)):
        raise SettingError("strategy.use", "trains no tensor of this adapter")


def check_optimizer(ready: Prepared) -> None:
    """Make sure that clients can step as asked on the tensors of a bound strategy.

    Raises:
        SettingError: they cannot, or a role has no rate.
    """
    strategy, told, layout = ready.strategy, ready.scenario.clients, ready.strategy.layout
    if told.optimizer is None and not told.rates:
        return
    names = {n for round in (1, 2) for n in strategy.trains(round, layout) if layout[n].trainable}
    server.check_rates("clients.lr", told.lr, layout, names)
    instruction = strategy.instruct(1, strategy.initial)
    settings = replace(Setter(ready.scenario, None)(instruction, 0), train=tuple(sorted(names)))
    optimizers.check_steps(ready.client, layout, settings.train, settings)


def _create(folder: Path, ready: Prepared) -> None:
    """Make the run folder, whole or not at all."""
    try:
        with whole_folder(folder) as new:
            (new / "scenario.yaml").write_text(ready.scenario.to_yaml())
            _write_json(new / "partitions.json", _partitions(ready.data))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _partitions(data: datasets.Dataset) -> dict[str, Any]:
    """Who holds what; of very many clients as many as a picture can show, evenly chosen."""
    total = data.num_clients
    counts = {int(c): data.histogram(int(c)) for c in np.linspace(0, total - 1, min(total, SHOWN)).round()}
    return {
        "labels": list(data.labels),
        "clients_total": total,
        "clients": [
            {"client": c, "num_examples": int(row.sum()), "labels": row.tolist()}
            for c, row in counts.items()
            if row.any()  # else nobody but its site knows
        ],
        "test_examples": len(data.test),
    }


def _restore(
    folder: Path,
    ready: Prepared,
    first: Progress,
    origin: Mapping[str, Any],
    stage: server.ServerOptimizer | None,
) -> tuple[Progress, Ledger]:
    """Where the folder's run stands, at its start if it was stopped before any round was saved; and its ledger.

    Raises:
        UserError: no checkpoint is whole, it is of another run, or the ledger lacks what it has seen.
    """
    now, known = first, (0, "")
    if (saved := checkpoint.load(folder / "checkpoint")) is not None:
        try:
            same_run(folder, saved.origin["scenario"], origin["scenario"])
            if saved.origin["data"] != origin["data"]:
                raise UserError(
                    f"{folder}: its rounds so far were trained on other data, or cut by another tokenizer: put "
                    "those back, or start again in another folder with --out"
                )
            if set(saved.adapter) != set(first.adapter):
                raise UserError(f"{folder}: its checkpoint holds another adapter than this scenario builds")
            if stage is None:
                ready.strategy.load_state(saved.strategy)
            else:
                ready.strategy.load_state(stage.load_state(saved.strategy))
            now = Progress.restored(saved)
            known, before = tuple(saved.origin["ledger"]), dict(saved.origin["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: its checkpoint is of another version of fedlora: go on by that one, or start again in "
                "another folder with --out"
            ) from error
        if moved := [
            f"{what} {before.get(what)}, now {v}"
            for what, v in origin["versions"].items()
            if before.get(what) != v
        ]:
            logger.warning("%s: began with %s; the rest may differ in last bits", folder, "; ".join(moved))
    record = Ledger(folder, known)
    record.forget_after(now.round, judged=now.round - (now.unjudged is not None))
    _write_text(folder / "scenario.yaml", ready.scenario.to_yaml())
    return now, record


def _export(engine: engines.Engine, adapter: Adapter, folder: Path, merges: Merges) -> None:
    new = folder / ".adapter"
    shutil.rmtree(new, ignore_errors=True)
    engine.export(adapter, new, merges.total() or None)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    new.rename(folder / "adapter")


def _summary(
    ready: Prepared, now: Progress, found: engines.Description, record: Ledger, stopped: str | None
) -> dict[str, Any]:
    scenario = ready.scenario
    asked = scenario.privacy
    spent = _spent(record, asked)
    summary: dict[str, Any] = {
        "scenario": scenario.name,
        "strategy": scenario.strategy.use,
        "rounds": now.round,
        found.metric: now.last.get(found.metric),
        "loss": now.last.get("loss"),
        "bytes_up_total": now.bytes_up,
        "bytes_up_head": now.bytes_up_head,
        "bytes_down_total": now.bytes_down,
        "epsilon": spent,
        "delta": asked.delta if asked else None,
        "privacy_unit": asked.unit if asked else None,
        "accountant": asked.accountant if asked else None,
        "neighbours": ledger.neighbours(asked.unit) if asked else None,
        "sampling": "poisson" if asked else None,
        "example_epsilon": _spent(record, scenario.example_privacy),
        "server_epsilon": server_epsilon(scenario, record.events),
        "peer_epsilon": peer_epsilon(scenario, record.events.get(None, ())),
        "privacy": _privacy_in_words(ready, record),
        "seconds": round_to(now.seconds),
        "clients_per_second": round_to(now.trained / now.seconds) if now.seconds else None,
        "failures": now.failures,
        "seed": scenario.seed,
        "hash": scenario.hash,
        "precision": found.precision,
        "device": found.device,
        "threads": ready.setup.threads,
        "test_examples": found.test_examples,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if scenario.world is not None:
        summary["virtual_seconds"] = round_to(now.virtual_seconds)
    if scenario.exact_match is not None:
        summary["exact_match"] = now.last.get("exact_match")
    if stopped is not None:
        summary["stopped"] = stopped
    return summary


def _versions(found: engines.Description) -> dict[str, str]:
    """What decides the last bits of a result beside the scenario."""
    return {**versions(), "precision": found.precision, "device": found.device}


def _spent(record: Ledger, asked: scenarios.Privacy | None) -> float | None:
    """The largest epsilon over those who hold a budget for a guarantee; None without one."""
    if asked is None:
        return None
    return _largest(record.events, asked.unit, asked)


def server_epsilon(scenario: Scenario, events: Mapping[ledger.Holder, Sequence[accounting.Event]]) -> float | None:
    """The largest epsilon over clients from the server that sees their sums; None where they share no noise."""
    if not scenario.shares_noise or (asked := scenario.client_privacy) is None:
        return None
    return _largest(events, accounting.FROM_SERVER, asked)


def _largest(
    events: Mapping[ledger.Holder, Sequence[accounting.Event]], unit: str, asked: scenarios.Privacy
) -> float:
    """The largest epsilon over those who hold a budget of a unit; 0 where nothing was spent."""
    every = (
        accounting.epsilon(spent, asked.delta, asked.accountant)
        for holder, spent in events.items()
        if ledger.unit(holder) == unit
    )
    return max(every, default=0.0)


def _privacy_in_words(ready: Prepared, record: Ledger) -> str:
    scenario, asked = ready.scenario, ready.scenario.privacy
    if asked is None:
        return "none: no gradient was clipped or noised"
    words = accounting.statement(_spent(record, asked) or 0.0, asked.delta, asked.unit, asked.accountant)
    if asked.unit == "client":
        seen = "the sum of the clipped updates" if scenario.secure_aggregation else "each clipped update"
        words += f", from whoever sees the models but not from the server, which sees {seen}"
    if (whole := server_epsilon(scenario, record.events)) is not None and scenario.secure_aggregation is not None:
        honest = scenario.secure_aggregation.honest
        words += " under the clients' noise; "
        words += accounting.statement(whole, asked.delta, accounting.FROM_SERVER, asked.accountant, honest)
    if asked.unit == "client" and scenario.secure_aggregation is not None:
        words += _among_clients(scenario, asked, record.events.get(None, ()))
    if asked.example is not None:
        example = _spent(record, asked.example) or 0.0
        words += "; at the same time, from the server too, "
        words += accounting.statement(example, asked.example.delta, "example", asked.example.accountant)
    if asked.share_metrics:
        words += "; the training losses and example counts that clients shared are not covered by it"
    if ready.setup.secret:
        return f"{words}; whoever added noise drew it, and the batches, under a key from the operating system"
    return (
        f"{words}; noise was drawn from the scenario's seed, as fits a simulation and not a deployment; who holds "
        "which examples, the labels and the test set are taken as given"
    )


def peer_epsilon(scenario: Scenario, events: Sequence[accounting.Event]) -> float | None:
    """Epsilon of a client from another that is in the same rounds under masks; None elsewhere.

    Args:
        scenario: of the run.
        events: of those rounds, as they cost every client.
    """
    if (asked := scenario.client_privacy) is None or scenario.secure_aggregation is None:
        return None
    known = 1 / cohorts.LEAST if scenario.shares_noise else 0.0
    return accounting.beside(events, asked.delta, asked.accountant, known)


def _among_clients(scenario: Scenario, asked: scenarios.Privacy, events: Sequence[accounting.Event]) -> str:
    """What a client is promised from another that is in the same rounds; and what small cohorts add to delta."""
    most = max((peer_epsilon(scenario, [replace(event, steps=1)]) or 0.0 for event in events), default=0.0)
    every = peer_epsilon(scenario, events) or 0.0
    said = accounting.statement(every, asked.delta, accounting.FROM_CLIENTS, asked.accountant)
    return (
        f"; {said}, in every round of the run; in one round, epsilon {most:.3g}; cohorts too small or too large "
        f"for a sum add at most {cohorts.RARE:.0%} to delta, and whether enough clients stay to the end of a "
        "round is not covered"
    )


def _model_card(folder: Path, ready: Prepared, summary: Mapping[str, Any]) -> None:
    """The README beside the adapter: what it is and how to load it."""
    scenario = ready.scenario
    base, metric = scenario.model.base, next(k for k in METRICS if k in summary)
    auto = task.model_class(scenario.task).__name__
    extra = f", num_labels={len(ready.data.labels)}" if ready.data.labels else ""
    if scenario.task == "image_classification":
        extra += ", ignore_mismatched_sizes=True"
    where = f'find_base("{base}")' if base == "minilm" else f'"{base}"'
    first = "from fedlora.tasks.contract import find_base\n" if base == "minilm" else ""
    value = summary[metric]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    who = "sites" if ready.setup.secret else "simulated clients"
    sent = f"{summary['bytes_up_total']:,} bytes; to clients: {summary['bytes_down_total']:,} bytes"
    if scenario.client_privacy is not None:
        sent = "not told: it says how many were drawn"
    judged = f"{summary['test_examples']} held-out examples"
    if ready.strategy.personal:
        judged = "the examples that clients hold out, by clients' own models; this adapter is what they share"
    (folder / "adapter" / "README.md").write_text(
        f"""---
base_model: {base}
library_name: peft
tags: [lora, federated-learning, differential-privacy, fedlora]
---
# {scenario.name}

A LoRA adapter (r = {config["r"]}, alpha = {config["lora_alpha"]:g}) for `{base}`, fine-tuned
by {scenario.clients.total} {who} with `{scenario.strategy.use}` over {summary["rounds"]} rounds.

- {metric} on {judged}: {"not measured" if value is None else f"{value:.4f}"}
- labels: {", ".join(ready.data.labels) or "none"}
- sent by clients: {sent}
- privacy: {summary["privacy"]}
- scenario hash {summary["hash"]}, seed {summary["seed"]}

```python
from peft import PeftModel
from transformers import {auto}
{first}
base = {auto}.from_pretrained({where}{extra})
model = PeftModel.from_pretrained(base, "adapter")
```
""",
        encoding="utf-8",
    )


def _write_json(file: Path, data: Any) -> None:
    _write_text(file, json.dumps(data, indent=2) + "\n")


def _write_text(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end a run cleanly; gives a function that says whether one of them came.

    They raise KeyboardInterrupt, so that a long round ends at once. Python drops an exception that is
    raised in some places, such as a finaliser; so the loop asks as well.
    """
    came = False

    def stop(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    with _signals(stop):
        yield lambda: came


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C waits until the folder is whole."""
    with _signals(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Handle SIGINT and SIGTERM so for a while; only a program's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
