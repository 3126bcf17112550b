"""The JSON Schema of scenarios, for editors that complete and check YAML.

Its descriptions are the docstrings of the sections: what a section is, and under `Attributes:` what each key is. A
value in backticks after `Example:`, at the end of a key, is an example in the schema.
"""

import inspect
import re
from typing import Any

import yaml
from pydantic import BaseModel

from fedlora import plugins
from fedlora.metrics import contract as metrics
from fedlora.scenario import data, sections
from fedlora.scenario.section import sections as held

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_KEYS = "\n\nAttributes:\n"


def schema() -> dict[str, Any]:
    """A scenario's JSON Schema, draft 2020-12."""
    made = described(sections.Scenario)
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "fedlora scenario"}
    parts = {**made["$defs"], "Scenario": made}
    parts["Data"]["properties"]["dataset"]["examples"] = sorted(data.DATASETS)
    named: tuple[tuple[str, str, plugins.Shelf], ...] = (
        ("Strategy", "use", "strategies"),
        ("Clients", "use", "clients"),
        ("Scenario", "task", "tasks"),
        ("Adapter", "kind", "kinds"),
    )
    for section, key, shelf in named:
        auto = ["auto"] if shelf == "kinds" else []
        parts[section]["properties"][key]["anyOf"] = [
            {"enum": [*auto, *plugins.names(shelf)]},
            {"pattern": r"^[\w.]+:\w+$", "description": "your own class, as module:Class"},
        ]
    parts["Scenario"]["properties"]["metrics"]["items"]["anyOf"] = [
        {"enum": sorted({name for target in metrics.TARGETS for name in metrics.known(target)})},
        {"pattern": r"^[\w.]+:\w+$", "description": "your own function, as module:function"},
    ]
    return made


def described(root: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a section and of those within it, each key with its description."""
    made: dict[str, Any] = _bounded(root.model_json_schema())
    parts = {**made.get("$defs", {}), root.__name__: made}
    for section in within(root):
        part = parts[section.__name__]
        part["description"] = (inspect.getdoc(section) or "").partition(_KEYS)[0]
        for key, told in descriptions(section).items():
            text, _, example = told.partition(" Example: ")
            part["properties"][key]["description"] = text
            if example:
                part["properties"][key]["examples"] = [yaml.safe_load(example.strip("`."))]
    return made


def within(root: type[BaseModel]) -> list[type[BaseModel]]:
    """A section and all that its keys may hold, each once."""
    found = [root]
    for section in found:  # grows while it is read
        for field in section.model_fields.values():
            found += [other for other in held(field.annotation) if other not in found]
    return found


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a section, or of one that it extends, says of each key."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        told = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition(_KEYS)[2]
        found |= dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", told, re.M))
    return {key: " ".join(text.split()) for key, text in found.items() if key in section.model_fields}


def _bounded(node: Any) -> Any:
    """Bounds by their names in JSON Schema; pydantic leaves them as they are behind a validator."""
    if isinstance(node, dict):
        return {_BOUNDS.get(key, key): _bounded(value) for key, value in node.items()}
    return [_bounded(item) for item in node] if isinstance(node, list) else node
