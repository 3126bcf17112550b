"""The base model of a scenario, and the adapter that is trained beside it."""

import os
import re
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from fedlora.scenario.bits import Bits, Quantize
from fedlora.scenario.head import Head
from fedlora.scenario.kinds import KindWith, known_kind
from fedlora.scenario.learning import TAGS
from fedlora.scenario.schedules import AdapterSchedule, Grow
from fedlora.scenario.section import Int, PositiveInt, Scale, Section


class Adapter(Section):
    """Low-rank factors beside each matched linear layer (Hu et al., 2021).

    Attributes:
        kind: How the change of a weight is parametrised: a name of `fedlora list kinds`, or `module:Class` of your
            own. auto takes what the strategy is made for: `lora` for most. docs/kinds.md says when to take which.
            With options of the kind it is a mapping. Example: `{use: sparse, density: 0.02}`.
        r: Rank: the inner dimension of the factors. More learns more, sends more and gets more noise under
            privacy. With `clients.ranks` it is the server's rank and the highest.
        alpha: Numerator of the scaling: a weight changes by `alpha / r * B A`. Under plain steps of SGD keep it at
            `r` and tune the learning rate. Steps of `strategy.server: adam` have one size whatever alpha is: in
            many small ones several times `r` learns more, 64 at r 8; in few large ones `r` is enough.
        rslora: Scale by `alpha / sqrt(r)` instead, so that a larger rank does not shrink the change.
        targets: Layers that get factors: ends of their names, regular expressions, or all-linear. They depend on
            the base: `[query, value]` for BERT, `[q_proj, v_proj]` for Llama-like models.
        exclude: Layers or parts of the model that get no factors, written as `targets` are. Example: `[visual]`.
        schedule: What becomes of the adapter over the rounds. null: it stays what it is. Rotate lets a small kind
            reach more directions, and decay lets small ones fade. Nested is for devices of several ranks. Grow
            begins small, and probe chooses layers. Example: `{kind: rotate, every: 5}`.
        layers: Numbers of the blocks that have targets, counted from 0. null: all. Upper blocks alone train
            faster. Example: `[4, 5]`.
    """

    kind: Annotated[
        Annotated[str, Tag(TAGS[0])] | Annotated[KindWith, Tag(TAGS[1])],
        Discriminator(lambda told: TAGS[not isinstance(told, str)]),
    ] = "auto"
    r: PositiveInt = 8
    alpha: Scale = 8.0
    rslora: bool = False
    targets: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    exclude: tuple[str, ...] = ()
    layers: tuple[Annotated[Int, Field(ge=0)], ...] | None = None
    schedule: AdapterSchedule | None = None

    @field_validator("targets", "exclude", mode="before")
    @classmethod
    def _several(cls, told: object) -> object:
        """One alone, as peft's users write it."""
        return (told,) if isinstance(told, str) else told

    @field_validator("targets", "exclude")
    @classmethod
    def _compile(cls, told: tuple[str, ...]) -> tuple[str, ...]:
        for name in told:
            try:
                re.compile(name)
            except re.error as error:
                raise PydanticCustomError("pattern", f"{name!r} is not a regular expression: {error}") from error
        return told

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str | KindWith) -> str | KindWith:
        return known_kind(kind) if isinstance(kind, str) and kind != "auto" else kind

    @property
    def named(self) -> str:
        """The name of the kind, or auto."""
        return self.kind if isinstance(self.kind, str) else self.kind.use

    def rank(self, round: int) -> int:
        """The highest rank that trains in a round: `r`, or what it has grown to."""
        return self.schedule.rank(round, self.r) if isinstance(self.schedule, Grow) else self.r


class Model(Section):
    """The base model and what is trained beside it.

    Attributes:
        base: The pretrained model: `minilm`, a local folder or a Hub id. Its weights stay frozen.
        revision: Branch, tag or commit of a Hub id. null: the main branch. Set it so that a run can be repeated.
            Example: `main`.
        quantize: Hold the frozen linear layers in 8 or 4 bits, by bitsandbytes. null: in full. Set it where the
            base does not fit into memory. With bits each layer has 4 or 8. Example: `4bit`.
        checkpointing: Keep only the input of each block, and compute the rest again in the backward pass. Set it
            where memory runs out: it takes more time.
        adapter: Which layers are trained, and how.
        start: Begin from this adapter: the folder of a run, a folder that peft saved, or a Hub id. null: the
            adapter is drawn from the seed. Example: `runs/public`.
        head: The last layer. trained: it is trained and sent. frozen: it stays as it begins. kept: it is trained,
            and begins as in the base or in `model.start`, whatever its labels are called. With a rank only as many
            numbers for each label are trained and sent.
        pooler: The encoder's pooler, where it has one. Under privacy leave it frozen: it has many more numbers
            than the adapter.
        pooling: What the head of an encoder reads of a text. cls: its first token. mean: the mean over its tokens;
            the pooler is left out. null: as the base does. Set mean where the base is a sentence encoder that was
            trained so, such as MiniLM. For tasks that judge whole texts.
    """

    base: Annotated[str, Field(min_length=1)] = "minilm"
    revision: str | None = None
    quantize: Quantize | None = None
    checkpointing: bool = False
    adapter: Adapter = Adapter()
    start: Annotated[str, Field(min_length=1)] | None = None
    head: Head = "trained"
    pooler: Literal["trained", "frozen"] = "frozen"
    pooling: Literal["cls", "mean"] | None = None

    @property
    def begins(self) -> bool:
        """Whether the adapter begins with something else than what the seed stands for."""
        return self.start is not None or self.mends

    @property
    def mends(self) -> bool:
        """Whether the adapter begins with what rounding lost."""
        return isinstance(self.quantize, Bits) and self.quantize.start is not None

    @field_validator("start")
    @classmethod
    def _placed(cls, start: str | None) -> str | None:
        """A folder by its whole path, so that the run's own scenario names it from anywhere."""
        if start is not None and (start.startswith((".", "/", "~")) or os.path.isdir(start)):
            return os.path.abspath(os.path.expanduser(start))
        return start
