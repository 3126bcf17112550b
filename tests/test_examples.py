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


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run_in_a_kernel(file, tmp_path):
    """As a person runs them: on the scenario that ships, in Jupyter."""
    import nbclient
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.source: cell.outputs[-1].data for cell in notebook.cells if cell.cell_type == "code"}
    assert "vega" in shown["run.plot()"]["text/html"]
    assert "epsilon" in shown['run.frame("clients").groupby("client")[["epsilon", "seconds"]].max()']["text/html"]
