"""Templates of prompts: text with names of columns in braces, such as `Question: {question}`; `{{` is a brace."""

import re
from collections.abc import Mapping

_PART = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")


def columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once, in their order.

    Raises:
        ValueError: a brace stands alone, or a pair of them names nothing.
    """
    found: list[str] = []
    for part in _PART.finditer(template):
        if part[0] in ("{", "}"):
            raise ValueError(f"a {part[0]} stands alone: write {part[0] * 2} for the sign itself")
        if part[0] not in ("{{", "}}"):
            if not part[1].strip():
                raise ValueError("{} names no column")
            found.append(part[1])
    return tuple(dict.fromkeys(found))


def filled(template: str, row: Mapping[str, str]) -> str:
    """A template with a row's values, which are taken as they are.

    A line whose columns are all empty is left out, and so is a paragraph, with its heading: what stands between
    blank lines.
    """
    made = []
    for paragraph in template.split("\n\n"):
        if _says(paragraph, row):
            made.append("\n".join(_put(line, row) for line in paragraph.split("\n") if _says(line, row)))
    return "\n\n".join(made)


def _says(text: str, row: Mapping[str, str]) -> bool:
    """Whether a text names no column, or one that has something."""
    named = columns(text)
    return not named or any(row[name].strip() for name in named)


def _put(text: str, row: Mapping[str, str]) -> str:
    return _PART.sub(lambda part: part[0][0] if part[1] is None else row[part[1]], text)
