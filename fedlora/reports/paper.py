"""Charts as files for a paper: SVG, PDF and PNG, as wide as a column."""

import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.reports.charts import Figure
from fedlora.reports.page import CONFIG

COLUMN = 234  # points, which are 3.25 inches: a column of a page of two
_HEIGHT = 140  # points of what is drawn, without its legend
_FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_DOTS = 300  # of an inch of a PNG; a point is a 72nd of an inch


def draw(figures: Iterable[Figure], folder: str | Path) -> list[Path]:
    """Write each figure as `<its title>.svg`, `.pdf` and `.png` (300 dots an inch), in the colours of light pages.

    Args:
        figures: of `fedlora.reports.figures.figures` or `Comparison.figures`.
        folder: made where it is missing; files of the same names are written over.

    Returns:
        The files, those of a figure together.

    Raises:
        UserError: a file cannot be written.
    """
    import vl_convert

    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            spec = _spec(figure)
            stem = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")
            for ending, made in (
                ("svg", vl_convert.vegalite_to_svg(spec).encode()),
                ("pdf", vl_convert.vegalite_to_pdf(spec)),
                ("png", vl_convert.vegalite_to_png(spec, scale=_DOTS / 72, ppi=72)),
            ):
                file = folder / f"{stem}.{ending}"
                file.write_bytes(made)
                written.append(file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return written


def _spec(figure: Figure) -> dict[str, Any]:
    """A chart by itself: of a column's width, with colours by their numbers."""
    spec = figure.chart.properties(width=COLUMN).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["height"] = min(spec.get("height", _HEIGHT), _HEIGHT)
    sizes = {"labelFontSize": 7, "titleFontSize": 8, "titlePadding": 4}
    axis, legend = ({**CONFIG[part], **sizes} for part in ("axis", "legend"))
    axis["labelSeparation"] = 4
    legend |= {"labelLimit": 110, "symbolSize": 40, "gradientLength": 120, "gradientThickness": 8}
    line = {**CONFIG["line"], "strokeWidth": 1.2}
    spec["config"] = {**CONFIG, "font": _FONT, "axis": axis, "legend": legend, "line": line}
    colours = _colours()
    read: dict[str, Any] = json.loads(re.sub(r"var\((--\w+)\)", lambda name: colours[name[1]], json.dumps(spec)))
    read["background"] = "white"
    return read


def _colours() -> dict[str, str]:
    """The colours of page.css by name, as light pages have them: the first of each name."""
    found: Sequence[tuple[str, str]] = re.findall(
        r"(--\w+):\s*(#[0-9a-f]+)", files("fedlora.reports").joinpath("page.css").read_text()
    )
    return dict(reversed(found))
