"""What a site has answered in a round that it paid for, so that the same question costs nothing more.

A reply can be lost: the SuperLink goes away, the server dies, the run is resumed. The server then asks for the
same round again, with the same tensors and words. The site gives the same update again, with the same noise,
which tells nobody more. To another question it trains anew, and pays.

The last round's answers are kept, one for each trip, encrypted under the site's own key. Under masks they are
forgotten when the site is asked to reveal: a second sum over other sites, in which all updates but one are the
same, would show that one. A sum may be opened without the site, and then it shows an update under the site's own
noise, which is paid for.

Where sites share the noise of examples out none is kept. A part of it is too little alone: in two sums it would
hide neither, and be paid once. So whatever the site is asked for after it trained, it trains anew, and pays.
"""

import os
from pathlib import Path
from typing import Any

from fedlora import seeding
from fedlora.adapter import Instruction
from fedlora.privacy import replay
from fedlora.privacy.noise import fresh_key

ANSWERS = "answer-"  # what the names of answers begin with
_NONCE = 12  # bytes


class Answers:
    """A site's answers in the last round of a run."""

    def __init__(self, folder: Path, key: bytes) -> None:
        """In the run's folder.

        Args:
            folder: of the run.
            key: the site's own.
        """
        self.folder, self._own = folder, key

    def question(self, instruction: Instruction, *more: Any) -> str:
        """A digest of an instruction, and of whatever else an answer follows from: other questions have others."""
        told = {name: value for name, value in vars(instruction).items() if name not in ("trip", "drawn")}
        return replay.digest(self._own, told, *more)

    def find(self, trip: int, question: str) -> bytes | None:
        """What was answered to a question; None where it was none of this round's, or is damaged."""
        from cryptography.exceptions import InvalidTag

        file = self._file(trip)
        try:
            data = file.read_bytes()
            return bytes(self._cipher().decrypt(data[:_NONCE], data[_NONCE:], question.encode()))
        except (OSError, InvalidTag, ValueError):
            return None

    def keep(self, trip: int, question: str, answer: bytes) -> None:
        """Write an answer down before it is given; those of the round before go.

        Raises:
            OSError: it cannot be written.
        """
        nonce, file = fresh_key()[:_NONCE], self._file(trip)
        part = file.with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(nonce + self._cipher().encrypt(nonce, answer, question.encode()))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
        for old in self.folder.glob(f"{ANSWERS}*") if trip == 1 else ():
            if old != file:
                old.unlink()

    def forget(self) -> None:
        """Give none of these again."""
        for file in self.folder.glob(f"{ANSWERS}*"):
            file.unlink()

    def _file(self, trip: int) -> Path:
        return self.folder / f"{ANSWERS}{trip}"

    def _cipher(self) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        return ChaCha20Poly1305(seeding.key(self._own, "answers"))
