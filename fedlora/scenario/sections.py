"""A scenario: its sections with their defaults, and those of them that have no file of their own."""

import hashlib
import json
import os
import re
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, PrivateAttr, field_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.errors import SettingError, UserError
from fedlora.privacy import cohorts
from fedlora.scenario.baseline import Baseline
from fedlora.scenario.clients import Clients
from fedlora.scenario.compression import Compression, TopK
from fedlora.scenario.data import Data
from fedlora.scenario.keeping import Best, Keep, Stop
from fedlora.scenario.keys import Source
from fedlora.scenario.learning import Schedule, ServerAdam, ServerOptimizer
from fedlora.scenario.privacy import Privacy, SecureAggregation
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, PositiveInt, Section
from fedlora.scenario.world import World


class Adapter(Section):
    """Low-rank factors beside each matched linear layer (Hu et al., 2021)."""

    kind: str = "auto"  # a name, or module:Class of one's own; auto: what the strategy is for, lora for most
    r: PositiveInt = 8  # the rank; with `clients.ranks` the server's, and the highest
    alpha: PositiveFloat = 8.0  # the change of a weight is alpha / r * B @ A
    targets: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    layers: tuple[Annotated[Int, Field(ge=0)], ...] | None = (
        None  # that have targets, from 0; null: all. Upper ones alone, as [4, 5] of 6, train quicker
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind != "auto" and (wrong := plugins.problem("kinds", kind)):
            raise PydanticCustomError("unknown", wrong)
        return kind


class Model(Section):
    """The base model and what is trained beside it."""

    base: Annotated[str, Field(min_length=1)] = "minilm"  # "minilm", a local path or a Hub id
    revision: str | None = None  # of a Hub id: branch, tag or commit
    quantize: Literal["8bit", "4bit"] | None = None  # hold the frozen weights so, by bitsandbytes
    adapter: Adapter = Adapter()
    start: Annotated[str, Field(min_length=1)] | None = (
        None  # begin from this: the folder of a run, of an adapter as peft saves it, or a Hub id; null: the seed
    )
    head: Literal["trained", "frozen", "kept"] = (
        "trained"  # and sent; frozen: left as it begins; kept: trained, from the base's or the start's as it is
    )
    pooler: Literal["trained", "frozen"] = "frozen"  # the encoder's pooler, where it has one

    @field_validator("start")
    @classmethod
    def _placed(cls, start: str | None) -> str | None:
        """A folder by its whole path, so that the run's own scenario names it from anywhere."""
        if start is not None and (start.startswith((".", "/", "~")) or os.path.isdir(start)):
            return os.path.abspath(os.path.expanduser(start))
        return start


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


class Preference(Section):
    """For task: preference, which is DPO (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290)."""

    beta: PositiveFloat = 0.1  # what a log probability beside the base's counts; larger stays nearer to the base


class Loss(Section):
    """For classification: how examples teach; how they are judged stays as it is."""

    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = (
        None  # of labels, as {rare: 5}, others 1; balanced: by counts of the test rows, which are public
    )
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0  # share of a label that is spread over all


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
    task: str = "classification"  # a name, or module:Class of one's own
    model: Model = Model()
    data: Data
    clients: Clients
    privacy: Privacy | None = None
    secure_aggregation: SecureAggregation | None = None
    compression: Compression | None = None
    world: World | None = None
    strategy: Strategy = Strategy(use="ffa_lora", server=ServerAdam(kind="adam", lr=0.05, schedule=Schedule()))
    rounds: PositiveInt = 100
    eval_every: PositiveInt = 1
    keep: Keep = "last"  # the round whose adapter is exported: last, best, or {best: loss}
    stop: Stop | None = None  # before the last round, as {patience: 3}, once there is nothing better
    metrics: tuple[str, ...] = ()  # further figures of each evaluation, such as macro_f1; fedlora list metrics
    exact_match: ExactMatch | None = None  # judge a causal_lm by its own words too, and by rouge_l
    loss: Loss | None = None  # weights of labels and smoothing, for classification; null: cross-entropy
    preference: Preference | None = None  # how pairs of completions teach; null: as by default
    engine: Engine = Engine()
    baseline: Baseline | None = None  # of which scenario this is one; written by `simulate --baseline`
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # where the figures of each round go too

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if wrong := plugins.problem("tasks", task):
            raise PydanticCustomError("unknown", wrong)
        return task

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

    def chosen_by(self, metric: str) -> str | None:
        """The name of the figure that tells rounds apart, by default the task's metric; None where none need."""
        if isinstance(self.keep, Best):
            return self.keep.best
        return metric if self.keep == "best" or self.stop else None

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
