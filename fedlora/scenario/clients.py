"""The section `clients`: how many there are, how each trains, and what kind of device it has."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.errors import counted
from fedlora.scenario.learning import Optimizer, Rates, Schedule
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, PositiveInt, Scale, Section
from fedlora.seeding import generator


class RankList(Section):
    """The rank of each client in turn; the list repeats when there are more clients.

    Attributes:
        kind: list: ranks are written out.
        values: Rank of each client in turn; the list repeats where there are more clients. Example: `[4, 8]`.
    """

    kind: Literal["list"]
    values: tuple[PositiveInt, ...] = Field(min_length=1)


class RankShares(Section):
    """Each client draws its rank from the seed, with these shares, such as {4: 0.5, 8: 0.5}.

    Attributes:
        kind: shares: ranks are drawn from the seed.
        shares: Share of the clients for each rank; the shares sum to 1. Example: `{4: 0.5, 8: 0.5}`.
    """

    kind: Literal["shares"]
    shares: dict[PositiveInt, Annotated[Float, Field(gt=0, le=1)]] = Field(min_length=1)

    @field_validator("shares")
    @classmethod
    def _whole(cls, shares: dict[int, float]) -> dict[int, float]:
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise PydanticCustomError("shares", "should sum to 1")
        return shares


Ranks = Annotated[RankList | RankShares, Field(discriminator="kind")]


class Tier(Section):
    """A kind of device; each client draws its own from the seed.

    Attributes:
        share: Share of the clients that have this device; the shares of all tiers sum to 1. Example: `0.5`.
        rank: Rank of its adapter. null: `model.adapter.r`. Lower it for weak devices. Example: `4`.
        seconds_per_example: Virtual seconds that a step takes for each example of its batch. It counts only with
            `world`.
        megabits_down: Download speed in megabits a second. It counts only with `world`.
        megabits_up: Upload speed in megabits a second. It counts only with `world`.
    """

    share: Annotated[Float, Field(gt=0, le=1)]
    rank: PositiveInt | None = None
    seconds_per_example: PositiveFloat = 0.05
    megabits_down: PositiveFloat = 50.0
    megabits_up: PositiveFloat = 10.0


class Clients(PlugIn):
    """How many clients there are and how each trains.

    Attributes:
        use: How a client trains: a name of `fedlora list clients`, or `module:Class` of your own. Unset: `dp_sgd`
            where examples are private, else `sgd`. Further keys are its options.
        total: Number of clients. Example: `10`.
        per_round: Clients that train in each round. null: all of them. Fewer cost less time, and each of them
            spends less epsilon. Example: `5`.
        local_steps: Optimiser steps of a client in a round. Unset: 1 where `strategy` is unset too, else 10. More
            steps need fewer rounds and bytes.
        batch_size: Examples in a step, or persons with `privacy.person`. Under privacy it is the expected size of
            a Poisson batch: larger batches have less noise beside the signal.
        sample_rate: Share of a client's examples in a step; it replaces `batch_size`. null: `batch_size` counts.
            Set it where clients differ in size: each example then weighs alike. Example: `0.02`.
        batch_limit: Most examples, or persons, that a step of a private client takes, over the expected number. A
            larger batch is drawn again, at the same epsilon. null: any. Set it where the time of a step must be
            bounded. Example: `1.5`.
        lr: Learning rate, or one by role. Unset: 0.5, or 2 / `clip_norm` for private examples; with Adam 0.002, or
            0.01 for private examples. Tune it first: `fedlora tune`. Example: `{B: 0.004, head: 0.01}`.
        optimizer: How a client takes its steps: sgd, adamw, another class of torch.optim, or a mapping with its
            options. null: plain SGD. Example: `{kind: adamw}`.
        schedule: How the learning rate changes over all local steps of the run. null: it is constant. Example:
            `{kind: cosine, warmup: 0.1}`.
        micro_batch_size: About how many examples are in memory at once. The result does not depend on it. Lower it
            where memory runs out.
        ranks: Rank of each client, at most `model.adapter.r`. null: all have that rank. It needs a strategy that
            takes unequal ranks. Example: `{kind: list, values: [4, 8]}`.
        tiers: Kinds of device by name; a client draws its own from the seed. null: all are alike. Example:
            `{phone: {share: 0.8, rank: 4}, laptop: {share: 0.2}}`.
        max_norm: Largest L2 norm of one client's change; a larger one is refused. null: any. Set it where clients
            may be faulty. Example: `10`.
        max_examples: Most examples that a client may claim where the server does not know their number. null: any.
            Example: `10000`.
        min_replies: Clients that must reply for a round to count. Raise it where a mean over few clients says too
            little.
        retries: How often a round with too few replies is tried again, each time with another cohort.
    """

    use: str = "sgd"
    total: PositiveInt
    per_round: PositiveInt | None = None
    local_steps: PositiveInt = 10
    batch_size: PositiveInt = 32
    sample_rate: Annotated[Float, Field(gt=0, le=1)] | None = None
    batch_limit: Annotated[Float, Field(ge=1)] | None = None
    lr: Rates = 0.5
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    micro_batch_size: PositiveInt = 16
    ranks: Ranks | None = None
    tiers: dict[str, Tier] | None = None
    max_norm: Scale | None = None
    max_examples: PositiveInt | None = None
    min_replies: PositiveInt = 1
    retries: Annotated[Int, Field(ge=0)] = 0

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
            raise PydanticCustomError(
                "cohort", f"should be at most the {counted(total, 'client')} in total, not {per_round}"
            )
        return per_round

    @field_validator("min_replies")
    @classmethod
    def _enough(cls, least: int, info: ValidationInfo) -> int:
        size = info.data.get("per_round") or info.data.get("total")
        if size is not None and least > size:
            raise PydanticCustomError(
                "cohort", f"should be at most the {counted(size, 'client')} of a round, not {least}"
            )
        return least

    @field_validator("tiers")
    @classmethod
    def _whole(cls, tiers: dict[str, Tier] | None, info: ValidationInfo) -> dict[str, Tier] | None:
        if tiers is not None and abs(sum(tier.share for tier in tiers.values()) - 1) > 1e-6:
            raise PydanticCustomError("shares", "shares should sum to 1")
        if tiers is not None and info.data.get("ranks") is not None:
            raise PydanticCustomError("shares", "give each tier its rank, or clients their ranks, not both")
        return tiers

    def rate(self, num_examples: int) -> float:
        """The probability with which a step of a private client takes each of its examples."""
        return self.batch_size / num_examples if self.sample_rate is None else self.sample_rate

    def batch(self, num_examples: int) -> int:
        """Examples in a step of a client, under DP about the expected number: at least one."""
        if self.sample_rate is None:
            return self.batch_size
        return max(1, round(self.sample_rate * num_examples))

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by role; empty where all have one."""
        return self.lr if isinstance(self.lr, dict) else {}

    @property
    def keeps_state(self) -> bool:
        """Whether the state of a client's optimiser stays with it from one of its rounds to the next."""
        return self.optimizer is not None and self.optimizer.state == "kept"

    @property
    def averages_state(self) -> bool:
        """Whether the second moments of clients' optimisers travel, and begin each round at their mean."""
        return self.optimizer is not None and self.optimizer.state == "averaged"

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
