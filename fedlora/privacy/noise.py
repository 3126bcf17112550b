"""What protects is drawn here: a cryptographic stream, and Gaussian noise that floating point does not betray.

A stream is the ChaCha20 keystream of a 256-bit key. Without the key nobody can tell it from chance, however
much of it he has seen; with the key anybody draws it again. A site's keys come from the operating system
(`Stream.fresh`), a simulation's from the scenario's seed (`fedlora.seeding.stream`): the code is the same.

Each normal number is half the sum of four, each of them by Box and Muller in double precision. A single
floating-point draw takes few of the values around it, and so tells which sums it can have been added to
(Mironov, 2012, https://doi.org/10.1145/2382196.2382264). For a sum of four one would have to search through more
than 2^150 combinations (Holohan and Braghin, 2021, https://arxiv.org/abs/2107.10138).
"""

import math
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

DRAWS = 4  # normals that are summed into one
Shape = int | tuple[int, ...]
Items = TypeVar("Items", bound=NDArray[Any])


class Stream:
    """Random numbers from a key; the methods are named as those of `numpy.random.Generator`, and mean the same."""

    def __init__(self, key: bytes) -> None:
        """The stream of a key of 32 bytes, from its beginning."""
        if len(key) != 32:
            raise ValueError(f"a key has 32 bytes, not {len(key)}")
        self._key, self._calls = key, 0

    @classmethod
    def fresh(cls) -> Self:
        """A stream that nobody can draw again: its key is the operating system's, and kept nowhere."""
        return cls(fresh_key())

    def bytes(self, length: int) -> bytes:
        """The next bytes, at most 2^38 at once."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # A block counter of 32 bits, which starts at 0, and the number of the call as the nonce.
        nonce = bytes(4) + self._calls.to_bytes(12, "little")
        self._calls += 1
        return Cipher(algorithms.ChaCha20(self._key, nonce), None).encryptor().update(bytes(length))

    def words(self, count: int) -> NDArray[np.uint64]:
        """Whole numbers below 2^64."""
        return np.frombuffer(self.bytes(8 * count), "<u8")

    @overload
    def random(self, size: None = None) -> float: ...
    @overload
    def random(self, size: Shape) -> NDArray[np.float64]: ...
    def random(self, size: Shape | None = None) -> float | NDArray[np.float64]:
        """Uniform on [0, 1), in steps of 2^-53."""
        shape = () if size is None else size
        drawn = (self.words(_count(shape)) >> np.uint64(11)).astype(np.float64)
        drawn *= 2.0**-53
        return float(drawn[0]) if size is None else drawn.reshape(shape)

    def normal(self, loc: float = 0.0, scale: Any = 1.0, size: Shape = 1) -> NDArray[np.float64]:
        """Gaussian noise around `loc` with the standard deviation `scale`, one for all or one for each."""
        drawn = self.standard_normal(size)
        drawn *= scale
        drawn += loc
        return drawn

    def standard_normal(self, size: Shape = 1) -> NDArray[np.float64]:
        """Half the sum of four normals each."""
        import torch  # its logarithms and cosines are several times as fast as NumPy's, and on one core too

        count = _count(size)
        pairs = -(-count // 2)
        total = torch.zeros((2, pairs), dtype=torch.float64)
        for _ in range(DRAWS):
            radius, angle = (self._fraction(pairs) for _ in range(2))
            radius.log_().mul_(-2.0).sqrt_()
            angle.mul_(2.0 * math.pi)
            total[0].addcmul_(radius, angle.cos())
            total[1].addcmul_(radius, angle.sin())
        drawn: NDArray[np.float64] = total.mul_(DRAWS**-0.5).numpy().ravel()[:count].reshape(size)
        return drawn

    def _fraction(self, count: int) -> "torch.Tensor":
        """Uniform on (0, 1] in steps of 2^-64, as finely as float64 can have it: the tails need it near 0."""
        import torch

        words = self.words(count).astype(np.float64)
        words += 1.0
        words *= 2.0**-64
        return torch.from_numpy(words)

    def integers(self, low: int, high: int, size: Shape) -> NDArray[np.int64]:
        """Whole numbers in [low, high), each as likely as any other but for one part in 2^64 / (high - low)."""
        drawn = (self.words(_count(size)) % np.uint64(high - low)).astype(np.int64)
        return (drawn + low).reshape(size)

    def permutation(self, items: Items) -> Items:
        """The items in an order by chance, along their first axis."""
        return items[np.argsort(self.words(len(items)), kind="stable")]  # type: ignore[return-value]


def fresh_key() -> bytes:
    """A key of the operating system's."""
    return os.urandom(32)


def _count(shape: Shape) -> int:
    return shape if isinstance(shape, int) else math.prod(shape)
