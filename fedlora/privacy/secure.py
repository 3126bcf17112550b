"""Secure aggregation, SecAgg+ (Bell et al., 2020, https://eprint.iacr.org/2020/704): the server learns a sum.

Each client hides its vector of integers modulo 2^32 under a mask of its own and one for each neighbour, which
the neighbour takes away again:

    sent_k = x_k + PRG(b_k) + sum_{j < k} PRG(s_kj) - sum_{j > k} PRG(s_kj)    mod 2^32

The seed b_k and the key behind s_kj are shared out among the neighbours, so that `threshold` of them can
help the server take off b_k of those who sent, and s_kj of those who dropped out; never both of one client.

Key agreement, encryption and secret sharing are Flower's building blocks. Its mask generator is not used: it
folds the 32 bytes of a key into 32 bits and feeds a Mersenne Twister, so that a mask can be found by trying.
Masks here are ChaCha20 keystreams. Clients go by pseudonyms that are dealt anew in each round.

**A server that lies about who dropped out.** It passes messages on between clients, so it may keep some back and
tell each another story. What holds it (after Bonawitz et al., 2017, section 4 and 6,
https://eprint.iacr.org/2017/281):

1. Beside its shares a client seals, for each neighbour, who its own neighbours are and by which keys. All that
   come must agree: everybody is everybody's neighbour, or each has its piece of one ring. No server can deal one
   client a small circle and its neighbours large ones.
2. Masking fixes the set S of those whose shares came, t of them at least. A client reveals for a story that names
   S and nobody else, itself and t - 1 more among those who sent, so it calls |S| - t dropped at most.
3. t is above two thirds of a neighbourhood of n, and three quarters on a ring. As t > n / 2, and a client tells
   of each other one secret alone, the server never has both.

To see a sum over some clients A alone, it needs the mask keys of all others D that those masked with: |A| + |D|
>= t, and t that call each of D dropped. The n clients who can (on a ring 2 n - 1) call n - t dropped each, and
those of A only |A| + |D| - t. For no n do these votes suffice with |A| < LEAST; a test counts. Keys are not
signed: a server that invents clients, or clients that help it, can be t of a neighbourhood, and then nothing
holds. Nor does anything keep a lying server from cutting a round into groups of LEAST.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError, RoundError
from fedlora.privacy.cohorts import LEAST, MOST
from fedlora.privacy.noise import Stream, fresh_key

Vector = NDArray[np.uint32]  # modulo 2^32
Keys = tuple[bytes, bytes]  # the public keys of a client: for masks, and for the shares sent to it
View = Mapping[int, bytes]  # whom a client takes for its neighbours, itself included, with a digest of their keys
Parts = Mapping[str, Mapping[int, bytes]]  # of a message of the protocol: what it tells, and of which client
Exchange = Callable[[str, Mapping[int, Parts]], Mapping[int, Parts]]  # asks clients, by their real ids

BITS = 20  # of a number in the sum
FINE = 8.0  # steps of the grid in the standard deviation of noise, at least
MOST_NEIGHBOURS = 32  # beyond so many clients each one has only these, as SecAgg+ has it

NO_GRAPH = "the server dealt clients neighbours that do not go together"
SHOWS = "the server asks for shares that would show a single client's update"

_CIRCLE = 2**64  # pseudonyms are on a ring of so many places
_DIGEST = 16  # bytes of a digest in a view

KEYS, SHARES, MASKED, REVEAL = "keys", "shares", "masked", "reveal"  # the exchanges of a round


def quantise(values: NDArray[np.floating], largest: float, rng: Stream) -> Vector:
    """Numbers in [-largest, largest] as integers, rounded up or down at random so that the mean is right.

    Raises:
        ContractError: a number is larger.
    """
    steps = values.astype(np.float64) * (2 ** (BITS - 1) / largest)
    if not (np.abs(values) <= largest).all():
        raise ContractError(f"a number changed by more than secure_aggregation.range, {largest:g}")
    down = np.floor(steps)
    rounded: Vector = (down + (rng.random(len(steps)) < steps - down)).astype(np.int64).astype(np.uint32)
    return rounded


def noise(stds: NDArray[np.float64], largest: float, rng: Stream) -> Vector:
    """Gaussian noise in whole steps of the grid, to be added to what was rounded before.

    The sum of several such is taken for a Gaussian of their joint variance in whole steps. With eight steps to a
    standard deviation the two differ by less than e^-600 (Kairouz et al., 2021, Theorem 1,
    https://arxiv.org/abs/2102.06387, has it for the discrete Gaussian).

    Args:
        stds: the standard deviation of each number.
        largest: the range of the grid.
        rng: to draw from.
    """
    steps = stds * (2 ** (BITS - 1) / largest)
    drawn: Vector = np.rint(rng.normal(0.0, steps, len(steps))).astype(np.int64).astype(np.uint32)
    return drawn


def check_grid(stds: NDArray[np.float64], largest: float, members: int) -> None:
    """Make sure that a sum and its noise fit on the grid, and that its steps are fine enough for each share.

    Args:
        stds: the standard deviation of the noise on each number of the sum; 0 where there is none.
        largest: the range of the grid.
        members: clients of the largest sum, not of this one: one more or less must not decide.

    Raises:
        ContractError: they do not, or are not.
    """
    if members + 8 * stds.max(initial=0.0) / largest > MOST:
        raise ContractError(
            f"a sum of {members} clients and their noise does not fit: raise secure_aggregation.range"
        )
    least = float(stds[stds > 0].min(initial=math.inf)) / math.sqrt(members) * 2 ** (BITS - 1) / largest
    if least < FINE:
        raise ContractError(
            f"noise of {least:.2g} steps is too little for the grid: lower secure_aggregation.range, or add more"
        )


def rounding(size: int, largest: float) -> float:
    """How much longer a vector of `size` numbers may get, in L2 norm, when it is rounded to the grid."""
    return math.sqrt(size) * largest / float(2 ** (BITS - 1))


def dequantise(total: Vector, largest: float) -> NDArray[np.float64]:
    """The sum that a sum of quantised numbers stands for."""
    meant: NDArray[np.float64] = total.view(np.int32).astype(np.float64) * (largest / 2 ** (BITS - 1))
    return meant


def pseudonyms(count: int, rng: Stream) -> list[int]:
    """Names for one round, of 63 bits, that tell nothing of who bears them."""
    names: dict[int, None] = {}
    while len(names) < count:
        names |= {int(word) >> 1: None for word in rng.words(count - len(names))}
    return list(names)


def neighbours(members: Collection[int]) -> dict[int, list[int]]:
    """Of each member those that it shares masks with, itself included: all, or on the ring the nearest."""
    reach, ring = MOST_NEIGHBOURS // 2, sorted(members)
    if len(ring) <= 2 * reach + 1:
        return {member: ring for member in ring}
    return {
        member: sorted(ring[(i + step) % len(ring)] for step in range(-reach, reach + 1))
        for i, member in enumerate(ring)
    }


def check_views(views: Mapping[int, View]) -> None:
    """Make sure that clients see one graph: everybody, or of one ring the piece around each.

    Args:
        views: by client.

    Raises:
        ContractError: they do not.
    """
    if len({frozenset(view.items()) for view in views.values()}) == 1:
        return
    known: dict[int, bytes] = {}
    for view in views.values():
        known |= view
    for name, view in views.items():
        ring = sorted(view, key=lambda other: (other - name) % _CIRCLE)
        if len(ring) != MOST_NEIGHBOURS + 1 or name not in view:
            raise ContractError(NO_GRAPH)
        last, first = ring[MOST_NEIGHBOURS // 2], ring[MOST_NEIGHBOURS // 2 + 1]
        piece = {other for other in known if (other - first) % _CIRCLE <= (last - first) % _CIRCLE}
        if piece != set(view) or any(known[other] != digest for other, digest in view.items()):
            raise ContractError(NO_GRAPH)


class Member:
    """A client's side of one round. Its secrets stay in it.

    Attributes:
        name: its pseudonym.
        masked: whether it has masked a vector.
    """

    def __init__(self, name: int) -> None:
        from flwr.supercore.primitives.asymmetric import (
            generate_key_pairs,
            private_key_to_bytes,
            public_key_to_bytes,
        )

        self.name, self.masked = name, False
        self._mask_key, mask_public = generate_key_pairs()
        self._share_key, share_public = generate_key_pairs()
        self._mask_secret, self._seed = private_key_to_bytes(self._mask_key), fresh_key()
        self.keys: Keys = (public_key_to_bytes(mask_public), public_key_to_bytes(share_public))
        self._around: Mapping[int, Keys] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._fixed: list[int] = []  # whose shares came, once masked with all of them
        self._threshold = 0
        self._unmasked = False

    def share(self, around: Mapping[int, Keys], needed: int) -> dict[int, bytes]:
        """For each neighbour, encrypted for it alone, its shares of this client's seed and mask key.

        Args:
            around: the public keys of the neighbours and of this client.
            needed: how many shares a secret takes.

        Raises:
            ContractError: asked a second time, or with too few neighbours or too low a threshold, or with other
                keys for this client.
        """
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

        if self._around:
            raise ContractError("the server asks for shares of the same keys a second time")
        if not threshold(len(around), 0) <= needed <= len(around) or around.get(self.name) != self.keys:
            raise ContractError("too few neighbours, or the keys told for this client are not its own")
        self._around, self._threshold = dict(around), needed
        parts = [create_shares(secret, needed, len(around)) for secret in (self._seed, self._mask_secret)]
        sealed, view = {}, _pack_view(self._view())
        for other, seed, key in zip(around, *parts, strict=True):
            if other == self.name:
                self._held[other] = (seed, key)
            else:
                plain = share_keys_plaintext_concat(self.name, other, seed, key)
                sealed[other] = encrypt(self._secret_with(other, 1), view + plain)
        return sealed

    def mask(self, vector: Vector, sealed: Mapping[int, bytes]) -> Vector:
        """The vector under masks with every neighbour whose shares came.

        Args:
            vector: x_k.
            sealed: what those neighbours shared with this client, by neighbour.

        Raises:
            ContractError: asked a second time, for two vectors under one mask would show their difference; or
                what came is not of those neighbours, or of too few, or of some that see another graph.
        """
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate

        if self.masked:
            raise ContractError("the server asks for a second vector under the same masks")
        self.masked = True
        if not set(sealed) < set(self._around) or self.name in sealed:
            raise ContractError("the server passes on shares of clients that are no neighbours")
        views = {self.name: self._view()}
        for other, text in sealed.items():
            views[other], plain = _unpack_view(self._open(other, text))
            source, to, seed, key = share_keys_plaintext_separate(plain)
            if (source, to) != (other, self.name):
                raise ContractError(f"shares of client {source} for {to} came as those of {other}")
            self._held[other] = (seed, key)
        if len(self._held) < self._threshold:
            raise ContractError("fewer neighbours shared their keys than it takes to take masks off")
        check_views(views)
        masked = vector + _stream(self._seed, len(vector))
        for other in sealed:
            stream = _stream(self._secret_with(other, 0), len(vector))
            masked = masked + stream if other < self.name else masked - stream
        self._fixed = sorted(self._held)
        return masked

    def reveal(self, sent: Collection[int], dropped: Collection[int]) -> dict[int, bytes]:
        """The shares that take masks off: of the seed of those who sent, of the mask key of those who did not.

        Raises:
            ContractError: both are asked for of one client, or a second time, or for too few who sent, or not
                for just those whose shares came before this client masked, of whom it is one itself.
        """
        if self._unmasked or sorted([*sent, *dropped]) != self._fixed:
            raise ContractError(SHOWS)
        if self.name not in sent or len(sent) < max(self._threshold, LEAST):
            raise ContractError(SHOWS)
        self._unmasked = True
        return {m: self._held[m][0] for m in sent} | {m: self._held[m][1] for m in dropped}

    def answer(self, what: str, told: Parts, vector: Callable[[int], Vector], share: float, most: int) -> Parts:
        """What this client says in an exchange.

        Args:
            what: the exchange.
            told: by the server.
            vector: x_k as one of so many clients, had when it is about to be masked.
            share: of the neighbours that must stay.
            most: clients that the round may have.

        Raises:
            ContractError: the server asks for what a client does not tell.
        """
        if what == KEYS:
            return {"mask": {self.name: self.keys[0]}, "share": {self.name: self.keys[1]}}
        if what == SHARES:
            if set(told["mask"]) != set(told["share"]):
                raise ContractError("the server tells one of the two keys of a client")
            around = {o: (key, told["share"][o]) for o, key in told["mask"].items()}
            return {"sealed": self.share(around, threshold(len(around), share))}
        if what == MASKED:
            members = self._members(told, most)
            return {"masked": {self.name: self.mask(vector(members), told["sealed"]).astype("<u4").tobytes()}}
        return {"shares": self.reveal(told["sent"], told["dropped"])}

    def _members(self, told: Parts, most: int) -> int:
        """How many clients are asked for a masked vector; where all are neighbours this client counts them.

        Raises:
            ContractError: the server says what cannot be.
        """
        seen = len(told["sealed"]) + 1
        members = next(iter(told["members"]), 0)
        whole = len(self._around) <= MOST_NEIGHBOURS
        if len(told["members"]) != 1 or not max(LEAST, seen) <= members <= (min(seen, most) if whole else most):
            raise ContractError("the server names a number of clients that cannot be")
        return members

    def _view(self) -> View:
        return {
            other: hashlib.sha256(b"".join((other.to_bytes(8, "big"), *keys))).digest()[:_DIGEST]
            for other, keys in self._around.items()
        }

    def _open(self, other: int, text: bytes) -> bytes:
        from cryptography.fernet import InvalidToken
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt

        try:
            return decrypt(self._secret_with(other, 1), text)
        except InvalidToken as error:
            raise ContractError(
                f"shares that client {other} did not seal for this client came as its own"
            ) from error

    def _secret_with(self, other: int, which: int) -> bytes:
        from cryptography.exceptions import UnsupportedAlgorithm

        try:
            return _agree((self._mask_key, self._share_key)[which], self._around[other][which])
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ContractError("what the server tells for a client's key is none") from error


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
                    f"{len(parts)} of the {self.threshold} shares of a client came: too many dropped out"
                )
            try:
                secret = combine_shares(parts[: self.threshold])
                key = None if member in masked else bytes_to_private_key(secret)
            except (ValueError, IndexError, TypeError) as error:
                raise RoundError("the masks did not come off the sum: a client's shares were wrong") from error
            if key is None:
                total = total - _stream(secret, len(total))
                continue
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


def check(what: str, told: Parts, made: Parts, size: int) -> None:
    """Make sure that an answer is whole, so that one client's nonsense cannot stop the others.

    Args:
        what: the exchange.
        told: what the client was told, its pseudonym among it.
        made: what it answered.
        size: numbers in a vector.

    Raises:
        ContractError: it is not.
    """
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    (client,) = told["you"]
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


def collect(exchange: Exchange, cohort: Sequence[int], rng: Stream, share: float) -> Sum:
    """The server's side: four exchanges, each with those who answered the one before.

    Args:
        exchange: with clients, wherever they are; it gives whole answers alone.
        cohort: their ids, which no client is told.
        rng: deals pseudonyms out, and with them the neighbours.
        share: of the clients that must stay from the first exchange to the last.

    Raises:
        RoundError: too few stayed; nothing is learnt then but that.
    """
    whose = dict(zip(pseudonyms(len(cohort), rng), cohort, strict=True))
    names = {client: name for name, client in whose.items()}

    def ask(what: str, told: Mapping[int, Parts]) -> dict[int, Parts]:
        parts: dict[int, Parts] = {
            whose[n]: {**told[n], "you": {n: b""}} for n in sorted(told, key=whose.__getitem__)
        }
        return {names[client]: made for client, made in sorted(exchange(what, parts).items())}

    keys = {n: (p["mask"][n], p["share"][n]) for n, p in ask(KEYS, {n: {} for n in whose}).items()}
    if len(keys) < LEAST:
        raise RoundError(f"{len(keys)} clients are there for secure aggregation: a sum takes {LEAST} at least")
    around = neighbours(keys)
    needed = threshold(len(next(iter(around.values()))), share)
    asked: dict[int, Parts] = {
        n: {"mask": {o: keys[o][0] for o in others}, "share": {o: keys[o][1] for o in others}}
        for n, others in around.items()
    }
    sealed = {n: p["sealed"] for n, p in ask(SHARES, asked).items()}
    around = {n: [o for o in around[n] if o in sealed] for n in sealed}
    members = {len(sealed): b""}
    asked = {
        n: {"sealed": {o: sealed[o][n] for o in others if o != n}, "members": members}
        for n, others in around.items()
        if len(others) >= needed
    }
    if len(asked) < LEAST:
        raise RoundError(f"{len(sealed)} of {len(keys)} clients shared their keys: too many dropped out")
    texts = {n: p["masked"][n] for n, p in ask(MASKED, asked).items()}
    masked = {n: np.frombuffer(text, "<u4").astype(np.uint32) for n, text in texts.items()}
    asked = {
        n: {"sent": {o: b"" for o in there if o in masked}, "dropped": {o: b"" for o in there if o not in masked}}
        for n, there in around.items()
        if n in masked and sum(o in masked for o in there) >= needed
    }
    if len(masked) < LEAST or not asked:
        raise RoundError(f"{len(masked)} of {len(keys)} clients sent: too many dropped out")
    shares = {n: p["shares"] for n, p in ask(REVEAL, asked).items()}
    total = Collector(around, keys, needed).total(masked, shares)
    return Sum(total, tuple(sorted(whose[n] for n in sealed)), tuple(sorted(whose[n] for n in masked)))


def _pack_view(view: View) -> bytes:
    entries = b"".join(other.to_bytes(8, "big") + digest for other, digest in view.items())
    return len(view).to_bytes(4, "big") + entries


def _unpack_view(plain: bytes) -> tuple[View, bytes]:
    """What `_pack_view` packed, and what came behind it."""
    size, end = 8 + _DIGEST, 4 + (8 + _DIGEST) * int.from_bytes(plain[:4], "big")
    entries = (plain[start : start + size] for start in range(4, min(end, len(plain)), size))
    return {int.from_bytes(entry[:8], "big"): entry[8:] for entry in entries}, plain[end:]


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
    """How many of a neighbourhood must stay for the masks to come off: a share, and as many as hold a liar off."""
    least = math.ceil(0.75 * members) if members > MOST_NEIGHBOURS else 2 * members // 3 + 1
    return max(math.ceil(share * members), least, LEAST)
