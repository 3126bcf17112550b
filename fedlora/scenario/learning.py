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

from fedlora.scenario.section import Decay, Float, Rate, Section, Tiny

Beta = Annotated[Float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
TAGS = ("one", "by role", "sgd", "adamw", "torch")  # what pydantic calls the branches of a union here; no keys
Rates = Annotated[
    Annotated[Rate, Tag(TAGS[0])] | Annotated[dict[str, Rate], Tag(TAGS[1]), Field(min_length=1)],
    Discriminator(lambda value: TAGS[isinstance(value, dict)]),
]


class Schedule(Section):
    """How a learning rate changes over the run: it rises in a straight line, then falls or stays.

    Attributes:
        kind: How the learning rate changes after the warm-up: it stays, falls in a straight line, or falls as a
            cosine.
        warmup: Share of the run over which the learning rate rises from 0. Try 0.1 where early steps diverge.
        end: Share of the learning rate that is left after the last step.
    """

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[Float, Field(ge=0, le=1)] = 0.0

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
    """Adam or Yogi on the mean change of a round (FedOpt: Reddi et al., 2021).

    Attributes:
        kind: adam, or yogi, whose second moment changes more slowly.
        lr: Learning rate, or one by role: about how far a number moves in a round. Tune it first: `fedlora tune`.
            Example: `{B: 0.01, head: 0.02}`.
        betas: Decay of the first and the second moment from round to round.
        eps: Added to the root of the second moment.
        schedule: How the learning rate changes by round. null: it is constant. Example: `{kind: linear}`.
    """

    kind: Literal["adam", "yogi"]
    lr: Rates = 0.01
    betas: Betas = (0.9, 0.99)
    eps: Tiny = 1.0e-8
    schedule: Schedule | None = None


class ServerMomentum(Section):
    """Heavy-ball momentum on the mean change of a round; with momentum 0 it is a learning rate of the server.

    Attributes:
        kind: momentum: heavy-ball momentum.
        lr: Learning rate, or one by role. At 1 with momentum 0 the server takes the strategy's own mean. Example:
            `{B: 1.0, head: 2.0}`.
        momentum: Share of the last step that is added to the next one. 0: none.
        schedule: How the learning rate changes by round. null: it is constant. Example: `{kind: linear}`.
    """

    kind: Literal["momentum"]
    lr: Rates = 1.0
    momentum: Beta = 0.9
    schedule: Schedule | None = None


ServerOptimizer = Annotated[ServerAdam | ServerMomentum, Field(discriminator="kind")]


class Shrinkage(Section):
    """Singular values of the noised mean change of each factor, shrunk by the known size of its noise.

    Attributes:
        strength: What the known size of the noise is multiplied by. 1: the least squared error in each round.
            Lower it where a round's signal is far below its noise, and only many rounds together show it.
    """

    strength: Annotated[Float, Field(gt=0, le=10)] = 1.0


def _switched(value: object) -> object:
    return {} if value is True else None if value is False else value


Shrink = Annotated[Shrinkage | None, BeforeValidator(_switched, json_schema_input_type=bool | Shrinkage | None)]


class ClientOptimizer(BaseModel):
    """How clients take their steps: a class of torch.optim by name, with its options as further keys.

    Attributes:
        kind: Name of a class of torch.optim, in any case. Further keys are its options. Example: `RMSprop`.
        state: Where moments are between rounds. fresh: they begin again. kept: they stay on the client's disk.
            averaged, for adamw alone: second moments travel, and clients begin at their mean.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = Field(json_schema_extra={"not": {"enum": ["sgd", "adamw"]}})
    state: Literal["fresh", "kept", "averaged"] = "fresh"

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
    """Stochastic gradient descent.

    Attributes:
        kind: sgd: stochastic gradient descent.
        momentum: Share of the last step that is added to the next one. 0: none.
        dampening: Share by which a gradient is reduced before it enters the momentum.
        weight_decay: L2 penalty that is added to gradients. It pulls weights to 0.
        nesterov: Whether to take Nesterov's momentum. It needs `momentum`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sgd"]
    momentum: Beta = 0.0
    dampening: Beta = 0.0
    weight_decay: Decay = 0.0
    nesterov: bool = False


class ClientAdamW(ClientOptimizer):
    """AdamW, which under privacy subtracts the noise's variance from its second moment.

    Attributes:
        kind: adamw: Adam with decoupled weight decay.
        betas: Decay of the first and the second moment from step to step.
        eps: Added to the root of the second moment.
        weight_decay: Share of the weights, times the learning rate, that a step takes off.
        correct_noise: Under privacy, subtract the known variance of the noise from the second moment. Leave it on:
            otherwise the noise sets the size of steps.
        floor: Share of the noise's variance that at least stays in the second moment. Raise it where steps get too
            long.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adamw"]
    betas: Betas = (0.9, 0.999)
    eps: Tiny = 1.0e-8
    weight_decay: Decay = 0.0
    correct_noise: bool = True
    floor: Annotated[Float, Field(gt=0, le=1)] = 0.1


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
