"""One table in the forms that people paste: a terminal, Markdown, LaTeX, HTML, CSV."""

import csv
import io
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "{": r"\{"}
_LATEX |= {"}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}

WIDE = 115  # characters of a line that is filled
_LEAST = 40  # of its text, however much stands before it


def filled(text: str, head: str = "", indent: int = 4) -> list[str]:
    """A text in lines of a terminal that are filled, none where it is empty.

    Args:
        text: in one line.
        head: what stands before the first.
        indent: spaces before each further one.
    """
    wide, further = max(WIDE, len(head) + _LEAST), " " * indent
    return textwrap.wrap(
        text,
        wide,
        initial_indent=head,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        head: the names of the columns.
        rows: cells, as many in each row as there are columns.
        left: columns of words, aligned left; the others are numbers, aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = field(default=frozenset({0}))

    def text(self, indent: str = "  ") -> list[str]:
        """Lines for a terminal."""
        wide = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        return [
            indent
            + "  ".join(
                cell.ljust(wide[i]) if i in self.left else cell.rjust(wide[i]) for i, cell in enumerate(row)
            ).rstrip()
            for row in (self.head, *self.rows)
        ]

    def markdown(self) -> str:
        """A pipe table."""
        rule = [":--" if i in self.left else "--:" for i in range(len(self.head))]
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (self.head, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))

    def latex(self) -> str:
        """A `tabular` with the rules of the booktabs package."""
        align = "".join("l" if i in self.left else "r" for i in range(len(self.head)))
        lines = [
            " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in row) + r" \\"
            for row in (self.head, *self.rows)
        ]
        body = [lines[0], r"\midrule", *lines[1:]]
        return "\n".join([rf"\begin{{tabular}}{{{align}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])

    def html(self, caption: str = "") -> str:
        """A `table` element; the first cell of a row is its header."""
        kinds = ["" if i in self.left else ' class="number"' for i in range(len(self.head))]
        head = "".join(f'<th scope="col"{kind}>{escape(c)}</th>' for c, kind in zip(self.head, kinds, strict=True))
        rows = "".join(
            "<tr>"
            + f'<th scope="row"{kinds[0]}>{escape(row[0])}</th>'
            + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        told = f"<caption>{escape(caption)}</caption>" if caption else ""
        return f"<table>{told}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def csv(self) -> str:
        """Comma-separated values, with a header."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, as a cell."""
    if not values:
        return "not measured"
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
