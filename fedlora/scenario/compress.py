"""Sections of a scenario about a smaller base: how it is cut, and by which statistic of clients' rows."""

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, Section


class Compress(PlugIn):
    """Make the base smaller before anything is trained: layers of low rank, or fewer units in each MLP.

    Attributes:
        use: How layers are cut: a name of `fedlora list compressors`, or `module:Class` of your own. Further keys
            of this section are its options. docs/compression.md says when to take which. Example: `welore`.
        keep: Share that is kept: of the layers' numbers, or of units; adapters and heads are not counted. Lower it
            for a smaller base that knows less. 1 cuts nothing.
        targets: Layers that are cut, written as `model.adapter.targets` are.
        exclude: Layers or parts of the model that stay whole, likewise. Example: `[pooler]`.
    """

    use: str
    keep: Annotated[Float, Field(gt=0, le=1)] = 0.7
    targets: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    exclude: tuple[str, ...] = ()

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        if wrong := plugins.problem("compressors", use):
            raise PydanticCustomError("unknown", wrong)
        return use


class Statistics(Section):
    """One round before training in which each client sums what its rows say of the base, and noises the sum.

    Attributes:
        kind: What is summed. gram: products of each layer's inputs. mean: their squares. row_fisher: squared
            gradients of the weights, by input. It is one that `compress.use` goes by.
        layers: Numbers of the blocks whose layers have a statistic, counted from 0. null: all. Fewer have less
            noise each; the others are cut by their weights alone, or stay whole. Example: `[4, 5]`.
        epsilon: Part of `privacy.epsilon` that the round may spend; training has the rest. null: without privacy
            nothing is noised. Example: `1`.
        share: Probability with which each example, or person, is in the sum. Lower it for large clients: it takes
            less time, and noise is less for the same epsilon.
    """

    kind: Literal["gram", "mean", "row_fisher"]
    layers: tuple[Annotated[Int, Field(ge=0)], ...] | None = None
    epsilon: PositiveFloat | None = None
    share: Annotated[Float, Field(ge=1e-4, le=1)] = 1.0
