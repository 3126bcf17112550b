"""The section of a scenario that names a kind of adapter with options of its own."""

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedlora import plugins
from fedlora.scenario.section import PlugIn


class KindWith(PlugIn):
    """A kind of adapter with options of its own, which are further keys.

    Attributes:
        use: A name of `fedlora list kinds`, or `module:Class` of your own. Example: `sparse`.
    """

    @model_validator(mode="before")
    @classmethod
    def _of_peft(cls, told: object) -> object:
        """`{peft: VeraConfig}` is the kind `peft` with that configuration."""
        if isinstance(told, dict) and "use" not in told and "peft" in told:
            return {"use": "peft", "config": told["peft"], **{k: v for k, v in told.items() if k != "peft"}}
        return told

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        return known_kind(use)


def known_kind(use: str) -> str:
    """A name of a kind, or `module:Class`.

    Raises:
        PydanticCustomError: it is neither.
    """
    if wrong := plugins.problem("kinds", use):
        raise PydanticCustomError("unknown", wrong)
    return use
