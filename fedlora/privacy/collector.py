"""The server's side of a round of secure aggregation (`fedlora.privacy.secure`): it learns a sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.errors import ContractError, RoundError
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.graph import neighbours, threshold
from fedlora.privacy.grid import Vector
from fedlora.privacy.noise import Stream
from fedlora.privacy.secure import KEYS, MASKED, REVEAL, SHARES, Exchange, Keys, Parts, agree, keystream


@dataclass
class Collector:
    """The server's side of one round: it gets public keys, ciphertext, masked vectors and shares."""

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
                total = total - keystream(secret, len(total))
                continue
            for other in there:  # what each of them added or took away for the one that dropped out
                stream = keystream(agree(key, self.keys[other][0]), len(total))
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
        cohort: their ids, which no client learns.
        rng: draws pseudonyms, and with them the neighbours.
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


def pseudonyms(count: int, rng: Stream) -> list[int]:
    """Names for one round, of 63 bits, that say nothing about who has them."""
    names: dict[int, None] = {}
    while len(names) < count:
        names |= {int(word) >> 1: None for word in rng.words(count - len(names))}
    return list(names)
