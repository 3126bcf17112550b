"""Plain data from the YAML of a scenario, with the line of each key, and from `a.b=value` overrides."""

from collections.abc import Sequence
from typing import Any

import yaml

from fedlora.errors import ScenarioError
from fedlora.scenario.keys import KeyPath, Problem, dotted


def read(text: str, file: str) -> tuple[dict[str, Any], dict[KeyPath, int], list[Problem]]:
    """Plain data from YAML, the line of each key, and what is wrong with single keys and values.

    Raises:
        ScenarioError: it is no mapping at all.
    """
    try:
        node = yaml.compose(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError) as error:
        mark, reason = getattr(error, "problem_mark", None), str(error).splitlines()[0]
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        raise ScenarioError(f"{file}:{line + 1}: not YAML: {getattr(error, 'problem', None) or reason}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ScenarioError(f"{file}:1: should be a mapping of keys to values, such as 'name: mine'")
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    return _construct(node, (), lines, problems), lines, problems


def values(overrides: Sequence[str]) -> dict[str, Any]:
    """What `a.b=value` overrides say, by key.

    Raises:
        ScenarioError: one is not written so.
    """
    told: dict[str, Any] = {}
    for override in overrides:
        said: Any = {}
        problems: list[Problem] = []
        apply(override, said, {}, problems)
        if problems:
            raise ScenarioError(f"--set {override}: {problems[0].message}")
        path = override.partition("=")[0].strip().split(".")
        for part in path:
            said = said[part]
        told[".".join(path)] = said
    return told


def apply(override: str, raw: dict[str, Any], written: dict[KeyPath, str], problems: list[Problem]) -> None:
    """Write what `a.b=value` says into `raw`; notes the key that it wrote, and what is wrong with it."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    written[path] = override
    if not equals or not all(path):
        problems.append(Problem(path, "overrides read 'key.subkey=value', such as 'privacy.epsilon=3'"))
        return
    try:
        node = yaml.compose(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError):
        problems.append(Problem(path, f"{text!r} is not a YAML value"))
        return
    section = raw
    for index, part in enumerate(path[:-1]):
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            problems.append(Problem(path, f"{dotted(path[: index + 1])} holds no keys"))
            return
        section = section[part]
    value = None if node is None else _construct(node, path, {}, problems)
    if path == ("data", "partition", "kind") and section.get("kind") != value:
        section.clear()  # another kind has other keys
    section[path[-1]] = value
    sources = {"dataset", "hub", "files"}
    if path[0] == "data" and len(path) > 1 and path[1] in sources and value is not None:
        for other in sources - {path[1]}:  # naming one source replaces the others
            raw["data"].pop(other, None)


def edited(text: str, path: Sequence[str], value: Any) -> str:
    """YAML with one key set to another value, its comments and all else as they were.

    Raises:
        LookupError: the key's section is not written there, or its value is of several lines.
    """
    node = yaml.compose(text, Loader=_Plain)
    flow = yaml.safe_dump(value, default_flow_style=True, width=2**20).partition("\n")[0]
    for depth, part in enumerate(path, start=1):
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise LookupError(part)
        found = next((held for key, held in node.value if key.value == part), None)
        if found is None and depth == len(path):
            mark = node.value[0][0].start_mark
            rest = ", " if node.flow_style else "\n" + " " * mark.column
            return f"{text[: mark.index]}{part}: {flow}{rest}{text[mark.index :]}"
        if found is None:
            raise LookupError(part)
        node = found
    if node is None or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
        raise LookupError(path[-1])  # its end is where the next key begins
    return f"{text[: node.start_mark.index]}{flow}{text[node.end_mark.index :]}"


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which can make a small file huge, and not nested without end."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read: write the value out", problem_mark=mark
            )
        if self.depth > 32:
            raise yaml.MarkedYAMLError(problem="nested more than 32 levels deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]) -> Any:
    """Plain data from a YAML node; notes each key's line, and keys that stand twice or are no text."""
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "<<"
            key = key.encode(errors="backslashreplace").decode()
            here, line = (*path, key), key_node.start_mark.line + 1
            if key in data:
                problems.append(Problem(here, f"{dotted(here)} is written twice, first on line {lines[here]}"))
            lines[here] = line
            if key == "<<":
                problems.append(Problem(here, "keys are plain words"))
            else:
                data[key] = _construct(value_node, here, lines, problems)
        return data
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_construct(item, (*path, index), lines, problems))
        return items
    try:
        return _scalar(node)
    except (ValueError, LookupError):
        shown = f"{node.value:.40}" if isinstance(node.value, str) else node.tag.replace(_TAG, "!!")
        shown = shown.encode(errors="backslashreplace").decode()
        problems.append(Problem(path, f"{dotted(path)}: {shown!r} is not plain text, a number or a list"))
        return None


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp", "value", "merge"):
        str(node.value).encode()  # half of a character cannot be written out
        return str(node.value)
    if not isinstance(node, yaml.ScalarNode) or kind not in ("int", "float", "bool", "null"):
        raise ValueError(kind)
    value: int | float | bool | None = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("too large")
    return value
