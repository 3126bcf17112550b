"""What mkdocs asks for while it builds the site: the page of keys, out of the schema."""

from typing import Any

from fedlora import reference

MARK = "<!-- reference -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of keys in the place of their mark."""
    return markdown.replace(MARK, "\n".join(reference.page())) if MARK in markdown else markdown
