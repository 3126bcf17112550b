"""What is wrong with a scenario: section by section, then what only shows across sections."""

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from fedlora import plugins
from fedlora.errors import SettingError, suggestion
from fedlora.metrics import contract as metrics
from fedlora.privacy import cohorts
from fedlora.scenario.clients import Clients
from fedlora.scenario.data import TASK_OF, Data, LabelShares, Public, Sampled
from fedlora.scenario.defaults import completed
from fedlora.scenario.explain import explain, meant
from fedlora.scenario.head import NarrowHead
from fedlora.scenario.keys import Problem
from fedlora.scenario.privacy import Privacy
from fedlora.scenario.section import PlugIn
from fedlora.scenario.sections import Scenario, Strategy
from fedlora.scenario.world import World


def validate(raw: dict[str, Any]) -> tuple[Scenario | None, list[Problem]]:
    """Check each section by itself, so that one mistake hides no other, then what spans sections."""
    problems: list[Problem] = []
    raw = completed(_moved(raw, problems))
    sections: dict[str, Any] = {}
    for name, field in Scenario.model_fields.items():
        if name not in raw and not field.is_required():
            sections[name] = field.get_default(call_default_factory=True)
        elif name not in raw:
            problems.append(Problem((), f"{name!r} is missing: {_HELP[name]}"))
        else:
            annotation: Any = field.annotation
            if field.metadata:
                annotation = Annotated[annotation, *field.metadata]
            try:
                sections[name] = TypeAdapter[Any](annotation).validate_python(raw[name])
            except ValidationError as error:
                problems += [explain((name,), detail, raw[name]) for detail in error.errors()]
    for key in raw:
        if key not in Scenario.model_fields:
            problems.append(Problem((key,), f"unknown key {key!r}: {meant((key,), Scenario.model_fields)}"))
    for name, cls in (("clients", Clients), ("strategy", Strategy)):
        problems += _slips(name, raw.get(name), cls)
    problems += _across(sections)
    return (Scenario(**sections) if not problems else None), problems


def _moved(raw: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """A scenario without keys that have another place now; each is a problem that says which."""
    for section, key, instead in _MOVED:
        held = raw.get(section)
        if not isinstance(held, dict) or key not in held or (section == "clients" and held.get("use") != "dp_sgd"):
            continue
        if held[key] not in (None, False):
            now = instead.format(held[key])
            problems.append(Problem((section, key), f"{section}.{key}: moved: write {now}"))
        raw = {**raw, section: {name: value for name, value in held.items() if name != key}}
    return raw


_MOVED = (
    ("clients", "per_layer", "privacy.clip: per_layer"),
    ("clients", "quantile", "privacy.clip: {{kind: quantile, quantile: {}}}"),
    ("privacy", "quantile", "privacy.clip: {{kind: quantile, quantile: {}}}"),
)
_HELP = {
    "name": "a word for the run, such as 'name: mine'",
    "data": "say what to learn from, such as 'data: {dataset: tweets}'",
    "clients": "say how many there are, such as 'clients: {total: 10}'",
}


def _slips(name: str, section: object, cls: type[PlugIn]) -> Iterator[Problem]:
    """Keys of a built-in's section that are nearly a key of its own: not what its class has for options."""
    if not isinstance(section, dict) or ":" in str(section.get("use")):
        return
    for key in section:
        if key not in cls.model_fields and get_close_matches(key, cls.model_fields, cutoff=0.8):
            yield Problem((name, key), f"unknown key {key!r} in {name}: {suggestion(key, cls.model_fields)}")


def _across(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What only shows when two sections are read together."""
    clients, data = sections.get("clients"), sections.get("data")
    task = sections.get("task")
    if clients and "privacy" in sections:
        privacy = sections["privacy"]
        example = privacy if privacy is None or privacy.unit == "example" else privacy.example
        if example is None and clients.use == "dp_sgd":
            yield Problem(
                ("clients", "use"),
                "dp_sgd needs a privacy section, such as {epsilon: 6, delta: 1.0e-5}, or write clients.use: sgd"
                if privacy is None
                else "dp_sgd protects examples, and privacy has unit: client: add privacy.example, or write "
                "clients.use: sgd",
            )
        if example is not None and clients.use == "sgd":
            yield Problem(
                ("clients", "use"),
                "sgd adds no noise, and privacy is promised for each example: write clients.use: dp_sgd",
            )
    if data and (privacy := sections.get("privacy")) and isinstance(data.partition, Sampled):
        for path, asked in ((("privacy", "person"), privacy), (("privacy", "example", "person"), privacy.example)):
            if asked is not None and asked.person is not None:
                yield Problem(path, "clients that draw examples share persons: take another data.partition.kind")
    if clients and (privacy := sections.get("privacy")) and privacy.unit == "client":
        if clients.min_replies > 1 or clients.retries:
            yield Problem(
                ("clients", "min_replies" if clients.min_replies > 1 else "retries"),
                "unit: client holds for cohorts drawn once, however few reply: leave min_replies and retries out",
            )
    yield from _smaller(sections)
    if sections.get("secure_aggregation") and (asked := sections.get("compression")) and asked.up is not None:
        yield Problem(
            ("compression", "up"),
            "secure aggregation sends whole numbers of its own: leave compression.up out; down may stay",
        )
    if (asked := sections.get("secure_aggregation")) and asked.noise == "shared" and "privacy" in sections:
        if (privacy := sections["privacy"]) is None:
            yield Problem(
                ("secure_aggregation", "noise"), "there is no noise to share: add privacy, or leave it out"
            )
        elif privacy.unit == "example" and clients:
            yield from _shared(clients, privacy)
        if clients and clients.max_norm:
            yield Problem(
                ("clients", "max_norm"),
                "a sum that carries noise says nothing of norms: leave it out, clip_norm bounds",
            )
    elif asked and asked.honest != 1:
        yield Problem(("secure_aggregation", "honest"), "goes with noise: shared")
    if sections.get("secure_aggregation") and clients and clients.sample_rate is not None:
        yield Problem(("clients", "sample_rate"), "secure aggregation weighs clients alike: write batch_size")
    if clients and clients.averages_state:
        privacy = sections.get("privacy")
        for key, asked, why in (
            ("secure_aggregation", sections.get("secure_aggregation"), "masks sum what clients train alone"),
            ("privacy", privacy and privacy.unit == "client", "unit: client noises what clients train alone"),
        ):
            if asked:
                yield Problem((key,), f"{why}: clients.optimizer.state takes fresh or kept, and not averaged")
    if sections.get("secure_aggregation") and clients:
        yield from _summed(clients, sections)
    if (world := sections.get("world")) and clients:
        yield from _worldly(world, clients, sections)
    if data and clients and isinstance(data.partition, LabelShares):
        rows = len(data.partition.shares)
        if clients.total % rows:
            yield Problem(
                ("data", "partition", "shares"),
                f"{rows} rows of shares do not divide {clients.total} clients: write a multiple of {rows}",
            )
    if data:
        yield from _apart(data)
    for key in ("keep", "stop"):
        if data and not data.validates and sections.get(key) not in (None, "last"):
            yield Problem(
                (key,),
                f"{key}: what chooses must not be what reports: set data.validation_share, such as 0.3, "
                "which takes rows off the test set to choose by",
            )
    if task:
        yield from _of_task(task, sections)


def _smaller(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go with a base that is cut, and with a statistic of clients' rows."""
    cut, told, model = (sections.get(name) for name in ("compress", "statistics", "model"))
    if cut is None:
        if told is not None:
            yield Problem(
                ("statistics",), "statistics are what compress goes by: add it, such as compress: {use: afm}"
            )
        return
    for key in ("start", "quantize"):
        if model and getattr(model, key) is not None:
            yield Problem(("model", key), f"{key} is for the base as it is, and compress cuts it: leave one out")
    try:
        cls = plugins.find("compressors", cut.use)
    except SettingError as error:
        yield Problem(("compress", "use"), error.message)
        return
    takes = tuple(getattr(cls, "takes", ()))
    if told is None:
        if "texts" in takes:
            what = f"{cut.use} goes by public texts: run fedlora compress, and name its folder as model.base"
            yield Problem(("compress", "use"), what)
        elif getattr(cls, "needs", False):
            what = f"statistics: {{kind: {takes[0]}, epsilon: 1}}"
            yield Problem(("compress", "use"), f"{cut.use} goes by a statistic: add {what}, or take welore")
        return
    if told.kind not in takes:
        goes = " or ".join(takes) or "the weights alone"
        yield Problem(("statistics", "kind"), f"{cut.use} goes by {goes}, and this is {told.kind}")
    many = (clients := sections.get("clients")) and clients.total
    if sections.get("secure_aggregation") and many and not cohorts.LEAST <= many <= cohorts.MOST:
        what = f"secure aggregation sums {cohorts.LEAST} to {cohorts.MOST} clients' statistics, not {many}"
        yield Problem(("clients", "total"), what)
    if "privacy" not in sections:  # it is wrong by itself
        return
    privacy: Privacy | None = sections["privacy"]
    if privacy is None and told.epsilon is not None:
        yield Problem(("statistics", "epsilon"), "goes with a privacy section, of whose epsilon it is a part")
    elif privacy is not None and privacy.unit == "client":
        yield Problem(("statistics",), "a statistic protects examples or persons, and privacy has unit: client")
    elif privacy is not None and told.epsilon is None:
        yield Problem(
            ("statistics",), "privacy is promised: add epsilon, the part of privacy.epsilon that it may spend"
        )
    elif privacy is not None and told.epsilon >= (privacy.epsilon or float("inf")):
        yield Problem(
            ("statistics", "epsilon"),
            f"{told.epsilon:g} leaves nothing of privacy.epsilon: {privacy.epsilon:g} for training: lower it",
        )


def _apart(data: Data) -> Iterator[Problem]:
    """Rows that choose or are public are neither clients' own nor those that report."""
    own = {part: _named(data, part) for part in ("train", "test", "validation")}
    asked = [("validation", own.pop("validation"), own)]
    if data.public is not None:
        everything = {**own, "validation": _named(data, "validation")}
        asked += [(f"public.{part}", _named(data.public, part), everything) for part in ("train", "test")]
        if data.public.dataset is not None and data.public.dataset == data.dataset:
            yield Problem(("data", "public"), f"data.public: {_OWN}")
    for part, rows, others in asked:
        for other, held in others.items():
            if rows is None or held is None or rows[0] != held[0] or (rows[1] != held[1] and rows[1] and held[1]):
                continue
            what = _OWN if other == "train" else _CHOOSES
            key = ("data", "files" if data.files else "hub", part) if part == "validation" else ("data", "public")
            yield Problem(key, f"{'.'.join(key)}: {what}")
            return


_OWN = "these are the clients' own rows, which nobody may choose by without paying: name others"
_CHOOSES = "what chooses must not be what reports: name other rows than the test set's"


def _named(source: Data | Public, part: str) -> tuple[tuple[str, ...], str] | None:
    """Where the rows of a part are: a file or a split of the Hub, and the slice of it; None: there are none."""
    if source.files is not None:
        file = getattr(source.files, part, None)
        return None if file is None else (("file", os.path.realpath(file)), "")
    if source.hub is not None:
        split = getattr(source.hub, part, None)
        name, _, cut = (split or "").partition("[")
        return None if split is None else (("hub", source.hub.path, source.hub.config or "", name), cut)
    return None


def _of_task(task: str, sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go with the task, as the task says it; one's own tasks are imported."""
    data = sections.get("data")
    for path, source in ((("data",), data), (("data", "public"), data and data.public)):
        name = source and source.dataset
        if name and ":" not in task and (fit := TASK_OF.get(name, "classification")) != task:
            yield Problem((*path, "dataset"), f"{name} is for task: {fit}, and the task is {task}")
    try:
        found = plugins.find("tasks", task)
    except SettingError as error:
        yield Problem(("task",), error.message)
        return
    if not hasattr(found, "needs"):
        yield Problem(("task",), f"{task} is no fedlora.Task")
        return
    yield from (Problem(path, what) for path, what in found.needs(sections))
    try:
        metrics.find_all(sections.get("metrics") or (), getattr(found, "target", "class"))
    except SettingError as error:
        yield Problem(("metrics",), f"metrics: {error.message}")
    if sections.get("preference") and found.target != "pair":
        yield Problem(("preference",), f"preference is for task: preference, and the task is {task}: leave it out")
    if sections.get("loss") and not (found.target == "class" and getattr(found, "labelled", True)):
        yield Problem(("loss",), f"loss is for classification, and the task is {task}: leave it out")
    if (model := sections.get("model")) and model.pooling is not None:
        if not all(getattr(found, what, True) for what in ("headed", "pools", "tokens")):
            yield Problem(
                ("model", "pooling"),
                f"it is for tasks that judge whole texts, and the task is {task}: leave it out",
            )
        if model.pooling == "mean" and model.pooler == "trained":
            yield Problem(("model", "pooler"), "with model.pooling: mean no pooler takes part: leave it frozen")
    if model and isinstance(model.head, NarrowHead):
        if not getattr(found, "headed", True) or not getattr(found, "labelled", True):
            yield Problem(
                ("model", "head"), f"a rank is for a head of labels, and task: {task} has none: leave it out"
            )
    if data:
        yield from _taught(task, found.target, data)


def _taught(task: str, target: str, data: Data) -> Iterator[Problem]:
    """Keys of several labels or of scores, where the task has none."""
    if target != "score" and data.score is not None:
        yield Problem(("data", "score"), f"score is for task: regression, and the task is {task}: leave it out")
    for name in ("messages", "prompt"):
        if target != "start" and getattr(data, name) is not None:
            yield Problem(("data", name), f"{name} is for task: causal_lm, and the task is {task}: leave it out")
    for name in ("files", "hub"):
        if (source := getattr(data, name)) is None:
            continue
        if target not in ("score", "pair") and isinstance(source.label, tuple):
            yield Problem(
                ("data", name, "label"),
                f"several columns are for task: regression or preference, and the task is {task}",
            )
        if target != "many" and source.separator is not None:
            yield Problem(
                ("data", name, "separator"), f"separator is for task: multi_label, and the task is {task}"
            )


def _shared(clients: Clients, privacy: Privacy) -> Iterator[Problem]:
    """What noise that clients share out cannot protect (`fedlora.privacy.mechanisms.shared`)."""
    told = (
        ("clients.use", clients.use != "dp_sgd", "dp_sgd alone divides its noise: take it"),
        ("clients.local_steps", clients.local_steps != 1, "a second step depends on the first: write 1"),
        (
            "clients.optimizer",
            clients.optimizer is not None,
            "a sum takes plain steps: leave it out",
        ),
        ("clients.retries", clients.retries > 0, "two sums of a round would carry one noise: leave it out"),
        ("privacy.clip", privacy.clip.kind == "quantile", "the bound of a sum is one and fixed: take flat"),
        ("privacy.bands", privacy.bands is not None, "noise takes back what the same senders added: leave it out"),
    )
    for key, wrong, why in told:
        if wrong:
            yield Problem(tuple(key.split(".")), f"with secure_aggregation.noise: shared {why}")


def _summed(clients: Clients, sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What masks cannot sum; where clients are protected whole, what one more of them could decide over."""
    privacy: Privacy | None = sections.get("privacy")
    whole = privacy if privacy is not None and privacy.unit == "client" else None
    size, total, rounds = clients.cohort_size, clients.total, sections.get("rounds")
    if whole is None and not cohorts.LEAST <= size <= cohorts.MOST:
        yield Problem(
            ("clients", "per_round" if clients.per_round else "total"),
            f"secure aggregation sums {cohorts.LEAST} to {cohorts.MOST} clients a round, not {size}",
        )
    if privacy is None and clients.retries:
        yield Problem(
            ("clients", "retries"),
            "two sums of a round over nearly the same clients show one's change: leave it out, or add privacy",
        )
    if whole is not None and whole.bands is not None:
        yield Problem(
            ("privacy", "bands"),
            "bands have clients take turns, in cohorts too alike to mask: leave privacy.bands or "
            "secure_aggregation out",
        )
    if whole is None or not rounds:
        return
    rare, few = cohorts.RARE / 2 * whole.delta, rounds * cohorts.fewer(total, size / total)
    if few > rare:
        yield Problem(
            ("clients", "per_round" if clients.per_round else "total"),
            f"a cohort too small for a sum shows who was drawn: without any one client fewer than {cohorts.LEAST} "
            f"are drawn in some of {rounds} rounds with probability {few:.1g}, and delta allows {rare:.1g}: "
            "take more clients a round",
        )
    if (many := cohorts.most(total, size / total, rare / rounds)) > cohorts.MOST:
        yield Problem(
            ("clients", "per_round" if clients.per_round else "total"),
            f"a round may draw {many} clients, and a sum takes {cohorts.MOST}: take fewer clients a round",
        )
    if (example := whole.example) and example.epsilon is not None and example.noise_multiplier is not None:
        yield Problem(
            ("privacy", "example"),
            "a client that rests may leave too few for a sum: give epsilon or noise_multiplier, not both",
        )


def _worldly(world: World, clients: Clients, sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What a world cannot be."""
    whole = (privacy := sections.get("privacy")) and privacy.unit == "client"
    if sections.get("secure_aggregation"):
        yield Problem(("secure_aggregation",), "goes with no world: what masks cost who is late is not simulated")
    if world.deadline is None and world.partial_work:
        yield Problem(("world", "partial_work"), "is by a deadline: set world.deadline")
    if world.concurrency is None:
        if world.deadline is None and (world.dropout or world.availability):
            yield Problem(("world",), "a round would wait for clients that are gone: set world.deadline")
        if whole and world.over_select > 1:
            yield Problem(
                ("world", "over_select"),
                "a client more would move another out of a round, which unit: client does not cover: leave it out",
            )
        return
    for key, given in (("min_replies", clients.min_replies > 1), ("retries", clients.retries > 0)):
        if given:
            yield Problem(("clients", key), "is about rounds in step: leave it out, or world.concurrency")
    if world.over_select > 1:
        yield Problem(("world", "over_select"), "is about rounds in step: leave it out, or world.concurrency")
    if whole:
        yield Problem(("world", "concurrency"), "unit: client holds for cohorts that are drawn: leave it out")
