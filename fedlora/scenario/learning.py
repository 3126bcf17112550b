"""Sections of a scenario about how steps are taken: schedules, and the optimisers of server and clients."""

import math
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from fedlora.scenario.section import Float, PositiveFloat, Section

Beta = Annotated[Float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
TAGS = ("one", "by role", "sgd", "adamw", "torch")  # what pydantic calls the branches of a union here; no keys
Rates = Annotated[
    Annotated[PositiveFloat, Tag(TAGS[0])]
    | Annotated[dict[str, PositiveFloat], Tag(TAGS[1]), Field(min_length=1)],
    Discriminator(lambda value: TAGS[isinstance(value, dict)]),
]


class Schedule(Section):
    """How a learning rate goes over the run: up in a straight line, then down or level."""

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.0  # share of the run over which the rate rises
    end: Annotated[Float, Field(ge=0, le=1)] = 0.0  # share of the rate that is left after the last step

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in a step; above 0.

        Over the first w steps `step / w`; after them, with `p = (step - 1 - w) / (steps - w)` in [0, 1), and e the
        share that is left, `e + (1 - e) (1 - p)` or `e + (1 - e) (1 + cos(pi p)) / 2`, or 1.

        Args:
            step: from 1 to `steps`.
            steps: of the whole run.
        """
        rising = round(self.warmup * steps)
        if step <= rising:
            return step / rising
        past = (step - 1 - rising) / (steps - rising)
        if self.kind == "constant":
            return 1.0
        left = 1 - past if self.kind == "linear" else (1 + math.cos(math.pi * past)) / 2
        return self.end + (1 - self.end) * left


class ServerAdam(Section):
    """Adam or Yogi on the mean change of a round (FedOpt: Reddi et al., 2021)."""

    kind: Literal["adam", "yogi"]
    lr: Rates = 0.01  # about how far a number moves in a round; by role, such as {B: 0.01, head: 0.02}
    betas: Betas = (0.9, 0.99)
    eps: PositiveFloat = 1.0e-8  # added to the root of the second moment
    schedule: Schedule | None = None  # of lr, by round; null: constant


class ServerMomentum(Section):
    """Heavy-ball momentum on the mean change of a round; with momentum 0 a server's learning rate."""

    kind: Literal["momentum"]
    lr: Rates = 1.0  # 1 with momentum 0: the strategy's own mean; by role, such as {B: 1.0, head: 2.0}
    momentum: Beta = 0.9
    schedule: Schedule | None = None  # of lr, by round; null: constant


ServerOptimizer = Annotated[ServerAdam | ServerMomentum, Field(discriminator="kind")]


class ClientOptimizer(BaseModel):
    """How clients take their steps: a class of torch.optim by name; its options are further keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = Field(json_schema_extra={"not": {"enum": ["sgd", "adamw"]}})  # a class of torch.optim, in any case
    state: Literal["fresh", "kept", "averaged"] = (
        "fresh"  # anew each round, on the client's disk, or clients' mean
    )

    @field_validator("state")
    @classmethod
    def _averages(cls, state: str, info: ValidationInfo) -> str:
        if state == "averaged" and (kind := info.data.get("kind")) not in (None, "adamw"):
            raise PydanticCustomError(
                "unknown",
                "averaged is for adamw, whose second moment counts its own steps: {kind} takes fresh or kept",
                {"kind": kind},
            )
        return state


class ClientSGD(ClientOptimizer):
    """Stochastic gradient descent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sgd"]
    momentum: Beta = 0.0
    dampening: Beta = 0.0
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    nesterov: bool = False  # needs momentum


class ClientAdamW(ClientOptimizer):
    """AdamW, which under DP takes the noise's variance out of its second moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adamw"]
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8  # added to the root of the second moment
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    correct_noise: bool = True  # under DP: subtract the known variance of the noise from the second moment
    floor: Annotated[Float, Field(gt=0, le=1)] = 0.1  # which leaves at least this share of that variance


def _named(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


def _which(value: object) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind) if kind in ("sgd", "adamw") else "torch"


Optimizer = Annotated[
    Annotated[ClientSGD, Tag("sgd")]
    | Annotated[ClientAdamW, Tag("adamw")]
    | Annotated[ClientOptimizer, Tag("torch")],
    Discriminator(_which),
    BeforeValidator(_named, json_schema_input_type=str | ClientSGD | ClientAdamW | ClientOptimizer),
]
