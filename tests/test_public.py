"""The public names, and the direction in which imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora
from fedlora import plugins

ROOT = Path(__file__).parent.parent
PUBLIC = """Adapter Client Encoded Event Examples FedloraError Kind Layout Part Partition Pass Rng Rows Run
Scenario Settings Slot Stepwise Strategy Task Update UserError aggregation_error compare compress evaluate export
generate load load_adapter plan predict report simulate weighted_mean""".split()

HEAVY = {
    "flwr": {"deploy", "engine", "privacy", "wire", "wire_base", "strategy", "traffic"},
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


def test_a_function_is_not_hidden_by_a_module_of_its_name():
    for _, file in modules():
        if (name := file.stem) in PUBLIC:
            assert file.parent.name != "fedlora", f"{file} hides fedlora.{name}"


def test_importing_fedlora_is_quick():
    code = "import sys, fedlora; print({'torch', 'ray', 'numpy', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"


def modules():
    """The room and the file of each module."""
    for file in sorted((ROOT / "fedlora").rglob("*.py")):
        parts = file.relative_to(ROOT / "fedlora").with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file


def imported(file):
    """Modules and names that a file imports anywhere, for types too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, ()) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, tuple(a.name for a in node.names)


def imports():
    """Of each module of fedlora those of fedlora that it imports."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for _, f in modules()}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found = {}
    for name, file in files.items():
        within = {
            f"{module}.{n}" if f"{module}.{n}" in files else module for module, ns in imported(file) for n in ns
        }
        found[name] = {other for other in within if other in files and other != name}
    return found


def circle(graph):
    """Names that lead from one back to itself; empty where there are none."""
    done = set()

    def walk(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_imports_form_levels():
    found = circle(imports())
    assert not found, "a circle: " + " -> ".join(found)


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


# What comes in by name: nothing of the framework imports one, but what it is about itself.
BY_NAME = {
    "strategies": {"strategies"},
    "clients": {"clients"},
    "tasks": {"tasks"},
    "kinds": {"kinds"},
    "schedules": {"schedules"},
    "compressors": {"compressors"},
}
NOT_BY_NAME = {"fedlora.kinds.lora": "the kind that is meant where none is said"}


@pytest.mark.parametrize("shelf", BY_NAME)
def test_plug_ins_come_by_name(shelf):
    held = {f"fedlora.{shelf}.{name}" for name in plugins.names(shelf)} - set(NOT_BY_NAME)
    for name, others in imports().items():
        if name.split(".")[1] not in BY_NAME[shelf]:
            assert not others & held, f"{name} imports {others & held}"


# A room, and the rooms of what it is made of. What is above it is not in it.
ABOVE = {
    "scenario": {
        "data",
        "tasks",
        "kinds",
        "passes",
        "client",
        "strategy",
        "engine",
        "rounds",
        "reports",
        "simulation",
    },
    "metrics": {
        "data",
        "tasks",
        "kinds",
        "passes",
        "client",
        "strategy",
        "engine",
        "rounds",
        "reports",
        "simulation",
    },
    "data": {"tasks", "kinds", "passes", "client", "strategy", "engine", "rounds", "reports", "simulation"},
    "kinds": {"tasks", "passes", "client", "strategy", "engine", "rounds", "reports", "simulation"},
    "schedules": {"tasks", "passes", "client", "strategy", "engine", "rounds", "reports", "simulation"},
    "compressors": {"data", "tasks", "passes", "client", "strategy", "engine", "rounds", "reports", "simulation"},
    "tasks": {"client", "strategy", "engine", "rounds", "reports", "simulation"},
    "passes": {"strategy", "engine", "rounds", "reports", "simulation"},
    "client": {"strategy", "engine", "rounds", "reports", "simulation"},
    "strategy": {"engine", "rounds", "reports", "simulation"},
    "engine": {"reports", "simulation", "deploy"},
    "rounds": {"reports", "simulation", "deploy"},
    "reports": {"simulation", "deploy", "cli"},
    "deploy": {"cli", "audit"},
    "strategies": {"engine", "rounds", "simulation", "cli", "deploy"},
    "clients": {"engine", "rounds", "simulation", "cli", "deploy"},
}


@pytest.mark.parametrize("room", ABOVE)
def test_a_room_imports_nothing_of_what_is_above_it(room):
    for name, others in imports().items():
        if name.split(".")[1] == room:
            up = {other for other in others if other.split(".")[1] in ABOVE[room]}
            assert not up, f"{name} imports {up}"


def test_no_file_is_too_long_to_read():
    long = {
        str(file.relative_to(ROOT)): n for _, file in modules() if (n := len(file.read_text().splitlines())) > 450
    }
    assert long == {}


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
