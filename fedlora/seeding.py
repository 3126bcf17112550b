"""Randomness is derived, never ambient: each draw names the seed, the round, the client and its purpose.

Two streams with different paths are independent, the same path always gives the same stream, and
nothing depends on which worker draws it or in which order.
"""

import hashlib

import numpy as np

Path = int | str


def derive(seed: int, *path: Path) -> int:
    """A 63-bit seed for `path`, such as `derive(seed, round, client, "noise")`."""
    text = "/".join(f"{type(part).__name__[0]}{part}".replace("/", "//") for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: Path) -> np.random.Generator:
    """A NumPy generator for `path`."""
    return np.random.default_rng(derive(seed, *path))
