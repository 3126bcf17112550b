"""What every section of a scenario is: a frozen mapping, whose numbers are no truth values.

A key is described in its docstring, under `Attributes:`; the schema and `fedlora explain` show it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "should be a number")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
PositiveFloat = Annotated[Float, Field(gt=0)]
# What models compute with, in 32 bits: beyond, products are infinite or 0, and a run would pay for nothing.
Rate = Annotated[Float, Field(ge=1e-12, le=1e12)]
Scale = Annotated[Float, Field(ge=1e-9, le=1e9)]
Weight = Annotated[Float, Field(ge=1e-6, le=1e6)]
Tiny = Annotated[Float, Field(ge=1e-20, le=1.0)]  # that is added to a root
Decay = Annotated[Float, Field(ge=0, le=1e6)]


class Section(BaseModel):
    """A mapping in a scenario: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PlugIn(BaseModel):
    """A section whose further keys are options of the class that `use` names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the known ones."""
        return dict(self.__pydantic_extra__ or {})


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a key of some type may hold, each as often as the type names it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)
