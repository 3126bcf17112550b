"""The JSON Schema of scenarios, for editors that complete and check YAML.

Its descriptions are the docstrings of the sections and the comments beside their keys.
"""

import ast
import inspect
import io
import tokenize
from typing import Any

from fedlora import plugins
from fedlora.metrics import contract as metrics
from fedlora.scenario import clients, compression, data, keeping, learning, privacy, sections, world

_WRITTEN = (sections, clients, compression, data, keeping, learning, privacy, world)  # where sections are
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """A scenario's JSON Schema, draft 2020-12."""
    made: dict[str, Any] = _bounded(sections.Scenario.model_json_schema())
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "fedlora scenario"}
    parts = {**made["$defs"], "Scenario": made}
    for section, key, comment in _comments():
        if key in parts.get(section, {}).get("properties", {}):
            parts[section]["properties"][key]["description"] = comment
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
        {"pattern": r"^[\w.]+:\w+$", "description": "a function of one's own, as module:function"},
    ]
    return made


def _bounded(node: Any) -> Any:
    """Bounds by their names in JSON Schema; pydantic leaves them as they are behind a validator."""
    if isinstance(node, dict):
        return {_BOUNDS.get(key, key): _bounded(value) for key, value in node.items()}
    return [_bounded(item) for item in node] if isinstance(node, list) else node


def _comments() -> list[tuple[str, str, str]]:
    """Section, key and the comment on its line, for each key that has one."""
    return [comment for module in _WRITTEN for comment in _comments_in(inspect.getsource(module))]


def _comments_in(text: str) -> list[tuple[str, str, str]]:
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        (section.name, key.target.id, comments[line])
        for section in ast.parse(text).body
        if isinstance(section, ast.ClassDef)
        for key in section.body
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        for line in range(key.lineno, (key.end_lineno or key.lineno) + 1)
        if line in comments
    ]
