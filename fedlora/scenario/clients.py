"""The section `clients`: how many there are, how each trains, and what kind of device it has."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.scenario.learning import Optimizer, Rates, Schedule
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, PositiveInt, Section
from fedlora.seeding import generator


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


Ranks = Annotated[RankList | RankShares, Field(discriminator="kind")]


class Tier(Section):
    """A kind of device; each client draws its own from the seed."""

    share: Annotated[Float, Field(gt=0, le=1)]  # of the clients
    rank: PositiveInt | None = None  # of its factors; null: model.adapter.r
    seconds_per_example: PositiveFloat = 0.05  # in a world: that a step takes for each example of its batch
    megabits_down: PositiveFloat = 50.0  # in a world: a second
    megabits_up: PositiveFloat = 10.0  # in a world: a second


class Clients(PlugIn):
    """How many clients there are and how each trains."""

    use: str = "sgd"  # a name, or module:Class of one's own; unset: dp_sgd where examples are private
    total: PositiveInt
    per_round: PositiveInt | None = None  # null: all of them
    local_steps: PositiveInt = 10  # unset: 1 where strategy is unset too
    batch_size: PositiveInt = 32  # under DP the expected size of a Poisson batch
    sample_rate: Annotated[Float, Field(gt=0, le=1)] | None = (
        None  # a batch is this share of a client's examples, in the place of batch_size: each example weighs alike
    )
    lr: Rates = 0.5  # by role, as {B: 0.004, head: 0.01}; unset: SGD 0.5, private 2 / clip_norm; adam 0.002, 0.01
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
