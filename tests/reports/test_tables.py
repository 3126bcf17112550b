"""Tables in every form, worked by hand."""

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from fedlora.reports.tables import Table, filled

SMALL = Table(("name", "n"), (("a_b|c", "5 %"), ("d", "10")))


def test_text_aligns_words_left_and_numbers_right():
    assert SMALL.text() == ["  name     n", "  a_b|c  5 %", "  d       10"]


def test_a_text_is_filled_under_its_head():
    assert filled("word " * 25, "  key  ", 7) == [
        f"  key  {' '.join(['word'] * 21)}",
        f"       {' '.join(['word'] * 4)}",
    ]
    assert filled("") == [] and filled("a b", " " * 113, 113) == [" " * 113 + "a b"]  # 40 letters have room


def test_markdown_and_latex_escape_what_would_break_them():
    assert SMALL.markdown() == "| name | n |\n| :-- | --: |\n| a_b\\|c | 5 % |\n| d | 10 |"
    latex = SMALL.latex().splitlines()
    assert latex[0] == r"\begin{tabular}{lr}" and latex[4] == r"a\_b|c & 5 \% \\"
    assert latex[1:4:2] == [r"\toprule", r"\midrule"] and latex[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_html_escapes_and_names_its_headers():
    told = Table(("a",), (("<b>&",),)).html("what <it> is")
    assert "<caption>what &lt;it&gt; is</caption>" in told and '<th scope="row">&lt;b&gt;&amp;</th>' in told


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_csv_reads_back(rows):
    rows = [tuple(cell.replace("\r", "") for cell in row) for row in rows]
    assert [tuple(r) for r in csv.reader(io.StringIO(Table(("x", "y"), rows).csv(), newline=""))][1:] == rows
