"""Sections of a sweep's file: what is drawn, what is ended early, and what is selected."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from fedlora.scenario import Float, Int, PositiveInt, Section


class Draw(Section):
    """Values drawn for each sample."""

    draw: Literal["uniform", "loguniform", "randint"]  # randint: low is in, high is out
    low: Float
    high: Float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high or (self.draw == "loguniform" and self.low <= 0):
            least = "0 < low < high" if self.draw == "loguniform" else "low < high"
            raise PydanticCustomError("draw", f"{self.draw} needs {least}, such as low: 0.1, high: 10")
        return self


class StopEarly(Section):
    """End runs that fall behind (ASHA, Li et al., 2020, https://arxiv.org/abs/1810.05934)."""

    grace: PositiveInt = 1  # rounds that each run gets
    factor: Annotated[Int, Field(ge=2)] = 3  # one run in so many goes on at each rung


Values = Annotated[
    Annotated[list[Any], Tag("grid")] | Annotated[Draw, Tag("random")],
    Discriminator(lambda given: "grid" if isinstance(given, list) else "random"),
]


class Select(Section):
    """The best run alone leaves."""

    mean: Annotated[Float, Field(ge=1, le=1000)]  # number of runs; how many there are is drawn
