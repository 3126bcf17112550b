"""What was asked of a site: an append-only record in its state folder, for the owner of the rows.

A line for each introduction, each round, each question about figures, and each other message that was refused:
who asked, by which run and scenario, what it cost and why it was refused. Its lines are chained as those of a
ledger are (`fedlora.privacy.chain`). It holds no text of a row, and what a server wrote is cut and made printable.

What was spent is the ledger's to say. So a record that cannot be written is a warning, and no training fails of
it. A damaged one is written on without its head, so that the damage shows for as long as it is there.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora import wire, wire_base
from fedlora.deploy.serving import Serving, Words
from fedlora.deploy.state import State
from fedlora.errors import UserError
from fedlora.privacy import chain
from fedlora.reports.tables import Table
from fedlora.returned import finite

NAME = "history.jsonl"
INTRODUCTION, ROUND, FIGURES, FORGOTTEN = "introduction", "round", "figures", "forgotten"
RESTORED, FINISHED, PERSONAL, SURVEY = "restored", "finished", "trained further", "survey"
STATISTIC = "statistic"
WHAT = {  # by kind
    "query": INTRODUCTION,
    "train": ROUND,
    "evaluate": FIGURES,
    f"query.{wire.END}": FINISHED,
    f"query.{wire.SURVEY}": SURVEY,
    f"query.{wire_base.STATISTIC}": STATISTIC,
}
ANSWERED, AGAIN, REFUSED, FAILED = "answered", "answered again", "refused", "failed"
KEYS = (  # of a line, beside `time`, `what` and `outcome`
    "run",
    "round",
    "submitter",
    "scenario",
    "digest",
    "strategy",
    "task",
    "epsilon_asked",
    "epsilon_spent",
    "epsilon_site",
    "why",
)
_MOST_EPSILON = 1e9
_MOST = 500  # characters of what somebody else wrote

logger = logging.getLogger(__name__)


class History:
    """The record of one site."""

    def __init__(self, folder: Path) -> None:
        """Open the record, or start one.

        Args:
            folder: the site's state.
        """
        self.file = folder / NAME
        self._lines, self._chain, self._size, self._whole = 0, "", 0, True
        try:
            lines = read(self.file)
            self._lines, self._chain = len(lines), lines[-1]["chain"] if lines else ""
        except UserError as error:
            self._whole = False
            logger.error("%s: what is asked from now on stands behind it", error)
        if self.file.exists():
            self._size = self.file.read_bytes().rfind(b"\n") + 1

    def write(self, what: str, outcome: str, **told: Any) -> None:
        """Add a line; a warning where it cannot be written.

        Args:
            what: was asked.
            outcome: of it.
            told: of `KEYS` those that are known.
        """
        line: dict[str, Any] = {
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "what": printable(what),
            "outcome": outcome,
        }
        line |= {key: printable(v) if isinstance(v := told.get(key), str) else v for key in KEYS}
        line = finite(line)
        last = chain.link(self._chain, line)
        text = (json.dumps({**line, "chain": last}) + "\n").encode()
        try:
            if self._whole and not self._lines:
                chain.write_head(self.file, 0, "")  # so that a record without a head is one that lost it
            with self.file.open("ab") as stream:
                stream.truncate(self._size)  # of what an interruption cut short
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            self._size, self._lines, self._chain = self._size + len(text), self._lines + 1, last
            if self._whole:
                chain.write_head(self.file, self._lines, last)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.file, error.strerror or error)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; none where nothing was asked yet.

    Raises:
        UserError: it is not as it was written.
    """
    if not file.exists() and not chain.head_of(file).exists():
        return []
    return chain.verified(file, _checked)


def known(kind: str, words: Words, loaded: Mapping[str, Serving], state: State, client: int) -> dict[str, Any]:
    """What a line says of the run that a message is about, and of its scenario, however wrong that is.

    Args:
        kind: of the message.
        words: of it.
        loaded: runs that a model is loaded for.
        state: of the site, where it keeps introductions.
        client: which one the site is.
    """
    key = str(words.get("run"))
    here = loaded.get(key)
    of = words if kind == "query" else (here.words if here else state.introduction(key) or {})
    told = of.get("scenario")
    spent = {"run": key, "epsilon_spent": here.epsilon(client) if here else None}
    return {**spent, **_described(told)} if isinstance(told, Mapping) else spent


def _described(told: Mapping[str, Any]) -> dict[str, Any]:
    strategy, privacy = (
        part if isinstance(part := told.get(key), Mapping) else {} for key in ("strategy", "privacy")
    )
    asked = privacy.get("epsilon")
    return {
        "scenario": _word(told.get("name")),
        "digest": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16],
        "strategy": _word(strategy.get("use")),
        "task": _word(told.get("task")),
        "epsilon_asked": asked if isinstance(asked, int | float) and 0 < asked < _MOST_EPSILON else None,
    }


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The record as a terminal shows it."""
    if not lines:
        return ["nothing was asked of this site yet"]
    head = ("time", "asked", "run", "submitter", "scenario", "strategy", "promised", "spent", "site", "outcome")
    return Table(head, [_row(line) for line in lines], frozenset({0, 1, 2, 3, 4, 5, 9})).text()


def asked(line: Mapping[str, Any]) -> str:
    """What a line is about, in words, such as `round 2`."""
    return str(line["what"]) if line["round"] is None else f"{line['what']} {line['round']}"


def outcome(line: Mapping[str, Any]) -> str:
    """What became of it, with the reason."""
    return str(line["outcome"]) if line["why"] is None else f"{line['outcome']}: {line['why']}"


def printable(text: str) -> str:
    """What somebody else wrote, as a terminal may show it."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:_MOST])
    return shown if len(text) <= _MOST else f"{shown}..."


def _row(line: Mapping[str, Any]) -> list[str]:
    words = [str(line[key] or "-") for key in ("run", "submitter", "scenario", "strategy")]
    spent = [
        "-" if line[k] is None else f"{line[k]:.3g}" for k in ("epsilon_asked", "epsilon_spent", "epsilon_site")
    ]
    return [str(line["time"]), asked(line), *words, *spent, outcome(line)]


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


def _checked(where: str, line: Mapping[str, Any]) -> None:
    """One line.

    Raises:
        UserError: it lacks something.
    """
    for key in ("time", "what", "outcome"):
        if not isinstance(line.get(key), str):
            raise UserError(f"{where}: lacks or garbles {key!r}; the record is damaged")
    numbers = ("round", "epsilon_asked", "epsilon_spent", "epsilon_site")
    for key in KEYS:
        kinds = (int | float | None) if key in numbers else (str | None)
        if key not in line or not isinstance(line[key], kinds):
            raise UserError(f"{where}: lacks or garbles {key!r}; the record is damaged")
