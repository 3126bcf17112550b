"""A scenario: its sections with their defaults, and those of them that have no file of their own."""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, PrivateAttr, Tag, field_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.errors import SettingError, UserError
from fedlora.privacy import cohorts
from fedlora.privacy.graph import sharers
from fedlora.scenario.baseline import Baseline
from fedlora.scenario.clients import Clients
from fedlora.scenario.compress import Compress, Statistics
from fedlora.scenario.compression import Compression, TopK
from fedlora.scenario.data import Data
from fedlora.scenario.keeping import Best, Keep, Stop
from fedlora.scenario.keys import Source
from fedlora.scenario.learning import TAGS, Schedule, ServerAdam, ServerOptimizer, Shrink
from fedlora.scenario.model import Model
from fedlora.scenario.privacy import Privacy, SecureAggregation
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, PositiveInt, Scale, Section, Weight
from fedlora.scenario.world import World


class ExactMatch(Section):
    """For causal_lm: answers that the model writes by greedy decoding, compared with the given ones.

    Attributes:
        examples: Number of test examples for which the model writes an answer, from the first on. Each takes
            seconds on a CPU.
        max_new_tokens: Most tokens that the model writes for an example. Raise it where answers are cut off.
        pattern: Regular expression; its last matches in the two texts are compared. null: the whole texts are
            compared. Set it where only a part counts, such as a final number. Example: `'#### *(-?[0-9]+)'`.
    """

    examples: PositiveInt = 32
    max_new_tokens: PositiveInt = 256
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise PydanticCustomError("pattern", f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class Preference(Section):
    """For `task: preference`, which is DPO (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

    Attributes:
        beta: Weight of the log probability relative to the base's, in DPO. A larger value keeps the model nearer
            to the base.
    """

    beta: Scale = 0.1


ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag(TAGS[0])] | Annotated[dict[str, Weight], Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[isinstance(value, dict)]),
]


class Loss(Section):
    """For classification: how examples teach; how they are judged stays as it is.

    Attributes:
        class_weights: Weight of each label in the loss; labels that are not named have 1. balanced: by counts of
            the test rows, which are public. null: all alike. Set it where labels are rare. Example: `{rare: 5}`.
        label_smoothing: Share of the target that is spread over all labels. Raise it where labels are noisy.
    """

    class_weights: ClassWeights | None = None
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0


class Strategy(PlugIn):
    """How the server turns updates into the next adapter.

    Attributes:
        use: How the server aggregates: a name of `fedlora list strategies`, or `module:Class` of your own. Further
            keys of this section are its options. Example: `ffa_lora`.
        server: Optimiser steps along the mean of the updates. null: the mean is taken as it is. It suits
            strategies that take a mean. Example: `{kind: adam, lr: 0.02}`.
        shrink: Under privacy, shrink the singular values of each factor's mean change by the known size of its
            noise, before `server` steps. true: with the defaults. null: the mean is taken as it is. It costs no
            epsilon, and suits strategies that take a mean. Example: `{strength: 0.5}`.
    """

    server: ServerOptimizer | None = None
    shrink: Shrink = None

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        if wrong := plugins.problem("strategies", use):
            raise PydanticCustomError("unknown", wrong)
        return use


class Engine(Section):
    """Where clients run. Nothing here but `threads`, `fused` and `precision` can change a result.

    Attributes:
        kind: Where clients run. auto: in this process where the run is small or has one worker, else on Ray.
        workers: Number of processes that train clients. auto: as many as there are cores and clients in a round.
            The result does not depend on it.
        threads: Torch threads of each worker. auto: 1. Another number changes rounding, so results differ
            slightly.
        fused: Clients that share a worker's forward and backward passes. Try 4 where batches are small and memory
            is free.
        gpus_per_worker: Share of a GPU for each worker; at 0.5 two share one. auto: GPUs where there are any, with
            as many workers as fit into their memory.
        deadline: Seconds that a round at sites, or a chunk of clients on Ray, may take. null: 600 at sites, none
            on Ray. Example: `900`.
        precision: Number format of training; evaluation is in fp32. auto: bf16 where the hardware multiplies it,
            else fp32.
    """

    kind: Literal["auto", "inline", "ray"] = "auto"
    workers: PositiveInt | Literal["auto"] = "auto"
    threads: PositiveInt | Literal["auto"] = "auto"
    fused: PositiveInt = 1
    gpus_per_worker: Annotated[Float, Field(ge=0, le=1)] | Literal["auto"] = 0.0
    deadline: PositiveFloat | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Scenario(Section):
    """Everything about a run.

    Attributes:
        name: Name of the run, for its folder and its reports: letters, digits, `_`, `.` and `-`. Example: `mine`.
        seed: Root of all random numbers of a simulation. Repeat a run with several seeds to see its spread.
        task: What is learnt: a name of `fedlora list tasks`, or `module:Class` of your own.
        model: The base model, and what is trained beside it.
        data: Where examples come from, and which client holds which. Example: `{dataset: tweets}`.
        clients: How many clients there are, and how each trains. Example: `{total: 10}`.
        privacy: The guarantee of differential privacy. null: nothing is clipped or noised. Example: `{epsilon: 6,
            delta: 1.0e-5}`.
        secure_aggregation: Clients mask their updates, and the server sees only the sum. null: the server sees
            each update. Example: `{range: 1.0}`.
        compression: Fewer bytes for what is sent. null: 4 bytes a number. Example: `{up: {kind: int8}}`.
        compress: Make the frozen base smaller before training. null: it stays as it is. Example:
            `{use: welore}`.
        statistics: A statistic of the clients' rows by which the base is cut. null: it is cut by its weights
            alone. Example: `{kind: gram, epsilon: 1}`.
        world: Simulated devices on a virtual clock. null: only the time of this machine is counted. Example:
            `{deadline: 300}`.
        strategy: How the server makes the next adapter of the updates. Unset: `ffa_lora` with Adam at the server,
            and one local step a round. Example: `{use: ffa_lora}`.
        rounds: Number of rounds, or the most with `stop`. Noise is calibrated to all of them.
        eval_every: Rounds from one evaluation to the next; the last round is always evaluated. Raise it where
            evaluation takes most of the time.
        keep: The round whose adapter is exported: last, best by the task's metric, or the best by a named figure.
            The latter two need validation rows. Example: `{best: loss}`.
        stop: End early once evaluations stop improving. null: all rounds are trained. It needs validation rows.
            Example: `{patience: 3}`.
        metrics: Further figures of each evaluation: names of `fedlora list metrics`, or `module:function` of your
            own. Example: `[macro_f1, ece]`.
        diagnostics: Report in each round the effective rank of each layer's change and its noise to signal, and in
            each evaluation how far representations of test rows spread. It looks at no client's rows.
        exact_match: For causal_lm: the model also writes answers, which are compared with the given ones. null: it
            writes none. Example: `{examples: 32}`.
        loss: Weights of labels and label smoothing, for classification. null: cross-entropy. Example:
            `{label_smoothing: 0.1}`.
        preference: Options of `task: preference`. null: that task takes its defaults. Example: `{beta: 0.1}`.
        engine: Where clients run, and on what hardware.
        baseline: The scenario that this one is a baseline of. `fedlora simulate --baseline` writes it; leave it
            out by hand. Example: `{kind: pooled, of: 0123abcd}`.
        trackers: Services that also get the figures of each round. wandb and mlflow are extras to install.
            Example: `[tensorboard]`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    task: str = "classification"
    model: Model = Model()
    data: Data
    clients: Clients
    privacy: Privacy | None = None
    secure_aggregation: SecureAggregation | None = None
    compression: Compression | None = None
    compress: Compress | None = None
    statistics: Statistics | None = None
    world: World | None = None
    strategy: Strategy = Strategy(use="ffa_lora", server=ServerAdam(kind="adam", lr=0.05, schedule=Schedule()))
    rounds: PositiveInt = 100
    eval_every: PositiveInt = 1
    keep: Keep = "last"
    stop: Stop | None = None
    metrics: tuple[str, ...] = ()
    diagnostics: bool = False
    exact_match: ExactMatch | None = None
    loss: Loss | None = None
    preference: Preference | None = None
    engine: Engine = Engine()
    baseline: Baseline | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()

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
    def person(self) -> str | None:
        """The column of the persons who are protected; None where each example is."""
        return asked.person if (asked := self.example_privacy) is not None else None

    @property
    def counted_steps(self) -> int:
        """Steps of a client that is in every round, in those of the reserve too: noise is calibrated for them."""
        reserve = 0 if self.example_privacy is None else self.example_privacy.reserve
        return (self.rounds + reserve) * self.clients.local_steps

    @property
    def client_privacy(self) -> Privacy | None:
        """The guarantee for each client, which the server gives; None where there is none."""
        return self.privacy if self.privacy is not None and self.privacy.unit == "client" else None

    def chosen_by(self, metric: str) -> str | None:
        """The name of the figure that tells rounds apart, by default the task's metric; None where none need."""
        if isinstance(self.keep, Best):
            return self.keep.best
        return metric if self.keep == "best" or self.stop else None

    def rank(self, client: int, round: int) -> int:
        """The rank of a client's factors in a round."""
        told = self.model.adapter
        return min(self.clients.rank(client, self.seed, told.r), told.rank(round))

    def ranks(self, round: int) -> list[int]:
        """Every rank that a client may have in a round, ascending."""
        told = self.model.adapter
        return sorted({min(rank, told.rank(round)) for rank in self.clients.possible_ranks(told.r)})

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what compression left out, to send it later."""
        return self.compression is not None and isinstance(self.compression.up, TopK)

    @property
    def shares_noise(self) -> bool:
        """Whether clients share out the noise that protects them whole, or their examples."""
        return self.secure_aggregation is not None and self.secure_aggregation.noise == "shared"

    @property
    def shares_example_noise(self) -> SecureAggregation | None:
        """Under which masks clients share out the noise that protects their examples; None where they do not."""
        return self.secure_aggregation if self.shares_noise and self.client_privacy is None else None

    def noise_parts(self, members: int) -> float:
        """Into how many parts clients divide the variance of the noise for their examples; 1: not at all.

        Args:
            members: clients of a round.
        """
        asked = self.shares_example_noise
        return 1.0 if asked is None else sharers(members, asked.survivors, asked.honest)

    @property
    def example_terms(self) -> dict[str, Any]:
        """What each line of a ledger repeats of the guarantee for each example."""
        assert self.example_privacy is not None
        shared = self.shares_example_noise
        return self.example_privacy.terms | ({} if shared is None else {"honest": shared.honest})

    @property
    def most_members(self) -> int:
        """Clients that a masked sum may have; coins draw more with a chance that delta covers."""
        told, whole = self.clients, self.client_privacy
        if whole is None:
            return told.cohort_size
        chance = cohorts.RARE / 2 * whole.delta / self.rounds
        return cohorts.most(told.total, told.cohort_size / told.total, chance)

    @property
    def unused(self) -> list[str]:
        """What is written and does nothing beside another key, a sentence each."""
        told, key = self.clients, ("clients", "batch_size")
        found: list[str] = []
        if told.sample_rate is not None and (key in self._source.lines or key in self._source.overrides):
            found.append(
                f"clients.batch_size: {told.batch_size} is not used beside clients.sample_rate: "
                f"{told.sample_rate:g}, which says what a step takes: leave one of them out, or write "
                "clients.sample_rate: null"
            )
        if told.batch_limit is not None and self.example_privacy is None:
            found.append(
                "clients.batch_limit: does nothing where no example is private: batches are of clients.batch_size"
            )
        if self.strategy.shrink is not None and self.privacy is None:
            found.append("strategy.shrink: does nothing without a privacy section: there is no noise to shrink")
        return found

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
