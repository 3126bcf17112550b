"""What pydantic finds wrong with a value, in plain words: of scenarios, of site files and of plug-ins' options."""

from collections.abc import Mapping
from typing import Any

_WORDS = {
    "model_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "string_type": "should be text",
    "string_too_short": "should have a character at least",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
}
_BOUNDS = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}
_SMALL = 1e-5  # bounds below it, and above its inverse, are written with an exponent


def words(detail: Mapping[str, Any]) -> str:
    """What a value should be, by one of pydantic's errors."""
    kind = detail["type"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    name, word = _BOUNDS.get(kind, ("", ""))
    bound = detail.get("ctx", {}).get(name)
    if isinstance(bound, float) and (bound < _SMALL or bound > 1 / _SMALL):
        return f"should be {word} {bound:g}"
    return _WORDS.get(kind) or str(detail["msg"]).replace("Input should", "should")


def shown(value: object) -> str:
    """A value as it is written in YAML, where YAML has another word for it than Python."""
    return {"None": "null", "True": "true", "False": "false"}.get(text := repr(value), text)
