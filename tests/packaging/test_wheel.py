"""The wheel holds what the tree holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, from a copy of the tree; without isolation, so that no network is needed."""
    import shutil

    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("fedlora", "strategies", "clients", "scenarios"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_scenario_and_nothing_else(wheel):
    links = {"strategies", "clients", "scenarios"}
    expected = {"fedlora/py.typed", "fedlora/reports/page.css", "fedlora/reports/page.js"}
    for file in (ROOT / "fedlora").rglob("*.py"):
        if file.relative_to(ROOT / "fedlora").parts[0] not in links:
            expected.add(f"fedlora/{file.relative_to(ROOT / 'fedlora').as_posix()}")
    for name in links:
        for file in (ROOT / name).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                expected.add(f"fedlora/{name}/{file.relative_to(ROOT / name).as_posix()}")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert held == expected


def test_the_wheel_carries_its_licence_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "fedlora = fedlora.cli:main" in archive.read(entry).decode()


@pytest.mark.parametrize("name", ["strategies", "clients", "scenarios"])
def test_the_links_are_relative(name):
    link = ROOT / "fedlora" / name
    assert link.is_symlink() and str(link.readlink()) == f"../{name}"


def test_every_dependency_is_justified():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    optional = [d for group in project["optional-dependencies"].values() for d in group]
    for requirement in [*project["dependencies"], *optional]:
        name = requirement.split(">")[0].split("[")[0].split("<")[0]
        assert name == "fedlora" or f"`{name}`" in text, f"{name} has no line in CONTRIBUTING.md"
