"""What mkdocs asks for while it builds the site: the scenarios reference, out of the JSON Schema."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.scenario.schema import schema

MARK = "<!-- reference -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference in the place of its mark."""
    return markdown.replace(MARK, "\n".join(reference())) if MARK in markdown else markdown


def reference() -> Iterator[str]:
    """A table of keys for each section of a scenario, in the order in which sections name each other."""
    whole = schema()
    order = ["Scenario"]
    for name in order:  # grows while it is read
        section = whole if name == "Scenario" else whole["$defs"][name]
        order += [other for other in dict.fromkeys(_named(section["properties"])) if other not in order]
        yield from ("", f"### {name}", "", section.get("description", ""), "")
        yield from ("| key | what it may be | default | |", "|---|---|---|---|")
        for key, told in section["properties"].items():
            default = "*needed*" if key in section.get("required", ()) else f"`{json.dumps(told.get('default'))}`"
            default = "see there" if isinstance(told.get("default"), dict) else default
            cells = (f"`{key}`", _kind(told), default, told.get("description", ""))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _named(node: Any) -> Iterator[str]:
    """Sections that a part of the schema refers to, each as often as it does."""
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        node = [value for key, value in node.items() if key != "discriminator"]
    if isinstance(node, list):
        for item in node:
            yield from _named(item)


def _kind(told: Mapping[str, Any]) -> str:
    """The values that a key takes, in a few words."""
    if "$ref" in told:
        name = told["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in told:
            return " or ".join(dict.fromkeys(map(_kind, told[several])))
    if "enum" in told or "const" in told:
        return ", ".join(f"`{value}`" for value in told.get("enum", [told.get("const")]))
    if "pattern" in told and "description" in told:
        return str(told["description"])
    if told.get("type") == "array":
        inner = _kind(told["items"]) if "items" in told else "anything"
        return f"list of: {inner}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    told_bounds = [
        f"{word} {told[key]:g}" for key, word in bounds.items() if key in told and abs(told[key]) < 1e15
    ]
    return ", ".join([words.get(told.get("type", "any"), told.get("type", "anything")), *told_bounds])
