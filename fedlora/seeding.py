"""Randomness is derived, never ambient: each draw names the root, the round, the client and its purpose.

Two paths are independent, the same path always gives the same numbers, and nothing depends on which worker
draws them or in which order. All 256 bits of a derivation reach what draws from it. The root is a
simulation's seed, or a key of the operating system. Every generator of fedlora is made here or in
`fedlora.privacy.noise`; a test finds any other.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np

from fedlora.privacy.noise import Stream

Root = int | bytes
Path = int | str


def key(root: Root, *path: Path) -> bytes:
    """The 32 bytes that `path` stands for, such as `key(seed, round, client, "noise")`."""
    first = root.hex() if isinstance(root, bytes) else root
    text = "/".join(f"{type(part).__name__[0]}{part}".replace("/", "//") for part in (first, *path))
    return hashlib.sha256(text.encode()).digest()


def stream(root: Root, *path: Path) -> Stream:
    """The stream of a path: for all that protects somebody."""
    return Stream(key(root, *path))


def generator(root: Root, *path: Path) -> np.random.Generator:
    """A NumPy generator for a path: for what protects nobody, such as a partition or a first adapter."""
    entropy = np.random.SeedSequence(int.from_bytes(key(root, *path), "big"), pool_size=8)
    return np.random.Generator(np.random.PCG64(entropy))


@contextlib.contextmanager
def ambient(root: Root, *path: Path) -> Iterator[None]:
    """Let what others draw from torch's own generator follow a path for a while; it is left as it was found.

    For first values of weights, and for what a finished model writes: that generator takes 32 bits of its seed.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(key(root, *path)[:8], "big") >> 1)
        yield
