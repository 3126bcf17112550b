"""The public names, and the direction in which imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora

ROOT = Path(__file__).parent.parent
PUBLIC = """Adapter Client Event FedloraError Layout Rng Run Scenario Settings Slot Strategy Update UserError
aggregation_error load simulate weighted_mean""".split()

HEAVY = {
    "flwr": {"deploy", "engine", "privacy", "wire", "strategy"},
    "cryptography": {"deploy", "privacy"},
    "opacus": {"audit", "passes", "privacy"},
    "ray": {"engine", "sweep"},
    "flwr_datasets": {"data"},
}


def test_public_names_are_pinned():
    assert fedlora.__all__ == sorted(PUBLIC) == dir(fedlora)
    assert all(getattr(fedlora, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError):
        fedlora.nothing  # noqa: B018


def test_importing_fedlora_is_quick():
    code = "import sys, fedlora; print({'torch', 'ray', 'numpy', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"


def modules():
    for file in sorted((ROOT / "fedlora").rglob("*.py")):
        parts = file.relative_to(ROOT / "fedlora").with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, ()) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, tuple(a.name for a in node.names)


@pytest.mark.parametrize("unit, file", [pytest.param(*m, id=m[1].stem) for m in modules()])
def test_heavy_libraries_stay_in_their_rooms(unit, file):
    for module, _ in imported(file):
        top = module.partition(".")[0]
        if top in HEAVY:
            assert unit in HEAVY[top], f"{file} imports {top}"


@pytest.mark.parametrize("name", ["strategies", "clients"])
def test_a_second_copy_under_the_bare_name_is_refused(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"import fedlora.{name}, not {name}" in done.stderr
