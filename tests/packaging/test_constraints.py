"""The locked set: every dependency is in it, in a version that is allowed, with hashes, and without an index."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def test_every_dependency_is_locked_within_its_bounds():
    text = (ROOT / "constraints.txt").read_text()
    locked = dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", text, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["demo"], *extras["docs"], *extras["dev"]]:
        asked = Requirement(line)
        if (name := canonicalize_name(asked.name)) != "fedlora":
            assert asked.specifier.contains(locked[name]), line
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.M).strip())
    assert len(entries) == len(locked) > 100 and all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
