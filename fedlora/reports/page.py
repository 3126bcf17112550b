"""One self-contained HTML page: styles, the plotting library and the data stand in the file itself."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.reports.charts import HEAT_STEPS, Figure

_AXIS = {
    "labelColor": "var(--muted)",
    "titleColor": "var(--muted)",
    "titleFontWeight": 500,
    "titlePadding": 8,
    "domainColor": "var(--rule)",
    "tickColor": "var(--rule)",
    "gridColor": "var(--grid)",
}
_LEGEND = {"labelColor": "var(--ink)", "titleColor": "var(--muted)", "titleFontWeight": 500, "titleLimit": 400}
# Colours are variables of page.css, so that light, dark and print are its business alone.
CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {**_AXIS, "labelFontSize": 12, "titleFontSize": 12},
    "legend": {**_LEGEND, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 320},
    "line": {"strokeWidth": 2.25, "color": "var(--s1)"},
    "point": {"color": "var(--s1)"},
    "area": {"color": "var(--s1)"},
    "bar": {"color": "var(--s1)"},
    "range": {
        "category": [f"var(--s{i})" for i in range(1, 7)],
        "ramp": [f"var(--h{i})" for i in range(1, HEAT_STEPS + 1)],
        "heatmap": [f"var(--h{i})" for i in range(1, HEAT_STEPS + 1)],
        "ordinal": [f"var(--h{i})" for i in range(1, HEAT_STEPS + 1)],
    },
}


class Page:
    """A page that is put together piece by piece, then rendered."""

    def __init__(self, title: str, kicker: str, lead: str) -> None:
        """Begin with a title, the small line above it, and a sentence under it."""
        self.title = title
        self._head = (
            f'<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        )
        self._body: list[str] = []
        self._charts: dict[str, Any] = {}
        self._ids = count(1)

    def notices(self, sentences: Sequence[str]) -> None:
        """What a reader has to know first."""
        if sentences:
            items = "".join(f"<li>{escape(s)}</li>" for s in sentences)
            self._head += f'<ul class="notices">{items}</ul>'

    def key_figures(self, figures: Iterable[tuple[str, str, str]]) -> None:
        """Large figures: a name, a value, and a word on it."""
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(word)}</small></dd></div>"
            for name, value, word in figures
        )
        self._head += f'<dl class="figures-of-run">{items}</dl>'

    def section(self, title: str, *pieces: str) -> None:
        """A heading and what stands under it, as HTML."""
        self._body.append(f"<section><h2>{escape(title)}</h2>{''.join(pieces)}</section>")

    def figures(self, figures: Sequence[Figure]) -> str:
        """Charts side by side where there is room."""
        return f'<div class="grid">{"".join(map(self._figure, figures))}</div>' if figures else ""

    def _figure(self, figure: Figure) -> str:
        name = f"figure-{next(self._ids)}"
        spec = figure.chart.properties(description=f"{figure.title}. {figure.note}").to_dict()
        spec["config"] = CONFIG
        self._charts[name] = {"title": figure.title, "spec": spec}
        return (
            f'<figure id="{name}">'
            f"<figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.note)}</p></figcaption>"
            f'<div class="plot"></div><div class="tools"><button type="button">Copy as CSV</button>'
            f'<details><summary>Figures as a table</summary><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(figure.title)}, as a table"></div></details></div></figure>'
        )

    def render(self, foot: str) -> str:
        """The whole page."""
        import vl_convert

        here = files("fedlora.reports")
        library = vl_convert.javascript_bundle() if self._charts else ""  # type: ignore[call-arg]
        data = json.dumps(self._charts, separators=(",", ":")).replace("<", "\\u003c")
        script = here.joinpath("page.js").read_text() if self._charts else ""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{here.joinpath('page.css').read_text()}</style></head>"
            f"<body><header>{self._head}</header><main>{''.join(self._body)}</main>"
            f"<footer><p>{escape(foot)}</p></footer>"
            f'<script type="application/json" id="charts">{data}</script>'
            f"<script>{library}</script><script>{script}</script></body></html>\n"
        )


def scrolled(table: str, name: str) -> str:
    """A wide or long table in a frame that scrolls."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def save(html: str, file: Path) -> None:
    """Write a page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
