"""When a round that runs again may draw its noise again: when everything that makes the noised sum is the same.

A simulation's noise repeats, so that an interrupted run goes on bit for bit, and pays once. But noise that hides
one sum must not hide another: their difference would hold no noise at all. So a digest of all that makes a sum
stands in the ledger beside its event: the tensors received, the tokens and targets, the settings, the device and
the versions. Inputs with the digest of an earlier draw repeat that draw, which is paid; any others take the next
draw, and pay. The draw's number, and not the digest, is what noise is drawn from: equal runs on two machines,
whose digests differ, have equal noise. Banded noise is drawn by the numbers of a client's steps over its run. A
draw keeps its own, and the next one has those after all steps that were paid for.

Where clients share the noise of their examples out, a client's part hides what the others' parts hide with it. Who
else is in the sum is not known when the part is drawn, and a digest of the client's own inputs does not hold it.
So there no draw repeats: a round that runs again takes the next, and pays.

A digest is keyed by the scenario's seed. It tells about the examples as much as the noise of a simulation hides:
nothing to who lacks the seed. At sites no noise is ever drawn again, and there is no digest.
"""

import ast
import hashlib
import hmac
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedlora.errors import ContractError, RoundError
from fedlora.seeding import key

VERSIONS = ("fedlora", "flwr", "ray", "torch", "transformers", "peft", "opacus", "dp-accounting", "numpy")


class _Mac(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Drawn:
    """What somebody has drawn noise for in a round so far.

    Attributes:
        digests: of the inputs of each draw, from the first.
        more: whether the budget has room for another draw.
        firsts: of banded noise, the number of the first step of each draw, and of the next, counted over the run.
        once: whether no draw repeats, whatever the inputs: noise is a part of what hides a sum with others.
    """

    digests: tuple[str, ...] = ()
    more: bool = True
    firsts: tuple[int, ...] = ()
    once: bool = False

    def may(self, digest: str) -> bool:
        """Whether there is a draw for these inputs: an earlier one, or room for another."""
        return self.more or self._repeats(digest)

    def _repeats(self, digest: str) -> bool:
        return digest in self.digests and not self.once

    def draw(self, digest: str) -> int:
        """Which draw is for these inputs: an earlier one that was for the same, or the next.

        Raises:
            RoundError: it would be the next, and the budget has no room for it.
        """
        if not self.may(digest):
            others = "in a sum with others" if self.once else "over other data, tensors or versions"
            remedy = "" if self.once else "put back what changed, or "
            raise RoundError(
                f"this round was paid for {others}, and no epsilon is left to train again: {remedy}start again in "
                "another folder"
            )
        return self.digests.index(digest) if self._repeats(digest) else len(self.digests)

    def first(self, draw: int) -> int:
        """The number of the first step of a draw.

        Raises:
            ContractError: nobody says: noise that was drawn before might be drawn for other inputs.
        """
        if draw >= len(self.firsts):
            raise ContractError(
                "banded noise is drawn by how many steps a client has paid for, which is not known here"
            )
        return self.firsts[draw]


def digest(seed: int | bytes, *parts: Any) -> str:
    """32 hex digits that differ where any bit of the parts does.

    Args:
        seed: of the scenario, or a site's own key; it keys the digest.
        parts: arrays, mappings by name, sequences, and values whose `repr` says all of them.
    """
    made = hmac.new(key(seed, "digest"), digestmod=hashlib.sha256)
    _feed(made, parts)
    return made.hexdigest()[:32]


def _feed(made: _Mac, part: Any) -> None:
    if isinstance(part, np.ndarray):
        made.update(f"array {part.dtype.str} {part.shape} ".encode())
        made.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(part, Mapping):
        made.update(f"mapping {len(part)} ".encode())
        for name in sorted(part, key=str):
            _feed(made, name)
            _feed(made, part[name])
    elif isinstance(part, list | tuple):
        made.update(f"sequence {len(part)} ".encode())
        for one in part:
            _feed(made, one)
    else:
        text = repr(part).encode()
        made.update(f"value {len(text)} ".encode() + text)


@cache
def versions() -> dict[str, str]:
    """Of the packages that decide the last bits of a result."""
    return {name: version(name) for name in VERSIONS}


def code(of: object) -> str:
    """A hash of the files that a class, or the class of an object, comes from, if it is custom; else its name.

    Its module's, and those of all modules of its owner's that it imports, however many between.
    """
    cls = of if isinstance(of, type) else type(of)
    made, waiting, seen = hashlib.sha256(f"{cls.__module__}:{cls.__qualname__}".encode()), [cls.__module__], set()
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in seen or file is None or not file.endswith(".py") or _installed(file):
            continue  # whose version says it
        seen.add(name)
        text = Path(file).read_bytes()
        made.update(f"{name} {len(text)} ".encode() + text)
        package = name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
        waiting += sorted(set(_imports(text, package)))
    return made.hexdigest()


def _file(name: str) -> str | None:
    """The file of a module, imported yet or not; None where it has none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # of a parent that is no package
        return None
    return spec.origin if spec else None


def _installed(file: str) -> bool:
    """Whether a file is Python's, of an installed package or fedlora's."""
    places = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    package = Path(__file__).parents[1]
    places.add(str(package))
    tops = {str(package.parent / part) for part in ("strategies", "clients")}  # of a checkout
    return any(str(Path(file).resolve()).startswith(f"{place}{os.sep}") for place in places | tops)


def _imports(text: bytes, package: str) -> Iterator[str]:
    """The modules that a source may import, as they are named in `sys.modules`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            yield from (".".join(pieces[:n]) for n in range(1, len(pieces) + 1))
