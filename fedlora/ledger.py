"""The append-only records of a run folder: `privacy.jsonl`, `clients.jsonl` and `metrics.jsonl`.

Privacy events are flushed to disk before what they bought is used. Epsilon follows from
`privacy.jsonl` alone: `replay` reads it back.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from fedlora.errors import UserError
from fedlora.privacy import Accountant, Event, epsilon

MECHANISM = "poisson_subsampled_gaussian"
NEIGHBOURS = "add_or_remove_one"


class Ledger:
    """What was spent and sent, as it happens.

    Attributes:
        events: the privacy events so far, by client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: dict[int, list[Event]] = {}
        self._last_round = 0
        if (file := folder / "privacy.jsonl").exists():
            self.events = replay(file)
            self._last_round = max((line["round"] for line in read(file)), default=0)

    def spend(self, round: int, events: Mapping[int, Event], **guarantee: Any) -> None:
        """Record what clients spent in a round, and wait until it is on disk."""
        for client, event in events.items():
            self.events.setdefault(client, []).append(event)
        self._last_round = max(self._last_round, round)
        terms = {**guarantee, "mechanism": MECHANISM, "neighbours": NEIGHBOURS}
        lines = [{"round": round, "client": c, **e.to_json(), **terms} for c, e in events.items()]
        _append(self.folder / "privacy.jsonl", lines, sync=True)

    def clients(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """A line per client and round."""
        _append(self.folder / "clients.jsonl", lines)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line per round."""
        _append(self.folder / "metrics.jsonl", [line])

    @property
    def last_round(self) -> int:
        """The last round in which anybody spent; 0 before the first."""
        return self._last_round

    def forget_after(self, round: int) -> None:
        """Drop the measurements of rounds after `round`, which are about to run again; never what was spent.

        A last line that an interruption cut short is one of them.
        """
        for name in ("clients.jsonl", "metrics.jsonl"):
            if (file := self.folder / name).exists():
                whole = file.read_bytes().rpartition(b"\n")[0]
                file.write_bytes(whole + b"\n" if whole else b"")
                kept = [line for line in read(file) if line["round"] <= round]
                part = file.with_suffix(".part")
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
                part.replace(file)

    def spent(self, round: int) -> dict[int, Event]:
        """What clients last spent in a round, by client."""
        file = self.folder / "privacy.jsonl"
        if round > self.last_round or not file.exists():
            return {}
        return {line["client"]: Event.from_json(line) for line in read(file) if line["round"] == round}


def read(file: Path, growing: bool = False) -> list[dict[str, Any]]:
    """The lines of a record.

    Args:
        file: one line of JSON for each entry.
        growing: pass over a last line that is not whole: its run may be writing it.

    Raises:
        UserError: a line is not whole, or the file cannot be read.
    """
    try:
        texts = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    lines = []
    if texts[-1] and not growing:
        raise UserError(f"{file}:{len(texts)}: the last line is cut short; the record is damaged")
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not a line of JSON; the record is damaged") from error
        if not isinstance(line, dict):
            raise UserError(f"{file}:{number}: not a JSON object; the record is damaged")
        lines.append(line)
    return lines


def replay(file: Path) -> dict[int, list[Event]]:
    """The privacy events of every client, from `privacy.jsonl` alone.

    Raises:
        UserError: a line is damaged or of another mechanism.
    """
    events: dict[int, list[Event]] = {}
    for number, line in enumerate(read(file), 1):
        if line.get("mechanism") != MECHANISM or line.get("neighbours") != NEIGHBOURS:
            raise UserError(f"{file}:{number}: an event of another mechanism; it cannot be accounted for here")
        try:
            if any(type(line[key]) is not int or line[key] < 0 for key in ("round", "client")):
                raise ValueError("round or client")
            events.setdefault(line["client"], []).append(Event.from_json(line))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{file}:{number}: lacks or garbles {error}; the record is damaged") from error
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}; the record is damaged") from error
    return events


def epsilon_of(file: Path) -> float:
    """The largest epsilon over clients, from `privacy.jsonl` alone; 0 where nothing was spent.

    Raises:
        UserError: a line is damaged, or was spent on other terms than the first.
    """
    events, lines = replay(file), read(file)
    for number, line in enumerate(lines, 1):
        delta, accountant = (line.get(key) for key in ("delta", "accountant"))
        fine = isinstance(delta, float) and 0 < delta < 1 and accountant in get_args(Accountant)
        if not fine or (delta, accountant) != (lines[0]["delta"], lines[0]["accountant"]):
            raise UserError(f"{file}:{number}: delta or accountant is damaged, or not as in line 1")
    return max(
        (epsilon(spent, lines[0]["delta"], lines[0]["accountant"]) for spent in events.values()), default=0.0
    )


def _append(file: Path, lines: Iterable[Mapping[str, Any]], sync: bool = False) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
