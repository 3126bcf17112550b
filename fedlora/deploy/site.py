"""The site file: what a node brings to a run, and what it allows. No server can override it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedlora.errors import SettingError, UserError, suggestion
from fedlora.privacy.accounting import Accountant
from fedlora.scenario import (
    Encoding,
    Files,
    Float,
    Int,
    KeyPath,
    PositiveFloat,
    PositiveInt,
    Scenario,
    Score,
    Section,
    Source,
    Template,
    read,
)
from fedlora.tasks.contract import find

FLOOR = 20  # rows that a site holds out at least where it judges: a mean over few tells each of them


class Held(Files):
    """The site's rows. A row of another label than `labels` is left out, whatever a run asks."""

    labels: tuple[str, ...] | None = (
        None  # what the rows may be classified by; a run must have these and no others
    )
    score: Score | None = None  # the scale of the rows' scores, as a run must have it
    messages: str | None = None  # a column of chats, where rows hold these instead of prompts and completions
    encoding: Encoding | None = None  # of the file, such as cp1252; null: UTF-8, or as its mark says
    prompt: Template | None = None  # of prompts, by columns of the rows; those of a scenario are its server's own


class Budget(Section):
    """What the site's examples may lose in all runs together, for each of them."""

    max_epsilon: PositiveFloat
    delta: Annotated[Float, Field(gt=0, lt=1)]
    accountant: Accountant = "pld"


class Accept(Section):
    """What a run must be like."""

    scenarios: tuple[str, ...] | None = None  # names; null: any
    bases: tuple[str, ...] | None = None  # as in `model.base`; null: minilm alone. Its files read every row
    starts: tuple[str, ...] = ()  # as in `model.start`: a folder by its whole path, which is read here too
    strategies: tuple[str, ...] | None = None  # as in `strategy.use`; null: any that comes with fedlora
    clients: tuple[str, ...] | None = None  # as in `clients.use`; null: any that comes with fedlora
    tasks: tuple[str, ...] | None = (
        None  # as in `task`; null: those that come with fedlora, whatever own_code says
    )
    kinds: tuple[str, ...] | None = None  # as in `model.adapter.kind`; null: likewise
    own_code: bool = False  # whether strategies, clients and metrics may come with the run: they are programs
    masked_only: bool = (
        False  # whether a run must have `secure_aggregation`: nobody sees the site's update by itself
    )
    metrics: bool = False  # whether losses and the like of the site's own rows may be told; epsilon covers none
    submitters: tuple[str, ...] | None = None  # ssh public keys, one of which signed the run; null: anybody


class Site(Section):
    """Everything about a node that is the site's own affair."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    client: Annotated[Int, Field(ge=0)]  # which of the scenario's clients it is, from 0
    data: Held  # `train` with its columns; the test set is the server's
    state: Annotated[str, Field(min_length=1)]  # folder of the ledger, of what clients keep, and of logs
    privacy: Budget | None = None  # null: trains without a guarantee of its own, if the scenario asks for none
    accept: Accept = Accept()
    device: str = "cpu"  # of torch
    threads: PositiveInt = 1  # of torch
    idle_minutes: PositiveFloat = 30.0  # after which the worker lets the model go
    metrics_port: Annotated[Int, Field(ge=1, le=65535)] | None = None  # of a Prometheus endpoint; null: none
    metrics_address: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # that it listens on

    @property
    def folder(self) -> Path:
        """Where the site keeps what must outlast a restart."""
        return Path(self.state)

    def refuses(self, scenario: Scenario) -> str | None:
        """Why the site does not take part in a scenario; None if it does."""
        rules = self.accept
        if rules.scenarios is not None and scenario.name not in rules.scenarios:
            return f"it does not accept the scenario {scenario.name!r}"
        if scenario.model.base not in (("minilm",) if rules.bases is None else rules.bases):
            return f"it does not accept the base model {scenario.model.base!r} (accept.bases)"
        if scenario.model.start is not None and scenario.model.start not in rules.starts:
            return f"it does not begin from {scenario.model.start!r} (accept.starts)"
        for what, use, known in (
            ("strategy", scenario.strategy.use, rules.strategies),
            ("client", scenario.clients.use, rules.clients),
            ("task", scenario.task, rules.tasks),
            ("kind of adapter", scenario.model.adapter.kind, rules.kinds),
        ):
            if known is not None and use not in known:
                return f"it does not accept the {what} {use!r}"
            if what == "strategy" and use.startswith("flwr.serverapp.strategy:"):
                continue
            if ":" in use and known is None and what not in ("strategy", "client"):
                return f"it does not accept the {what} {use!r}"
            if ":" in use and not rules.own_code:
                return f"it runs no code that comes with a run, such as the {what} {use!r}"
        if not rules.own_code and (own := next((use for use in scenario.metrics if ":" in use), None)):
            return f"it runs no code that comes with a run, such as the metric {own!r}"
        if rules.masked_only and scenario.secure_aggregation is None:
            return "it sends masked updates only, and the scenario has no secure_aggregation"
        if self.client >= scenario.clients.total:
            return f"it is client {self.client}, and the scenario has clients 0 to {scenario.clients.total - 1}"
        if self.privacy is not None and scenario.example_privacy is None:
            return "it trains under differential privacy for its examples only, and the scenario asks for none"
        for key, asked in (
            ("privacy.share_metrics", scenario.privacy is not None and scenario.privacy.share_metrics),
            ("data.client_test_share", scenario.data.client_test_share is not None),
        ):
            if asked and not rules.metrics:
                return f"it tells no figures of its own rows, and the scenario asks for some by {key}"
        return None

    def refuses_labels(self, scenario: Scenario, labels: Sequence[str]) -> str | None:
        """Why the site is not asked about some labels; None if it is. Its rows have no part in the answer.

        One set of labels, whoever asks: else the number of rows that are left would tell how many of each there
        are. For the same reason one way to read them: as several labels of a row where its file says what is
        between them, as scores where it says their scale.
        """
        task = find(scenario.task)
        for key, target in (("score", "score"), ("separator", "many")):
            if (getattr(self.data, key) is None) is (task.target == target):
                have = "lacks" if task.target == target else "has"
                return f"its rows are not for task: {scenario.task}, by what its site file {have} (data.{key})"
        if task.target == "score":
            if self.data.score != scenario.data.score:
                return "the scale of the run's scores is not that of its site file (data.score)"
            own = (self.data.label,) if isinstance(self.data.label, str) else self.data.label or ()
            return (
                None if len(labels) == len(own) else f"its rows have {len(own)} scores, and the run {len(labels)}"
            )
        if not task.labelled:
            return "the run names labels, and its task has none" if labels else None
        if scenario.data.labels is not None and tuple(labels) != scenario.data.labels:
            return "the run has other labels than its scenario"
        if self.accept.submitters is not None and scenario.data.labels is None:
            return "nobody has signed the run's labels: name them in the scenario (data.labels)"
        if self.data.labels is None:
            return "its site file does not say which labels it may be asked about (data.labels)"
        if set(labels) != set(self.data.labels) or len(labels) != len(self.data.labels):
            return "the labels of the run are not those of its site file (data.labels)"
        return None


def load(path: str | Path) -> Site:
    """Read a site file, and check all of it.

    Raises:
        UserError: with one line for every problem found.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    raw, lines, problems = read(text, str(path))
    source = Source(str(path), lines, {})
    told = [f"{source.where(p.path)}: {p.message}" for p in problems]
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors():
            key = tuple(part for part in detail["loc"])
            told.append(f"{source.where(key)}: {_message(key, detail['type'], detail['msg'])}")
    if told:
        raise UserError(*dict.fromkeys(told))
    return site


def located(path: str | Path, error: SettingError) -> UserError:
    """An error about data, with the file and line of the site file's setting."""
    key = error.key.replace("data.files.", "data.")
    _, lines, _ = read(Path(path).read_text(encoding="utf-8"), str(path))
    place: KeyPath = tuple(key.split("."))
    return UserError(f"{Source(str(path), lines, {}).where(place)}: {key}: {error.message}")


def _message(key: KeyPath, kind: str, text: str) -> str:
    name = ".".join(map(str, key))
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        owner: Any = Site
        for part in key[:-1]:
            owner = {"data": Held, "privacy": Budget, "accept": Accept}.get(str(part), owner)
        return f"unknown key {name!r}: {suggestion(str(key[-1]), owner.model_fields)}"
    return f"{name}: {text.replace('Input should', 'should')}"
