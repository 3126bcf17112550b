"""Secure aggregation, SecAgg+ (Bell et al., 2020, https://eprint.iacr.org/2020/704): the server learns a sum.

Each client hides its vector of integers modulo 2^32 under a mask of its own and one for each neighbour, which
the neighbour takes away again:

    sent_k = x_k + PRG(b_k) + sum_{j < k} PRG(s_kj) - sum_{j > k} PRG(s_kj)    mod 2^32

The seed b_k and the key behind s_kj are shared out among the neighbours, so that `threshold` of them can
help the server take off b_k of those who sent, and s_kj of those who dropped out; never both of one client.

Key agreement, encryption and secret sharing are Flower's building blocks. Its mask generator is not used: it
folds the 32 bytes of a key into 32 bits and feeds a Mersenne Twister, so that a mask can be found by trying.
Masks here are ChaCha20 keystreams. The server is taken to follow the protocol and to look at all that it gets.
"""

import hashlib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError, RoundError

Vector = NDArray[np.uint32]  # modulo 2^32
Keys = tuple[bytes, bytes]  # the public keys of a client: for masks, and for the shares sent to it
Parts = Mapping[str, Mapping[int, bytes]]  # of a message of the protocol: what it tells, and of which client
Exchange = Callable[[str, Mapping[int, Parts]], Mapping[int, Parts]]  # asks clients; the parts of who answered

BITS = 20  # of a number in the sum
MOST = 2**12  # clients whose numbers fit into a sum
LEAST = 3  # clients of a sum: one alone would show itself, two would show each other
FINE = 8.0  # steps of the grid in the standard deviation of noise, at least
MOST_NEIGHBOURS = 32  # beyond so many clients each one has only these, as SecAgg+ has it

KEYS, SHARES, MASKED, REVEAL = "keys", "shares", "masked", "reveal"  # the exchanges of a round


def quantise(values: NDArray[np.floating], largest: float, rng: np.random.Generator) -> Vector:
    """Numbers in [-largest, largest] as integers, rounded up or down at random so that the mean is right.

    Raises:
        ContractError: a number is larger.
    """
    steps = values.astype(np.float64) * (2 ** (BITS - 1) / largest)
    if len(steps) and (worst := float(np.abs(values).max())) > largest:
        raise ContractError(f"a number changed by {worst:.3g}, and secure_aggregation.range is {largest:g}")
    down = np.floor(steps)
    rounded: Vector = (down + (rng.random(len(steps)) < steps - down)).astype(np.int64).astype(np.uint32)
    return rounded


def noise(stds: NDArray[np.float64], largest: float, rng: np.random.Generator) -> Vector:
    """Gaussian noise in whole steps of the grid, to be added to what was rounded before.

    The sum of several such is taken for a Gaussian of their joint variance in whole steps. With eight steps to a
    standard deviation the two differ by less than e^-600 (Kairouz et al., 2021, Theorem 1,
    https://arxiv.org/abs/2102.06387, has it for the discrete Gaussian).

    Args:
        stds: the standard deviation of each number.
        largest: the range of the grid.
        rng: to draw from.

    Raises:
        ContractError: the grid is too coarse for the noise.
    """
    steps = stds * (2 ** (BITS - 1) / largest)
    if len(steps) and (least := float(steps.min())) < FINE:
        raise ContractError(
            f"noise of {least:.2g} steps is too little for the grid: lower secure_aggregation.range, or add more"
        )
    drawn: Vector = np.rint(rng.normal(0.0, steps)).astype(np.int64).astype(np.uint32)
    return drawn


def rounding(size: int, largest: float) -> float:
    """How much longer a vector of `size` numbers may get, in L2 norm, when it is rounded to the grid."""
    return math.sqrt(size) * largest / float(2 ** (BITS - 1))


def dequantise(total: Vector, largest: float) -> NDArray[np.float64]:
    """The sum that a sum of quantised numbers stands for."""
    meant: NDArray[np.float64] = total.view(np.int32).astype(np.float64) * (largest / 2 ** (BITS - 1))
    return meant


def neighbours(members: Sequence[int], rng: np.random.Generator) -> dict[int, list[int]]:
    """Of each member those that it shares masks with, itself included: all, or on a shuffled ring the nearest."""
    reach = MOST_NEIGHBOURS // 2
    if len(members) <= 2 * reach + 1:
        return {m: sorted(members) for m in members}
    ring = [int(m) for m in rng.permutation(np.array(members))]
    return {
        member: sorted(ring[(i + step) % len(ring)] for step in range(-reach, reach + 1))
        for i, member in enumerate(ring)
    }


class Member:
    """A client's side of one round. Its secrets stay in it."""

    def __init__(self, name: int) -> None:
        from flwr.supercore.primitives.asymmetric import (
            generate_key_pairs,
            private_key_to_bytes,
            public_key_to_bytes,
        )

        self.name = name
        self._mask_key, mask_public = generate_key_pairs()
        self._share_key, share_public = generate_key_pairs()
        self._mask_secret, self._seed = private_key_to_bytes(self._mask_key), os.urandom(32)
        self.keys: Keys = (public_key_to_bytes(mask_public), public_key_to_bytes(share_public))
        self._around: Mapping[int, Keys] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._threshold = 0
        self._masked = self._unmasked = False

    def share(self, around: Mapping[int, Keys], threshold: int) -> dict[int, bytes]:
        """For each neighbour, encrypted for it alone, its shares of this client's seed and mask key.

        Args:
            around: the public keys of the neighbours and of this client.
            threshold: how many shares a secret takes.
        """
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

        if len(around) < threshold or around[self.name] != self.keys:
            raise ContractError("too few neighbours, or the keys told for this client are not its own")
        self._around, self._threshold = dict(around), threshold
        parts = [create_shares(secret, threshold, len(around)) for secret in (self._seed, self._mask_secret)]
        sealed = {}
        for other, seed, key in zip(around, *parts, strict=True):
            if other == self.name:
                self._held[other] = (seed, key)
            else:
                plain = share_keys_plaintext_concat(self.name, other, seed, key)
                sealed[other] = encrypt(self._secret_with(other, 1), plain)
        return sealed

    def mask(self, vector: Vector, sealed: Mapping[int, bytes]) -> Vector:
        """The vector under masks with every neighbour whose shares came.

        Args:
            vector: x_k.
            sealed: what those neighbours shared with this client, by neighbour.

        Raises:
            ContractError: asked a second time, for two vectors under one mask would show their difference; or
                what came is not of those neighbours, or of too few.
        """
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate

        if self._masked:
            raise ContractError("the server asks for a second vector under the same masks")
        self._masked = True
        for other, text in sealed.items():
            source, to, seed, key = share_keys_plaintext_separate(decrypt(self._secret_with(other, 1), text))
            if (source, to) != (other, self.name):
                raise ContractError(f"shares of client {source} for {to} came as those of {other}")
            self._held[other] = (seed, key)
        if len(self._held) < self._threshold:
            raise ContractError("fewer neighbours shared their keys than it takes to take masks off")
        masked = vector + _stream(self._seed, len(vector))
        for other in sealed:
            stream = _stream(self._secret_with(other, 0), len(vector))
            masked = masked + stream if other < self.name else masked - stream
        return masked

    def reveal(self, sent: Collection[int], dropped: Collection[int]) -> dict[int, bytes]:
        """The shares that take masks off: of the seed of those who sent, of the mask key of those who did not.

        Raises:
            ContractError: both are asked for of one client, or a second time, or for too few who sent.
        """
        strange = not set(sent) <= set(self._held)
        if self._unmasked or strange or set(sent) & set(dropped) or len(sent) < self._threshold:
            raise ContractError("the server asks for shares that would show a single client's update")
        self._unmasked = True
        return {m: self._held[m][0] for m in sent} | {m: self._held[m][1] for m in dropped if m in self._held}

    def answer(self, what: str, told: Parts, vector: Callable[[], Vector], share: float) -> Parts:
        """What this client says in an exchange.

        Args:
            what: the exchange.
            told: by the server.
            vector: x_k, had when it is about to be masked.
            share: of the neighbours that must stay.
        """
        if what == KEYS:
            return {"mask": {self.name: self.keys[0]}, "share": {self.name: self.keys[1]}}
        if what == SHARES:
            around = {o: (key, told["share"][o]) for o, key in told["mask"].items()}
            return {"sealed": self.share(around, threshold(len(around), share))}
        if what == MASKED:
            return {"masked": {self.name: self.mask(vector(), told["sealed"]).astype("<u4").tobytes()}}
        return {"shares": self.reveal(told["sent"], told["dropped"])}

    def _secret_with(self, other: int, which: int) -> bytes:
        return _agree((self._mask_key, self._share_key)[which], self._around[other][which])


@dataclass
class Collector:
    """The server's side of one round: it is told public keys, ciphertext, masked vectors and shares."""

    around: Mapping[int, Sequence[int]]
    keys: Mapping[int, Keys]
    threshold: int

    def total(self, masked: Mapping[int, Vector], shares: Mapping[int, Mapping[int, bytes]]) -> Vector:
        """The sum of the vectors of those who sent.

        Args:
            masked: by client.
            shares: what each client revealed, by client and then by whom it is a share of.

        Raises:
            RoundError: too few clients are left to take the masks off.
        """
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares
        from flwr.supercore.primitives.asymmetric import bytes_to_private_key

        total = np.zeros_like(next(iter(masked.values())))
        for vector in masked.values():
            total = total + vector
        for member, around in self.around.items():
            there = [other for other in around if other != member and other in masked]
            if member not in masked and not there:
                continue
            parts = [held[member] for held in shares.values() if member in held]
            if len(parts) < self.threshold:
                raise RoundError(
                    f"{len(parts)} of the {self.threshold} shares of client {member} came: too many dropped out"
                )
            secret = combine_shares(parts[: self.threshold])
            if member in masked:
                total = total - _stream(secret, len(total))
                continue
            key = bytes_to_private_key(secret)
            for other in there:  # what each of them added or took away for the one that dropped out
                stream = _stream(_agree(key, self.keys[other][0]), len(total))
                total = total - stream if member < other else total + stream
        return total


@dataclass(frozen=True)
class Sum:
    """What the server learns of a round.

    Attributes:
        total: the sum of the vectors of those who sent.
        members: who was asked to mask, ascending.
        sent: who did, and is in the sum.
    """

    total: Vector
    members: tuple[int, ...]
    sent: tuple[int, ...]


def check(what: str, client: int, told: Parts, made: Parts, size: int) -> None:
    """Make sure that an answer is whole, so that one client's nonsense cannot stop the others.

    Args:
        what: the exchange.
        client: who answered.
        told: what it was told.
        made: what it answered.
        size: numbers in a vector.

    Raises:
        ContractError: it is not.
    """
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    try:
        if what == KEYS:
            whole = all(bytes_to_public_key(made[key][client]) for key in ("mask", "share"))
        elif what == SHARES:
            whole = set(made["sealed"]) == set(told["mask"]) - {client}
        elif what == MASKED:
            whole = len(made["masked"][client]) == 4 * size
        else:
            whole = set(told["sent"]) <= set(made["shares"]) <= {*told["sent"], *told["dropped"]}
    except (KeyError, ValueError, TypeError) as error:
        raise ContractError(f"its answer in the exchange of {what} lacks or garbles {error!s:.100}") from error
    if not whole:
        raise ContractError(f"its answer in the exchange of {what} is not what was asked for")


def collect(exchange: Exchange, cohort: Sequence[int], rng: np.random.Generator, share: float) -> Sum:
    """The server's side: four exchanges, each with those who answered the one before.

    Args:
        exchange: with clients, wherever they are; it gives whole answers alone.
        cohort: their ids.
        rng: deals the neighbours out.
        share: of the clients that must stay from the first exchange to the last.

    Raises:
        RoundError: too few stayed; nothing is learnt then but that.
    """
    said = exchange(KEYS, {c: {} for c in cohort})
    keys = {c: (p["mask"][c], p["share"][c]) for c, p in sorted(said.items())}
    if len(keys) < LEAST:
        raise RoundError(f"{len(keys)} clients are there for secure aggregation: a sum takes {LEAST} at least")
    around = neighbours([*keys], rng)
    needed = threshold(len(next(iter(around.values()))), share)
    asked: dict[int, Parts] = {
        c: {"mask": {o: keys[o][0] for o in others}, "share": {o: keys[o][1] for o in others}}
        for c, others in around.items()
    }
    sealed = {c: p["sealed"] for c, p in sorted(exchange(SHARES, asked).items())}
    around = {c: [o for o in around[c] if o in sealed] for c in sealed}
    everybody = dict.fromkeys(sealed, b"")
    asked = {
        c: {"sealed": {o: sealed[o][c] for o in others if o != c}, "members": everybody}
        for c, others in around.items()
    }
    texts = {c: p["masked"][c] for c, p in sorted(exchange(MASKED, asked).items())}
    masked = {c: np.frombuffer(text, "<u4").astype(np.uint32) for c, text in texts.items()}
    asked = {
        c: {"sent": {o: b"" for o in there if o in masked}, "dropped": {o: b"" for o in there if o not in masked}}
        for c, there in around.items()
        if c in masked and sum(o in masked for o in there) >= needed
    }
    if len(masked) < 2 or not asked:
        raise RoundError(f"{len(masked)} of {len(keys)} clients sent: too many dropped out")
    shares = {c: p["shares"] for c, p in exchange(REVEAL, asked).items()}
    total = Collector(around, keys, needed).total(masked, shares)
    return Sum(total, tuple(sealed), tuple(masked))


def _agree(key: object, public: bytes) -> bytes:
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    return generate_shared_key(key, bytes_to_public_key(public))  # type: ignore[arg-type]


def _stream(secret: bytes, size: int) -> Vector:
    """`size` numbers from a secret, which without it look like chance."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    key = hashlib.sha256(secret).digest()  # used once: keys are new in each round
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, np.uint32)


def threshold(members: int, share: float) -> int:
    """How many of a neighbourhood must stay for the masks to come off: a share, and more than half."""
    return max(math.ceil(share * members), members // 2 + 1)
