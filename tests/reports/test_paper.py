"""Charts as files for a paper."""

import re

import pytest
from PIL import Image

from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.reports import charts, paper
from fedlora.reports.charts import Figure

ROWS = [{"round": n, "accuracy": 0.5 + n / 10} for n in range(1, 4)]
CHART = charts.lines(ROWS, ("round", "round"), ("accuracy", "accuracy"))
FIGURE = Figure("Accuracy by round, of 3", "A note.", CHART)


def test_a_figure_is_three_files_of_a_columns_width(tmp_path):
    svg, pdf, png = paper.draw([FIGURE], tmp_path / "figures")
    assert [f.name for f in (svg, pdf, png)] == [f"accuracy-by-round-of-3.{e}" for e in ("svg", "pdf", "png")]
    assert re.search(r'<svg[^>]* width="234"', svg.read_text())
    left, _, right, _ = map(float, re.search(rb"/MediaBox *\[([^\]]*)\]", pdf.read_bytes())[1].split())
    assert right - left == 234  # points: 3.25 inches
    with Image.open(png) as image:
        assert image.width == 974  # 3.25 inches of 300 dots are 975


def test_the_dashed_line_stands_in_the_legend(tmp_path):
    rows = [{"round": r, "accuracy": r / 10, charts.MAJORITY: 0.4} for r in (1, 2)]
    chart = charts.lines(rows, ("round", "round"), ("accuracy", "accuracy"), rule=charts.MAJORITY)
    (svg, *_) = paper.draw([charts.Figure("Dashes", "", chart)], tmp_path)
    assert ">commonest label</text>" in svg.read_text() and 'stroke-dasharray="4,4"' in svg.read_text()


def test_colours_are_those_of_light_pages(tmp_path):
    svg = paper.draw([FIGURE], tmp_path)[0].read_text()
    assert "var(" not in svg and "#0b6e75" in svg and "#55c2c0" not in svg


def test_a_file_in_the_way_is_a_line(tmp_path):
    (tmp_path / "figures").write_text("")
    with pytest.raises(UserError, match="figures: cannot be written: "):
        paper.draw([FIGURE], tmp_path / "figures")


def test_report_and_compare_write_them(ten, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(ten.folder), "--out", "page.html", "--figures", "one"]) == 0
    assert main(["compare", str(ten.folder), "--figures", "several"]) == 0
    capsys.readouterr()
    assert (tmp_path / "one/epsilon-by-round.pdf").read_bytes().startswith(b"%PDF")
    assert list((tmp_path / "several").glob("*.svg"))
