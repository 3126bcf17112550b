"""The site file: what a node brings to a run, and what it allows. No server can override it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedlora.data.cells import Taught
from fedlora.errors import SettingError, UserError, cut
from fedlora.privacy.accounting import Accountant
from fedlora.scenario import (
    COLUMNS_OF,
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
    looks_like_scenario,
    read,
)
from fedlora.scenario.explain import explain
from fedlora.scenario.keys import Problem
from fedlora.scenario.privacy import unresolved_delta
from fedlora.tasks.contract import find

_PROGRAMS = ("strategy", "clients", "task", "metrics", "compress")  # sections that may name `module:Class`
_FLOWERS = "flwr.serverapp.strategy:"  # runs at the server alone
MOST_STEPS = 100_000  # of training further
FLOOR = 20  # rows that a site holds out at least where it judges: a mean over few tells each of them


class Held(Files):
    """The site's rows. A row with a label that `labels` lacks is left out, whatever a run asks.

    Attributes:
        train: File of the site's rows. Example: `/site/train.csv`.
        test: Not used at a site: the test set is the server's.
        validation: Not used at a site: the server's rows choose the best round.
        labels: Labels of the rows; a run must have exactly these. null: the site answers no classification run.
            Example: `[surgery, other]`.
        score: Scale of the rows' scores; a run must have the same. null: the site answers no regression run.
            Example: `{low: 0, high: 5}`.
        messages: Column of chats, where rows hold these. null: rows hold prompts and completions. Example:
            `messages`.
        encoding: Encoding of the file. null: UTF-8, or as the mark at its beginning says. Example: `cp1252`.
        prompt: Template of prompts by columns of the site's rows. null: `text` is the prompt. Example:
            `'{question} {hint}'`.
    """

    train: str
    labels: tuple[str, ...] | None = None
    score: Score | None = None
    messages: str | None = None
    encoding: Encoding | None = None
    prompt: Template | None = None


class Budget(Section):
    """The privacy budget of the site's examples, or of its persons, over all runs together.

    Attributes:
        max_epsilon: Most epsilon that the site's examples may spend in all runs together, or with `person` its
            persons. Example: `8`.
        delta: Probability with which epsilon may not hold. Keep it below 1 / examples. Example: `1.0e-5`.
        accountant: How events become epsilon. All three are upper bounds; pld is the tightest.
        person: Column of the site's own file that says which person a row is of; the site then answers only runs
            that protect persons. null: each row stands for itself, and it answers none of these. Example:
            `patient_id`.
        rows_per_person: Most rows of a person that a step takes, whatever a run asks, with `person`. null: as the
            run says. Example: `4`.
    """

    max_epsilon: PositiveFloat
    delta: Annotated[Float, Field(gt=0, lt=1)]
    accountant: Accountant = "pld"
    person: Annotated[str, Field(min_length=1)] | None = None
    rows_per_person: PositiveInt | None = None

    def held_to(self, scenario: Scenario) -> Scenario:
        """A scenario that protects persons, by the column that the site names, and by no more rows of each."""
        asked = scenario.example_privacy
        if asked is None or asked.person is None:
            return scenario
        most = [k for k in (asked.rows_per_person, self.rows_per_person) if k is not None]
        told = {"person": self.person, "rows_per_person": min(most, default=None)}
        made: dict[str, Any] = scenario.model_dump()
        (made["privacy"] if asked is scenario.privacy else made["privacy"]["example"]).update(told)
        return Scenario.model_validate(made)

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        if wrong := unresolved_delta(self.delta, self.accountant):
            raise PydanticCustomError("target", "{wrong}", {"wrong": wrong})
        return self


class Surveyed(Section):
    """Noised counts of the site's rows, which anybody may ask for who may submit a run.

    Attributes:
        epsilon: What an answer costs the site's budget. It is paid once: who asks again gets the same answer, as
            long as the rows are the same. Example: `0.5`.
        floor: Least noised count that is reported; a smaller one is only said to be smaller.
    """

    epsilon: PositiveFloat
    floor: Annotated[Int, Field(ge=0)] = FLOOR


class Figures(Section):
    """Noised figures of the site's own rows, for runs that ask for some by `data.client_test_share`.

    Attributes:
        epsilon: What an evaluation costs the site's budget. A run asks once in each evaluated round, so
            `eval_every` of its scenario says how often. Example: `0.2`.
        most_loss: Most that one row's loss counts for; a larger one is cut. Lower it for less noise in the loss.
    """

    epsilon: PositiveFloat
    most_loss: PositiveFloat = 4.0


class Further(Section):
    """Training of a run's adapter on the site's own rows alone, once the run has ended; it never leaves.

    Attributes:
        steps: Steps of training, with the run's client, learning rate and noise; all of them are paid for before
            the first. Example: `50`.
        epsilon: Most that they may cost, counted as if nothing else had been spent. A run brings its own noise, so
            this bounds what it can make the site spend. null: as much as the budget has left. Example: `1`.
    """

    steps: Annotated[Int, Field(ge=1, le=MOST_STEPS)]
    epsilon: PositiveFloat | None = None


class Accept(Section):
    """What a run must be like for the site to take part.

    Attributes:
        scenarios: Names of scenarios that the site accepts. null: any. Example: `[wards]`.
        bases: Base models that it accepts, as in `model.base`. null: minilm alone. A model's files read every row.
            Example: `[minilm]`.
        starts: Adapters that a run may begin from, as in `model.start`; a folder by its whole path, which is read
            at the site too. Example: `[/site/public]`.
        strategies: Strategies that it accepts, as in `strategy.use`. null: any that ships with fedlora. Example:
            `[ffa_lora]`.
        clients: Ways to train that it accepts, as in `clients.use`. null: any that ships with fedlora. Example:
            `[dp_sgd]`.
        tasks: Tasks that it accepts, as in `task`. null: any that ships with fedlora, whatever `own_code` says.
            Example: `[classification]`.
        kinds: Kinds of adapter that it accepts, as in `model.adapter.kind`. null: any that ships with fedlora,
            whatever `own_code` says. Example: `[lora]`.
        own_code: Whether a run may bring its own strategies, clients and metrics. They are programs: accept them
            only from people whom you let run code.
        masked_only: Whether a run must have `secure_aggregation`, so that nobody sees the site's update by itself.
        metrics: Whether losses and figures of the site's own rows may be reported. Epsilon does not cover them.
        submitters: ssh public keys; one of them must have signed the run. null: anyone may submit. Example:
            `[ssh-ed25519 AAAA lab]`.
    """

    scenarios: tuple[str, ...] | None = None
    bases: tuple[str, ...] | None = None
    starts: tuple[str, ...] = ()
    strategies: tuple[str, ...] | None = None
    clients: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    own_code: bool = False
    masked_only: bool = False
    metrics: bool = False
    submitters: tuple[str, ...] | None = None


class Site(Section):
    """Everything about a node that the site alone decides.

    Attributes:
        name: Name of the site: letters, digits, `_`, `.` and `-`. Example: `st-mary`.
        client: Number of the scenario's client that the site is, from 0. Example: `0`.
        data: The site's rows and their columns; the test set is the server's. Example: `{train: /site/train.csv,
            labels: [surgery, other]}`.
        state: Folder of the ledger, of what clients keep, and of logs. Back it up: without it the site cannot know
            what it has spent. Example: `/site/state`.
        privacy: Budget of the site's examples over all runs. null: the site trains without one, if the scenario
            asks for no privacy. Example: `{max_epsilon: 8, delta: 1.0e-5}`.
        accept: What a run must be like for the site to take part.
        survey: Noised counts of labels and lengths that `fedlora survey` may learn, from the budget. null: none.
            Example: `{epsilon: 0.5}`.
        figures: Noised loss and accuracy of the site's own rows, which a run may learn from the budget. null: only
            `accept.metrics` says whether a run may learn figures. Example: `{epsilon: 0.2}`.
        receive: What the site gets when a run ends. adapter: the run's adapter, written to `runs/NAME/adapter` in
            `state`, to evaluate and use here. null: the site is only informed of the end.
        personalise: Training of that adapter on the site's own rows when the run has ended, within the budget. The
            result stays in `runs/NAME/personalised`. null: none. Example: `{steps: 50}`.
        device: Torch device that trains, such as `cpu` or `cuda`.
        threads: Torch threads of the worker.
        idle_minutes: Minutes without work after which the worker unloads the model.
        metrics_port: Port where Prometheus reads the site's figures. null: none. Example: `9101`.
        metrics_address: Address on which that port listens.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    client: Annotated[Int, Field(ge=0)]
    data: Held
    state: Annotated[str, Field(min_length=1)]
    privacy: Budget | None = None
    accept: Accept = Accept()
    survey: Surveyed | None = None
    figures: Figures | None = None
    receive: Literal["adapter"] | None = None
    personalise: Further | None = None
    device: str = "cpu"
    threads: PositiveInt = 1
    idle_minutes: PositiveFloat = 30.0
    metrics_port: Annotated[Int, Field(ge=1, le=65535)] | None = None
    metrics_address: Annotated[str, Field(min_length=1)] = "127.0.0.1"

    @property
    def folder(self) -> Path:
        """Where the site keeps what must outlast a restart."""
        return Path(self.state)

    def refuses_code(self, told: object) -> str | None:
        """Why the site does not so much as read a scenario: it names programs, which reading would import.

        Args:
            told: a scenario as it was sent, of any form.
        """
        if self.accept.own_code or not isinstance(told, Mapping):
            return None
        model = told.get("model")
        parts = [("model.adapter", model.get("adapter") if isinstance(model, Mapping) else None)]
        for key, part in [*parts, *((key, told.get(key)) for key in _PROGRAMS)]:
            if own := next((text for text in _texts(part) if ":" in text and not text.startswith(_FLOWERS)), None):
                return f"it runs no code that comes with a run, such as {cut(own)!r} ({key})"
        return None

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
            ("kind of adapter", scenario.model.adapter.named, rules.kinds),
        ):
            if known is not None and use not in known:
                return f"it does not accept the {what} {use!r}"
            if ":" in use and known is None and what not in ("strategy", "client"):
                return f"it does not accept the {what} {use!r}"
        if rules.masked_only and scenario.secure_aggregation is None:
            return "it sends masked updates only, and the scenario has no secure_aggregation"
        if self.client >= scenario.clients.total:
            return f"it is client {self.client}, and the scenario has clients 0 to {scenario.clients.total - 1}"
        if self.privacy is not None and scenario.example_privacy is None:
            return "it trains under differential privacy for its examples only, and the scenario asks for none"
        named = self.privacy is not None and self.privacy.person is not None
        if named and scenario.person is None:
            return "it protects persons, and the scenario asks for less: set privacy.person in it"
        if scenario.person is not None and not named:
            return "its site file names no column of persons (privacy.person), and the scenario protects persons"
        for key, asked, noised in (
            ("privacy.share_metrics", scenario.privacy is not None and scenario.privacy.share_metrics, False),
            ("data.client_test_share", scenario.data.client_test_share is not None, self.figures is not None),
        ):
            if asked and not (rules.metrics or noised):
                return f"it reports no figures of its own rows, and the scenario asks for some by {key}"
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


def _texts(told: object) -> Iterator[str]:
    """All strings of a nested value, keys apart."""
    if isinstance(told, str):
        yield told
    elif isinstance(told, Mapping | list | tuple):
        for value in told.values() if isinstance(told, Mapping) else told:
            yield from _texts(value)


def task_of(site: Site) -> str:
    """The task for which a site's rows are, as its file describes them."""
    held, labels = site.data, site.data.labels or ()
    if held.score is not None:
        return "regression"
    if held.separator is not None:
        return "multi_label"
    if "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels):
        return "token_classification"
    if labels:
        return "classification"
    return "preference" if isinstance(held.label, tuple) else "causal_lm"


def taught(site: Site) -> Taught:
    """How the site's rows are read, as its file describes them."""
    name, held = task_of(site), site.data
    person = None if site.privacy is None else site.privacy.person
    told = (find(name).target, held.score, None, COLUMNS_OF.get(name, {}))
    return Taught(*told, held.messages, "all", held.prompt, held.encoding, person)


def load(path: str | Path) -> Site:
    """Read a site file, and check all of it.

    Raises:
        UserError: with one line for every problem found.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}") from error
    raw, lines, problems = read(text, str(path))
    if looks_like_scenario(raw):
        raise UserError(f"{path}:1: this is a scenario, and no site's file: fedlora check {path}")
    source = Source(str(path), lines, {})
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        problems += [explain((), detail, raw, Site) for detail in error.errors()]
    else:
        problems += _across(site)
    if problems:
        raise UserError(*dict.fromkeys(f"{source.where(p.path)}: {p.message}" for p in problems))
    return site


def _across(site: Site) -> Iterator[Problem]:
    """What only shows when two keys are read together."""
    most = None if site.privacy is None else site.privacy.max_epsilon
    for key in ("survey", "figures", "personalise"):
        if (told := getattr(site, key)) is None:
            continue
        if most is None:
            yield Problem((key,), f"{key}: is paid for from a budget: set privacy too")
        elif told.epsilon is not None and told.epsilon > most:
            what = f"{told.epsilon:g} is more than all runs together may spend (privacy.max_epsilon: {most:g})"
            yield Problem((key, "epsilon"), f"{key}.epsilon: {what}: lower it")
    if site.personalise is not None and site.receive is None:
        yield Problem(("personalise",), "personalise: begins from a run's adapter: set receive: adapter too")
    if site.figures is not None and site.accept.metrics:
        what = "figures: are noised, and accept.metrics has exact ones reported: leave one of the two out"
        yield Problem(("figures",), what)


def located(path: str | Path, error: SettingError) -> UserError:
    """An error about data, with the file and line of the site file's setting."""
    key = error.key.replace("data.files.", "data.")
    _, lines, _ = read(Path(path).read_text(encoding="utf-8"), str(path))
    place: KeyPath = tuple(key.split("."))
    return UserError(f"{Source(str(path), lines, {}).where(place)}: {key}: {error.message}")
