"""Who shares masks with whom in secure aggregation: all with all, or each with its neighbours on a ring."""

import hashlib
import math
from collections.abc import Collection, Mapping

from fedlora.errors import ContractError
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.secure import Keys

View = Mapping[int, bytes]  # whom a client takes for its neighbours, itself included, with a digest of their keys

MOST_NEIGHBOURS = 32  # beyond so many clients each one has only these, as SecAgg+ has it

NO_GRAPH = "the server gave clients neighbours that do not go together"

_CIRCLE = 2**64  # pseudonyms are on a ring of so many places
_DIGEST = 16  # bytes of a digest in a view


def neighbours(members: Collection[int]) -> dict[int, list[int]]:
    """Of each member those that it shares masks with, itself included: all, or on the ring the nearest."""
    reach, ring = MOST_NEIGHBOURS // 2, sorted(members)
    if len(ring) <= 2 * reach + 1:
        return {member: ring for member in ring}
    return {
        member: sorted(ring[(i + step) % len(ring)] for step in range(-reach, reach + 1))
        for i, member in enumerate(ring)
    }


def threshold(members: int, share: float) -> int:
    """How many of a neighbourhood must stay for the masks to come off: a share, and as many as hold a liar off."""
    least = math.ceil(0.75 * members) if members > MOST_NEIGHBOURS else 2 * members // 3 + 1
    return max(math.ceil(share * members), least, LEAST)


def sharers(members: int, survivors: float, honest: float) -> float:
    """K: how many senders of a masked sum keep their noise to themselves, at the least.

    Of those who are asked as many send as take the masks off; of these the share `honest`, and one less than all:
    whoever looks may be one of them. A client that is protected keeps its own, so they are never fewer than one.

    Args:
        members: clients of the round, at the most; more of them make each share smaller.
        survivors: the share that must stay.
        honest: of those who send.
    """
    around = min(members, MOST_NEIGHBOURS + 1)
    least = max(LEAST, math.ceil(members * threshold(around, survivors) / around))
    return max(min(honest * least, least - 1.0), 1.0)


def view_of(around: Mapping[int, Keys]) -> View:
    """A client's view, from the public keys of its neighbours and its own."""
    return {
        other: hashlib.sha256(b"".join((other.to_bytes(8, "big"), *keys))).digest()[:_DIGEST]
        for other, keys in around.items()
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


def pack_view(view: View) -> bytes:
    """A view as bytes that say where they end."""
    entries = b"".join(other.to_bytes(8, "big") + digest for other, digest in view.items())
    return len(view).to_bytes(4, "big") + entries


def unpack_view(plain: bytes) -> tuple[View, bytes]:
    """What `pack_view` packed, and what came behind it."""
    size, end = 8 + _DIGEST, 4 + (8 + _DIGEST) * int.from_bytes(plain[:4], "big")
    entries = (plain[start : start + size] for start in range(4, min(end, len(plain)), size))
    return {int.from_bytes(entry[:8], "big"): entry[8:] for entry in entries}, plain[end:]
