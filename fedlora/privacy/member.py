"""A client's side of a round of secure aggregation (`fedlora.privacy.secure`)."""

from collections.abc import Callable, Collection, Mapping

from fedlora.errors import ContractError
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.graph import MOST_NEIGHBOURS, check_views, pack_view, threshold, unpack_view, view_of
from fedlora.privacy.grid import Vector
from fedlora.privacy.noise import fresh_key
from fedlora.privacy.secure import KEYS, MASKED, SHARES, Keys, Parts, agree, keystream

SHOWS = "the server asks for shares that would show a single client's update"


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
            raise ContractError("too few neighbours, or the keys sent for this client are not its own")
        self._around, self._threshold = dict(around), needed
        parts = [create_shares(secret, needed, len(around)) for secret in (self._seed, self._mask_secret)]
        sealed, view = {}, pack_view(view_of(self._around))
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
        views = {self.name: view_of(self._around)}
        for other, text in sealed.items():
            views[other], plain = unpack_view(self._open(other, text))
            source, to, seed, key = share_keys_plaintext_separate(plain)
            if (source, to) != (other, self.name):
                raise ContractError(f"shares of client {source} for {to} came as those of {other}")
            self._held[other] = (seed, key)
        if len(self._held) < self._threshold:
            raise ContractError("fewer neighbours shared their keys than it takes to take masks off")
        check_views(views)
        masked = vector + keystream(self._seed, len(vector))
        for other in sealed:
            stream = keystream(self._secret_with(other, 0), len(vector))
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
            ContractError: the server asks for what a client does not reveal.
        """
        if what == KEYS:
            return {"mask": {self.name: self.keys[0]}, "share": {self.name: self.keys[1]}}
        if what == SHARES:
            if set(told["mask"]) != set(told["share"]):
                raise ContractError("the server sends one of the two keys of a client")
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
            return agree((self._mask_key, self._share_key)[which], self._around[other][which])
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ContractError("what the server sends for a client's key is none") from error
