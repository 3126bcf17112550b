"""A stream of bytes under a secret of the owner's: nobody reads it without, and what was changed or cut shows.

The key is made of the secret by scrypt (RFC 7914), with a salt of the file's own. The bytes go in pieces, each
under ChaCha20-Poly1305 with a nonce that counts them and says which is the last (STREAM of Hoang et al., 2015,
https://eprint.iacr.org/2015/189): pieces cannot be moved, taken out or left off.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.errors import UserError
from fedlora.privacy.noise import fresh_key

MARK = b"fedlora sealed 1\n"
LEAST = 16  # bytes of a secret
_SALT, _TAG, _PIECE = 16, 16, 2**16
_COST = {"length": 32, "n": 2**15, "r": 8, "p": 1}  # of scrypt: 32 MiB, a tenth of a second


def read_secret(file: Path) -> bytes:
    """The passphrase or key in a file, without the end of its line.

    Raises:
        UserError: it cannot be read, or is too short.
    """
    try:
        secret = file.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if len(secret) < LEAST:
        raise UserError(f"{file}: holds {len(secret)} bytes; a passphrase or key has {LEAST} at least")
    return secret


class Sealing:
    """Encrypts what is written to it."""

    def __init__(self, to: BinaryIO, secret: bytes) -> None:
        """Begin a file.

        Args:
            to: the file.
            secret: passphrase or key.
        """
        salt = fresh_key()[:_SALT]
        to.write(MARK + salt)
        self._to, self._cipher, self._left, self._count = to, _cipher(secret, salt), bytearray(), 0

    def write(self, data: bytes) -> int:
        """Take some bytes."""
        self._left += data
        while len(self._left) > _PIECE:  # one is kept: it may be the last
            self._put(bytes(self._left[:_PIECE]), last=False)
            del self._left[:_PIECE]
        return len(data)

    def close(self) -> None:
        """Write the last piece."""
        self._put(bytes(self._left), last=True)

    def _put(self, piece: bytes, last: bool) -> None:
        self._to.write(self._cipher.encrypt(_nonce(self._count, last), piece, None))
        self._count += 1


class Opening:
    """Gives what was encrypted, in order."""

    def __init__(self, file: Path, of: BinaryIO, secret: bytes) -> None:
        """Begin to read, at `MARK`.

        Args:
            file: its name, for messages.
            of: the file.
            secret: passphrase or key.
        """
        salt = of.read(len(MARK) + _SALT)[len(MARK) :]
        self.file, self._made, self._left = file, self._pieces(of, _cipher(secret, salt)), b""

    def read(self, size: int) -> bytes:
        """So many bytes, or what is left.

        Raises:
            UserError: the secret is another, or the file was changed or cut.
        """
        while len(self._left) < size and (piece := next(self._made, None)) is not None:
            self._left += piece
        given, self._left = self._left[:size], self._left[size:]
        return given

    def _pieces(self, of: BinaryIO, cipher: Any) -> Iterator[bytes]:
        from cryptography.exceptions import InvalidTag

        count, piece = 0, of.read(_PIECE + _TAG)
        while True:
            after = of.read(_PIECE + _TAG)
            try:
                yield cipher.decrypt(_nonce(count, last=not after), piece, None)
            except InvalidTag as error:
                raise UserError(
                    f"{self.file}: cannot be opened: the secret is another, or the file was changed or cut"
                ) from error
            if not after:
                return
            count, piece = count + 1, after


def _nonce(count: int, last: bool) -> bytes:
    return count.to_bytes(11, "big") + bytes([last])


def _cipher(secret: bytes, salt: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return ChaCha20Poly1305(Scrypt(salt=salt, **_COST).derive(secret))
