"""Write what the images install, out of constraints.txt: `python docker/lock.py`, where `fedlora[dev]` is.

flower.txt has what flwr needs, requirements.txt what fedlora needs with its demo extra. torch and the CUDA
libraries that it alone brings are left out. Run it again when constraints.txt was made again.
"""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent / "constraints.txt"
LEFT = re.compile(r"torch|triton|(nvidia|cuda)-.*")  # torch comes by itself, as what a deployment has of it


def pinned(text: str) -> dict[str, str]:
    """The entries of a file of pins with their hashes, by name."""
    entries = re.findall(r"^\S+==.*(?:\n    .*)*", text, re.MULTILINE)
    return {canonicalize_name(re.split(r"[=\[ ]", entry, maxsplit=1)[0]): entry for entry in entries}


def needed(asked: Iterable[str]) -> set[str]:
    """The names of what is installed for some requirements, their own among them."""
    found: set[tuple[str, str]] = set()
    left = [Requirement(text) for text in asked]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras}:
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for text in metadata.requires(name) or ():
                more = Requirement(text)
                if more.marker is None or more.marker.evaluate({"extra": extra}):
                    left.append(more)
    return {name for name, _ in found}


def locked(*asked: str) -> str:
    """A file of pins for some requirements."""
    pins = pinned(CONSTRAINTS.read_text())
    names = sorted(name for name in needed(asked) if name != "fedlora" and not LEFT.fullmatch(name))
    return "# From constraints.txt, by docker/lock.py.\n" + "\n".join(pins[name] for name in names) + "\n"


if __name__ == "__main__":
    (HERE / "flower.txt").write_text(locked("flwr"))
    (HERE / "requirements.txt").write_text(locked("fedlora[demo]", "setuptools"))
