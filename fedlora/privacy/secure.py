"""Secure aggregation, SecAgg+ (Bell et al., 2020, https://eprint.iacr.org/2020/704): the server learns a sum.

Each client hides its vector of integers modulo 2^32 under a mask of its own and one for each neighbour, which
the neighbour takes away again:

    sent_k = x_k + PRG(b_k) + sum_{j < k} PRG(s_kj) - sum_{j > k} PRG(s_kj)    mod 2^32

The seed b_k and the key behind s_kj are shared out among the neighbours, so that `threshold` of them can
help the server take off b_k of those who sent, and s_kj of those who dropped out; never both of one client.

Key agreement, encryption and secret sharing are Flower's building blocks. Its mask generator is not used: it
folds the 32 bytes of a key into 32 bits and feeds a Mersenne Twister, so that a mask can be found by trying.
Masks here are ChaCha20 keystreams. Clients go by pseudonyms that are dealt anew in each round.

A client's side is `fedlora.privacy.member`, the server's `fedlora.privacy.collector`; who is whose neighbour says
`fedlora.privacy.graph`, and what a number is as an integer `fedlora.privacy.grid`. Here is what they share.

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
from collections.abc import Callable, Mapping

import numpy as np

from fedlora.privacy.grid import Vector

Keys = tuple[bytes, bytes]  # the public keys of a client: for masks, and for the shares sent to it
Parts = Mapping[str, Mapping[int, bytes]]  # of a message of the protocol: what it tells, and of which client
Exchange = Callable[[str, Mapping[int, Parts]], Mapping[int, Parts]]  # asks clients, by their real ids

KEYS, SHARES, MASKED, REVEAL = "keys", "shares", "masked", "reveal"  # the exchanges of a round


def agree(key: object, public: bytes) -> bytes:
    """The secret that a private key and another client's public key have in common."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    return generate_shared_key(key, bytes_to_public_key(public))  # type: ignore[arg-type]


def keystream(secret: bytes, size: int) -> Vector:
    """`size` numbers from a secret, which without it look like chance."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    key = hashlib.sha256(secret).digest()  # used once: keys are new in each round
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, np.uint32)
