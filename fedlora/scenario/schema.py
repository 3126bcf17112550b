"""The JSON Schema of scenarios, for editors that complete and check YAML.

Its descriptions are the docstrings of the sections and the comments beside their keys in
`fedlora.scenario.sections` and `fedlora.scenario.learning`.
"""

import ast
import inspect
import io
import tokenize
from typing import Any

from fedlora import plugins
from fedlora.scenario import learning
from fedlora.scenario import sections as settings

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """A scenario's JSON Schema, draft 2020-12."""
    made: dict[str, Any] = _bounded(settings.Scenario.model_json_schema())
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "fedlora scenario"}
    sections = {**made["$defs"], "Scenario": made}
    for section, key, comment in _comments():
        if key in sections.get(section, {}).get("properties", {}):
            sections[section]["properties"][key]["description"] = comment
    sections["Data"]["properties"]["dataset"]["examples"] = sorted(settings.DATASETS)
    for section, kind in (("Strategy", "strategies"), ("Clients", "clients")):
        use = sections[section]["properties"]["use"]
        use["anyOf"] = [
            {"enum": plugins.names(kind)},  # type: ignore[arg-type]
            {"pattern": r"^[\w.]+:\w+$", "description": "a class of one's own, as module:Class"},
        ]
    return made


def _bounded(node: Any) -> Any:
    """Bounds by their names in JSON Schema; pydantic leaves them as they are behind a validator."""
    if isinstance(node, dict):
        return {_BOUNDS.get(key, key): _bounded(value) for key, value in node.items()}
    return [_bounded(item) for item in node] if isinstance(node, list) else node


def _comments() -> list[tuple[str, str, str]]:
    """Section, key and the comment on its line, for each key that has one."""
    return [found for module in (settings, learning) for found in _beside_keys(inspect.getsource(module))]


def _beside_keys(text: str) -> list[tuple[str, str, str]]:
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
