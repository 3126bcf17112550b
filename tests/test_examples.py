"""Example notebooks run from top to bottom."""

import json
from pathlib import Path

import pytest

from fedlora import scenario

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run_from_top_to_bottom(file, tiny, monkeypatch):
    """Cell by cell, on the tiny scenario in the place of the shipped one."""
    monkeypatch.setattr(scenario, "load", lambda name, overrides=(): tiny())
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] for cell in cells)
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"{file.name}, {cell['id']}", "exec"), names)
    assert names["planned"].bytes_up_total == names["run"].summary["bytes_up_total"]
    assert (names["run"].folder / "report.html").exists()
