"""How a mistake that pydantic found is told: the key as it is written, what is wrong, what to write instead."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedlora import plain
from fedlora.errors import suggestion
from fedlora.scenario.bits import QUANTIZE
from fedlora.scenario.clients import Ranks
from fedlora.scenario.compression import Packed
from fedlora.scenario.data import Partition
from fedlora.scenario.head import HEADS
from fedlora.scenario.keeping import KEPT
from fedlora.scenario.keys import KeyPath, Problem, dotted
from fedlora.scenario.learning import TAGS
from fedlora.scenario.section import sections
from fedlora.scenario.sections import Scenario
from fedlora.scenario.world import Availability


def explain(at: KeyPath, detail: ErrorDetails, raw: object, root: type[BaseModel] = Scenario) -> Problem:
    """One pydantic error as a line that names the key as it is written in the file.

    Args:
        at: the section that was checked; empty: the whole file.
        detail: the error.
        raw: what is written there.
        root: what the file is of.
    """
    path: list[str | int] = [*at]
    here: Any = raw
    for part in detail["loc"]:
        if isinstance(here, dict) and part not in here and part == here.get("kind"):
            continue  # pydantic's name for a branch of a union, not a key
        if part in (*TAGS, *KEPT, *HEADS, *QUANTIZE):
            continue
        inside = isinstance(here, dict) and part in here
        inside = inside or (isinstance(here, list) and isinstance(part, int) and part < len(here))
        if not inside and detail["type"] != "missing":
            break
        path.append(part)
        here = here[part] if inside else None
    key, kind = dotted(path), detail["type"]
    if kind == "extra_forbidden":
        fields = _fields(path[:-1], {at[0]: raw} if at else raw, root)
        place = f" in {dotted(path[:-1])}" if path[:-1] else ""
        return Problem(tuple(path), f"unknown key {path[-1]!r}{place}: {meant(path, fields)}")
    if kind == "missing":
        return Problem(tuple(path[:-1]), f"{key} is missing")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = detail["ctx"].get("tag")
        known = [tag.strip("'") for tag in str(detail["ctx"].get("expected_tags", "")).split(", ")]
        known = known if given or path[-1] not in _UNIONS else _kinds(_UNIONS[str(path[-1])])
        what = f"unknown kind {given!r}: {suggestion(str(given), known)}"
        what = what if given else f"needs a kind, one of {', '.join(known)}"
        return Problem((*path, "kind"), f"{key}: {what}")
    if kind == "model_attributes_type" and path[-1] in _UNIONS:
        known = _kinds(_UNIONS[str(path[-1])])
        one = here if here in known else known[0]
        return Problem(tuple(path), f"{key}: should be a mapping with a kind, such as {{kind: {one}}}")
    own = kind in ("unknown", "source", "cohort", "target", "shares", "pattern") or isinstance(here, dict)
    return Problem(tuple(path), f"{key}: {plain.words(detail)}{'' if own else f', not {plain.shown(here)}'}")


def meant(path: Sequence[str | int], known: Mapping[str, FieldInfo]) -> str:
    """What to write instead of an unknown key: one of that name a section deeper, else the nearest."""
    *place, name = path
    deeper = [
        repr(dotted((*place, key, name)))
        for key, field in known.items()
        if any(name in section.model_fields for section in sections(field.annotation))
    ]
    return f"did you mean {' or '.join(deeper)}?" if deeper else suggestion(str(name), known)


_UNIONS = {"ranks": Ranks, "partition": Partition, "up": Packed, "availability": Availability}


def _kinds(union: Any) -> list[str]:
    return [str(k) for c in get_args(get_args(union)[0]) for k in get_args(c.model_fields["kind"].annotation)]


def _fields(path: Sequence[str | int], raw: object, root: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """The keys that the section at `path` knows."""
    cls, here = root, raw
    for part in path:
        here = here.get(part, {}) if isinstance(here, dict) else {}
        field = cls.model_fields.get(str(part))
        if not (options := list(sections(field.annotation)) if field else []):
            continue  # a name of the user's own, such as a tier's
        kind = here.get("kind") if isinstance(here, dict) else None
        cls = next((c for c in options if "kind" in c.model_fields and kind in _literals(c)), options[0])
    return cls.model_fields


def _literals(cls: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(cls.model_fields["kind"].annotation)
