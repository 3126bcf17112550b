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

# From the bottom up; a module imports from its own layer or from those before it.
LAYERS = [
    {"compression", "errors", "lock", "seeding", "factors", "quantized"},
    {"plugins"},
    {"scenario"},
    {"adapter", "data", "lowrank", "packing", "prefix", "privacy", "secure", "task", "world"},
    {"wire"},
    {"central", "client", "fused", "strategy"},
    {"checkpoint", "ledger"},
    {"run", "report"},
    {"engine"},
    {"budget", "pace", "progress", "rounds"},
    {"simulation"},
    {"plan", "export", "schema", "sweep", "deploy"},
    {"audit", "scaffold"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
HEAVY = {
    "flwr": {"deploy", "engine", "secure", "wire", "strategy"},
    "cryptography": {"deploy", "secure"},
    "opacus": {"audit", "clients", "privacy"},
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
def test_imports_point_one_way(unit, file):
    for module, names in imported(file):
        top, _, rest = module.partition(".")
        if top == "fedlora":
            targets = {rest.split(".")[0]} if rest else {n for n in names if n in LEVEL}
            if unit in ("strategies", "clients", "scenarios"):
                assert not targets & {"engine", "rounds", "simulation", "cli"}, f"{file} imports {targets}"
            else:
                assert all(LEVEL[t] <= LEVEL[unit] for t in targets), f"{file} imports {targets}"
        elif top in HEAVY:
            assert unit in HEAVY[top], f"{file} imports {top}"


@pytest.mark.parametrize("name", ["strategies", "clients"])
def test_a_second_copy_under_the_bare_name_is_refused(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"import fedlora.{name}, not {name}" in done.stderr
