"""What each key of a scenario and of a site file is: what `fedlora explain` prints, and the site's page of keys.

A key is named by its dotted path, as in `--set`. Below a mapping with names of one's own, such as `clients.tiers`,
any name goes, and `NAME` stands for it. Keys of a site file begin with `site`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from fedlora.deploy.site import Site
from fedlora.errors import UserError, suggestion
from fedlora.reports.tables import filled
from fedlora.scenario.schema import described, schema

MANY = 24  # names beyond which a table of values gives their number
SITE = "site"
OTHER = "any other"  # kind of a section that takes what the others do not

_TYPES = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


class Key(NamedTuple):
    """A key, in one of the places where it may stand.

    Attributes:
        path: Its dotted path.
        section: The section that has it, by the name of its class.
        of: Kinds of that section, where a place may hold one of several; else empty.
        told: Its JSON Schema.
        needed: Whether it must be given.
    """

    path: str
    section: str
    of: str
    told: Mapping[str, Any]
    needed: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def default(self) -> str:
        """What holds where it is left out, in YAML; or `required`, or `depends`, on other keys."""
        if self.needed or "Unset: " in self.told["description"]:
            return "required" if self.needed else "depends"
        return written(self.told.get("default"))

    @property
    def example(self) -> str:
        """A value, in YAML: an example of the schema, else the default or the first of the values."""
        if examples := self.told.get("examples"):
            return written(examples[0])
        options = [part for part in (self.told, *self.told.get("anyOf", ())) if {"enum", "const"} & part.keys()]
        if self.told.get("default") is None and options:
            return written(options[0].get("const", options[0].get("enum", [None])[0]))
        return written(self.told.get("default"))

    @property
    def line(self) -> str:
        """The example as a line of YAML, such as `clients: {lr: 2.0}`, with the kind of its section."""
        *outer, last = self.path.removeprefix(SITE).lstrip(".").split(".")
        kind = self.of.split(" or ")[0]
        inner = f"{last}: {self.example}"
        if kind not in ("", OTHER) and last != "kind":
            inner = f"kind: {kind}, {inner}"
        for part in reversed(outer):
            inner = f"{part}: {{{inner}}}"
        return inner

    @property
    def first(self) -> str:
        """The first sentence of its description, or of its first sentence what is before a colon."""
        return str(self.told["description"]).split(". ")[0].removesuffix(".")


class Reference:
    """All keys below a root."""

    def __init__(self, root: Mapping[str, Any], name: str, prefix: str = "") -> None:
        self.sections: dict[str, Mapping[str, Any]] = {**root.get("$defs", {}), name: root}
        self.root, self.prefix = name, prefix
        self.keys = list(self._walk(prefix, [name], ()))
        self.places = {name: [prefix]}  # of each section, in the order of the keys
        for key in self.keys:
            for section in within(key.told):
                if (place := _inside(key)) not in self.places.setdefault(section, []):
                    self.places[section].append(place)

    def of(self, place: str, sections: list[str]) -> Iterator[Key]:
        """The keys of the sections that a place may hold."""
        for section in sections:
            told, kind = self.sections[section], kinds(self.sections[section])
            for key, one in told["properties"].items():
                yield Key(
                    f"{place}.{key}" if place else key,
                    section,
                    kind if len(sections) > 1 else "",
                    one,
                    key in told.get("required", ()),
                )

    def find(self, path: str) -> list[Key]:
        """A key by its path, in each section that may stand there.

        Raises:
            UserError: there is none, with what may be meant.
        """
        here, found, own = [self.root], [], False
        place = self.prefix
        for part in path.removeprefix(self.prefix).lstrip(".").split("."):
            if own:  # a name such as a tier's
                place, own = f"{place}.{part}", False
                continue
            keys = list(self.of(place, here))
            if not (found := [key for key in keys if key.name == part]):
                raise UserError(self._unknown(part, place, keys))
            place = found[0].path
            here = list(dict.fromkeys(name for key in found for name in within(key.told)))
            own = bool(here) and any(_inside(key) != key.path for key in found)
        return found

    def _unknown(self, part: str, place: str, keys: list[Key]) -> str:
        elsewhere = [key.path for key in self.keys if key.name == part]
        if elsewhere:
            meant = f"did you mean {' or '.join(map(repr, dict.fromkeys(elsewhere)))}?"
        else:
            meant = suggestion(part, {key.name for key in keys}) if keys else "it has no keys of its own"
        return f"unknown key {part!r}{f' in {place}' if place else ''}: {meant}"

    def _walk(self, place: str, sections: list[str], above: tuple[str, ...]) -> Iterator[Key]:
        """All keys below a place; a section that is within itself is not entered again."""
        for key in self.of(place, sections):
            yield key
            inner = [name for name in within(key.told) if name not in (*above, *sections)]
            yield from self._walk(_inside(key), inner, (*above, *sections))


def scenarios() -> Reference:
    """The keys of a scenario."""
    return Reference(schema(), "Scenario")


def sites() -> Reference:
    """The keys of a site file."""
    return Reference(described(Site), "Site", SITE)


def _inside(key: Key) -> str:
    """Where the keys within a key are."""
    own = any("additionalProperties" in branch for branch in branches(key.told))
    return f"{key.path}.NAME" if own else key.path


def branches(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a key may be: one schema, or several."""
    inner = [part for several in ("anyOf", "oneOf", "allOf") for part in told.get(several, ())]
    if not inner:
        yield told
    for part in inner:
        yield from branches(part)


def within(told: Mapping[str, Any]) -> list[str]:
    """The sections that a key may hold, by the names of their classes."""
    parts = [
        part["additionalProperties"] if isinstance(part.get("additionalProperties"), Mapping) else part
        for part in branches(told)
    ]
    return list(dict.fromkeys(part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part))


def kinds(section: Mapping[str, Any]) -> str:
    """The kinds of a section, where `kind` tells it from others in its place."""
    told = section["properties"].get("kind", {})
    return " or ".join(told.get("enum", [told["const"]] if "const" in told else [OTHER])) if told else ""


def written(value: Any) -> str:
    """A value as YAML on one line."""
    made: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return made.removesuffix("...\n").strip()


def values(told: Mapping[str, Any], page: Mapping[str, Any] | None = None) -> str:
    """The values that a key takes, in words: type and range.

    Args:
        told: the schema of the key.
        page: the sections that links of a page in Markdown go to; None: plain text.
    """
    code = "`{}`" if page else "{}"
    if "$ref" in told:
        name = told["$ref"].rpartition("/")[2]
        return f"[mapping](#{name.lower()})" if page else "mapping"
    if not {"anyOf", "oneOf", "allOf"}.isdisjoint(told):
        parts = [values(part, page) for part in branches(told)]
        if page and len(sections := within(told)) > 1:  # which differ by their kind
            links = [f"[{kinds(page[name])}](#{name.lower()})" for name in sections]
            parts = [*links, *(part for part in parts if not part.startswith("[mapping]"))]
        return " or ".join(dict.fromkeys(parts))
    if "enum" in told or "const" in told:
        named = told.get("enum", [told.get("const")])
        return f"one of {len(named)} names" if len(named) > MANY else ", ".join(code.format(n) for n in named)
    if "pattern" in told and "type" not in told:
        return str(told["description"])
    if told.get("type") == "null":
        return code.format("null")
    if told.get("type") == "array":
        inner = [values(part, page) for part in told.get("prefixItems", [told.get("items", {})])]
        return f"list of: {', '.join(dict.fromkeys(inner))}"
    if isinstance(told.get("additionalProperties"), Mapping):
        return f"mapping of names to: {values(told['additionalProperties'], page)}"
    bounds = [f"{word} {told[key]:g}" for key, word in _BOUNDS.items() if abs(told.get(key, 1e15)) < 1e15]
    kind = _TYPES.get(told.get("type", ""), told.get("type", "anything"))
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


def lines(path: str | None) -> Iterator[str]:
    """What `fedlora explain` prints: of all sections, of one, or of a key.

    Args:
        path: a dotted key, as in `--set`; None: the keys at the top.

    Raises:
        UserError: there is no such key.
    """
    if not path:
        yield "Keys of a scenario. `fedlora explain KEY` explains one, such as clients or clients.lr:"
        yield from _table(list(scenarios().of("", ["Scenario"])))
        yield f"Keys of a site file: `fedlora explain {SITE}`"
        return
    path = path.partition("=")[0].strip()
    path, all_keys = _holder(path)
    if path == all_keys.prefix:
        yield all_keys.sections[all_keys.root]["description"]
        yield from _table(list(all_keys.of(path, [all_keys.root])))
        return
    for number, key in enumerate(all_keys.find(path)):
        yield from ([""] if number else [])
        yield from _explained(key, all_keys)


def _holder(path: str) -> tuple[str, Reference]:
    """A key's path, and the keys that it is of: a site file's, where a scenario has none of that name.

    Raises:
        UserError: neither has one, or a section of site files has it.
    """
    ours, theirs = scenarios(), sites()
    if path.split(".")[0] == SITE:
        return path, theirs
    try:
        ours.find(path)
    except UserError:
        if any(key.path == f"{SITE}.{path}" or key.name == path for key in theirs.keys):
            theirs.find(f"{SITE}.{path}")
            return f"{SITE}.{path}", theirs
        raise
    return path, ours


def _explained(key: Key, all_keys: Reference) -> Iterator[str]:
    yield key.path + (f" ({SITE} file)" if all_keys.prefix else "") + (f", kind: {key.of}" if key.of else "")
    yield from _under(key.told["description"], "  ")
    yield from _under(values(key.told), "  values:   ")
    yield from _under(key.default, "  default:  ")
    yield from _under(key.line, "  example:  ")
    others = [f"{place}.{key.name}".lstrip(".") for place in all_keys.places[key.section]]
    others = [other for other in others if not re.fullmatch(other.replace("NAME", "[^.]+"), key.path)]
    if others:
        yield from _under(", ".join(others), "  also as:  ")
    near = [other.name for other in all_keys.of("", [key.section]) if other.name != key.name]
    if near:
        yield from _under(", ".join(near), "  beside:   ")
    for section in within(key.told):
        told = all_keys.sections[section]
        yield ""
        yield from _under(told["description"], "  ")
        yield from _table(list(all_keys.of(key.path, [section])))
        if told.get("additionalProperties") is True:
            named = "use" if "use" in told["properties"] else "kind"
            yield f"  Further keys are options of what {key.path}.{named} names."


def _table(keys: list[Key]) -> Iterator[str]:
    """A line for each key: its name, its default and what it is."""
    wide = max(len(key.name) for key in keys)
    for key in keys:
        default = key.default if len(key.default) <= 14 else "..."
        yield from _under(key.first, f"  {key.name:<{wide}}  {default:<14}  ")


def _under(text: str, head: str) -> list[str]:
    """Lines of a text that begin under each other, beside a head."""
    return filled(text, head, len(head))


def page() -> Iterator[str]:
    """The tables of the site's page, in Markdown: the sections of a scenario, then those of a site file."""
    done: set[str] = set()  # sections on the page
    for title, all_keys in (("Scenario", scenarios()), ("Site file", sites())):
        yield from ("", f"## {title}")
        for section, places in all_keys.places.items():
            if section not in done:
                done.add(section)
                yield from _section(section, places, all_keys)


def _section(section: str, places: list[str], all_keys: Reference) -> Iterator[str]:
    told = all_keys.sections[section]
    place = places[0].removeprefix(all_keys.prefix).lstrip(".")
    title = f"`{place}`" if place else "Keys at the top"
    keys = list(all_keys.of(places[0], [section]))
    kind = next((key.of for key in all_keys.keys if key.section == section and key.of), "")
    yield from ("", f"### {title}{f', kind {kind}' if kind else ''} {{#{section.lower()}}}", "")
    yield told["description"]
    if len(places) > 1:
        yield from ("", f"The same keys stand at {', '.join(f'`{other}`' for other in places[1:])}.")
    yield from ("", "| key | values | default | what it is, and when to change it |", "|---|---|---|---|")
    for key in keys:
        default = key.default if key.default in ("required", "depends") else f"`{key.default}`"
        default = "see there" if default[1] == "{" else default
        more = f" Example: `{key.example}`." if "examples" in key.told else ""
        cells = (f"`{key.name}`", values(key.told, all_keys.sections), default, key.told["description"] + more)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
