"""The append-only records of a run folder: `privacy.jsonl`, `clients.jsonl` and `metrics.jsonl`.

Privacy events are flushed to disk before what they bought is used. Epsilon follows from
`privacy.jsonl` alone: `replay` reads it back.

The lines of `privacy.jsonl` are chained (`fedlora.privacy.chain`). What a line paid for that an interruption cut
short, or that the head does not count yet, was not used, or is paid again.

One process at a time writes: the first line locks `privacy.jsonl` (`fedlora.privacy.lock`), and each further one
first makes sure that the head is still the one that this ledger wrote.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fedlora.errors import UserError
from fedlora.privacy import chain, lock
from fedlora.privacy.accounting import Accountant, Event, added, alike, epsilon, in_sums
from fedlora.privacy.chain import read as read
from fedlora.privacy.wording import FROM_SERVER, IN_SUMS, OWN_ALONE, statement
from fedlora.returned import finite

MECHANISM = "poisson_subsampled_gaussian"
BANDED = "cyclic_poisson_banded_gaussian"  # another word: who knows no bands refuses the line
MAX_DRAWS = 10_000  # of a round: more is no interruption
NEIGHBOURS = "zero_out"  # how the datasets of all units but the next differ: `privacy.neighbours` says it
EARLIER = "add_or_remove_one"  # what 0.1.0 called it; the events and their epsilon are the same
SILENT = "one_sends_nothing"  # how the runs of unit client_from_server differ
_TWICE = "one draw of the noise would hide two sums, and no epsilon covers that: start again in another folder"
UNITS = ("example", "person", "client", FROM_SERVER)


class Whole(NamedTuple):
    """A client as a whole, which the server sees in sums that carry its share of the noise."""

    client: int


class Own(NamedTuple):
    """A site, for its examples, in all runs together: one budget, whichever of their clients it was."""


# Whose budget: a client's, for its examples; None: the server's, for its clients; or as their classes say.
Holder = int | None | Whole | Own
Paid = tuple[Event, str, int]  # with the digest of what its noise hides, and which draw that noise is
Events = tuple[Event, ...]  # of one holder, as `privacy.added` puts them together


def unit(holder: Holder) -> str:
    """What the budget of a holder protects; `example` also where these are persons."""
    return FROM_SERVER if isinstance(holder, Whole) else "client" if holder is None else "example"


def bands_of(events: Mapping[Holder, Iterable[Event]], protected: str) -> set[int]:
    """The bands of the noise that hides those of a unit."""
    own = "example" if protected == "person" else protected
    return {event.bands for holder, spent in events.items() if unit(holder) == own for event in spent}


def neighbours(unit: str) -> str:
    """How the datasets or runs differ that a guarantee of a unit cannot tell apart."""
    return SILENT if unit == FROM_SERVER else NEIGHBOURS


class Ledger:
    """What was spent and sent, as it happens.

    Attributes:
        events: the privacy events so far, by client; under None those that protect whole clients, under `Own`
            those of a site's own account. Those on equal terms stand together, so that memory does not grow with
            the rounds.
        released: the last round that the server's noise was paid for, and what that cost; None before any.
    """

    def __init__(self, folder: Path, known: tuple[int, str] = (0, ""), round: int = 0) -> None:
        """Open a run folder's ledger, or start one.

        Args:
            folder: of the run.
            known: the `position` that a checkpoint was saved with.
            round: that it was saved after. Those beyond it run again, also where the checkpoint knows their lines:
                one that was lost may have been saved after them.

        Raises:
            UserError: what is there is damaged, lacks what the checkpoint has seen, or is in use by another
                process.
        """
        self.folder = folder
        self.events: dict[Holder, Events] = {}
        self.released: tuple[int, Event] | None = None
        self._unseen: dict[tuple[int, int], dict[Holder, set[Paid]]] = {}
        # By round, of each draw its digest, and the steps on its terms that were paid before.
        self._drawn: dict[int, dict[Holder, dict[int, tuple[str, int]]]] = {}
        file = folder / "privacy.jsonl"
        self._lock = lock.hold(file) if file.exists() else None
        self._head = chain.read_head(file)  # as this ledger left it
        lines = verified(file) if file.exists() or self._head is not None else []
        if len(lines) < known[0] or (known[0] and lines[known[0] - 1]["chain"] != known[1]):
            raise UserError(
                f"{file}: is not the ledger that the checkpoint was saved with, whose {known[0]} lines it should "
                "begin with; restore the file, or start again in another folder"
            )
        for number, line in enumerate(lines):
            holder, event = _holder(line), Event.from_json(line)
            digest, draw = line.get("digest", ""), line.get("draw", 0)
            if number >= known[0] or line["round"] > round:  # of a round that runs again
                again = self._unseen.setdefault((line["round"], line.get("attempt", 0)), {})
                again.setdefault(holder, set()).add((event, digest, draw))
                self._note_draw(line["round"], holder, event, digest, draw)
            self._note(line["round"], holder, event)
        self._lines, self._chain = len(lines), lines[-1]["chain"] if lines else ""
        self._size = file.read_bytes().rfind(b"\n") + 1 if file.exists() else 0

    def spend(
        self,
        round: int,
        events: Mapping[Holder, Event],
        attempt: int = 0,
        drawn: Mapping[Holder, tuple[str, int]] | None = None,
        **guarantee: Any,
    ) -> None:
        """Record what clients spent in a round, and wait until it is on disk.

        Args:
            round: from 1.
            events: by holder.
            attempt: at the round; from 1 where too few replied before.
            drawn: by holder the digest of what its noise hides, and which draw that noise is; where it can be
                drawn again.
            guarantee: the terms that every line repeats; with `run` they are a site's own account.

        Raises:
            UserError: a line would be none that can be read again, its noise was drawn for something else, or
                another process writes here, or did.
        """
        if not events:
            return
        terms = {**guarantee, "neighbours": neighbours(guarantee["unit"])}
        file, text, last = self.folder / "privacy.jsonl", "", self._chain
        spent: list[tuple[Holder, Event]] = []
        for holder, event in events.items():
            client = holder.client if isinstance(holder, Whole) else holder
            named = {"mechanism": MECHANISM if event.bands == 1 else BANDED}
            line = {"round": round, "client": client, **event.to_json(), **named, **terms}
            line |= {"attempt": attempt} if attempt else {}
            digest, draw = (drawn or {}).get(holder, ("", 0))
            before, _ = self._drawn.get(round, {}).get(holder, {}).get(draw, ("", 0))
            if digest and before and (before != digest or event.sharers > 1):
                raise UserError(f"{file}: {_TWICE}; it was not written")
            line |= {"digest": digest, "draw": draw} if digest else {}
            spent.append((_checked(line, f"{file}:{self._lines + len(spent) + 1}", "it was not written"), event))
            last = chain.link(last, line)
            text += json.dumps({**line, "chain": last}) + "\n"
        self._own(file)
        if not self._lines:
            self._put_head(file, 0, "")  # so that a ledger without a head is one that lost it
        with file.open("ab") as stream:
            stream.truncate(self._size)  # of what an interruption cut short
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._drawn = {r: of for r, of in self._drawn.items() if r >= round}  # none of those before runs again
        for holder, event in spent:  # on disk, and not before: a full disk may have room again
            self._note_draw(round, holder, event, *(drawn or {}).get(holder, ("", 0)))
            self._note(round, holder, event)
        self._size, self._lines, self._chain = self._size + len(text.encode()), self._lines + len(events), last
        self._put_head(file, self._lines, self._chain)

    def _own(self, file: Path) -> None:
        """Make sure that nobody else writes, and that nobody has since this ledger did.

        Raises:
            UserError: somebody does, or has.
        """
        self._lock = self._lock or lock.hold(file)
        if not self._lock.mine:
            raise UserError(f"{file}: in use by the process that this one was forked from")
        if chain.read_head(file) != self._head or file.stat().st_size < self._size:
            raise UserError(f"{file}: the ledger moved underfoot: somebody else wrote to it; start again to go on")

    def _put_head(self, file: Path, lines: int, last: str) -> None:
        chain.write_head(file, lines, last)
        self._head = lines, last

    def _note(self, round: int, holder: Holder, event: Event) -> None:
        self.events[holder] = added(self.events.get(holder, ()), event)
        if holder is None:
            self.released = round, event

    def _note_draw(self, round: int, holder: Holder, event: Event, digest: str, draw: int) -> None:
        """Before the event is noted: what was paid for before it is where its noise begins."""
        if digest:
            draws = self._drawn.setdefault(round, {}).setdefault(holder, {})
            first = draws[draw][1] if draw in draws else self.paid(holder, event)
            draws[draw] = digest, first

    def paid(self, holder: Holder, event: Event) -> int:
        """How many steps a holder has paid for on the terms of an event."""
        return alike(self.events.get(holder, ()), event)

    def firsts(self, round: int, holder: Holder) -> tuple[int, ...]:
        """The number of each draw's first step in a round so far, counted over the run."""
        draws = self._drawn.get(round, {}).get(holder, {})
        return tuple(draws.get(n, ("", 0))[1] for n in range(max(draws, default=-1) + 1))

    def clients(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """A line per client and round."""
        _append(self.folder / "clients.jsonl", lines)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line per round."""
        _append(self.folder / "metrics.jsonl", [line])

    @property
    def position(self) -> tuple[int, str]:
        """How many lines there are, and the chain of the last."""
        return self._lines, self._chain

    def forget_after(self, round: int, judged: int | None = None) -> None:
        """Drop the measurements of rounds after `round`, which are about to run again; never what was spent.

        A last line that an interruption cut short is one of them.

        Args:
            round: the last whose clients' lines are kept.
            judged: the last whose own line is; by default the same.
        """
        for name, last in (("clients.jsonl", round), ("metrics.jsonl", round if judged is None else judged)):
            if (file := self.folder / name).exists():
                kept = [line for line in read(file, torn=True) if line["round"] <= last]
                part = file.with_suffix(".part")
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
                part.replace(file)

    def spent(self, round: int, attempt: int = 0) -> Mapping[Holder, Collection[Paid]]:
        """What was spent by holder, when the ledger was opened, in an attempt at a round that runs again."""
        return self._unseen.get((round, attempt), {})

    def drawn(self, round: int) -> Mapping[Holder, tuple[str, ...]]:
        """What noise was drawn for in a round so far: by holder, the digest of each draw, from the first."""
        return {
            holder: tuple(draws.get(n, ("", 0))[0] for n in range(max(draws) + 1))
            for holder, draws in self._drawn.get(round, {}).items()
        }


def replay(file: Path) -> dict[Holder, list[Event]]:
    """The privacy events of every holder of a budget, from `privacy.jsonl` alone.

    Raises:
        UserError: a line is damaged, edited, missing or of another mechanism.
    """
    events: dict[Holder, list[Event]] = {}
    for line in verified(file, headless=True):
        events.setdefault(_holder(line), []).append(Event.from_json(line))
    return events


def verified(file: Path, headless: bool = False) -> list[dict[str, Any]]:
    """The whole lines of a privacy ledger, each checked by itself, against those before it and by the head.

    Args:
        file: `privacy.jsonl`, or a copy.
        headless: whether it may be a copy without its head.

    Raises:
        UserError: it is not as it was written.
    """
    hidden: dict[tuple[Any, ...], str] = {}  # what each draw of the noise hides

    def checked(where: str, line: Mapping[str, Any]) -> None:
        _checked(line, where)
        if digest := line.get("digest"):
            draw = (line["round"], line["unit"], line["client"], line.get("draw", 0))
            if hidden.get(draw, digest) != digest or (draw in hidden and "sharers" in line):
                raise UserError(f"{where}: {_TWICE}")
            hidden[draw] = digest

    return chain.verified(file, checked, headless)


def _checked(line: Mapping[str, Any], where: str, so: str = "the record is damaged") -> Holder:
    """Whose budget a line is about, which is as this module writes lines.

    Args:
        line: to be written, or that was read.
        where: it stands.
        so: what follows where it is not.

    Raises:
        UserError: it is not.
    """
    relation = neighbours(str(line.get("unit")))
    known = (relation, EARLIER) if relation == NEIGHBOURS else (relation,)
    mechanism = MECHANISM if line.get("bands", 1) == 1 else BANDED
    if line.get("mechanism") != mechanism or line.get("neighbours") not in known:
        raise UserError(f"{where}: an event of another mechanism; it cannot be accounted for here")
    try:
        held = ("round",) if line["unit"] == "client" and line["client"] is None else ("round", "client")
        if line["unit"] not in UNITS or any(type(line[key]) is not int or line[key] < 0 for key in held):
            raise ValueError("unit, round or client")
        if type(line.get("attempt", 0)) is not int or line.get("attempt", 0) < 0:
            raise ValueError("attempt")
        digest, draw = line.get("digest", ""), line.get("draw", 0)
        if type(digest) is not str or type(draw) is not int or not 0 <= draw <= MAX_DRAWS:
            raise ValueError("digest or draw")
        Event.from_json(dict(line))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: lacks or garbles {error}; {so}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}; {so}") from error
    return _holder(line)


def _holder(line: Mapping[str, Any]) -> Holder:
    if "run" in line:
        return Own()
    client: int | None = line["client"]
    return Whole(client) if line["unit"] == FROM_SERVER and client is not None else client


def epsilon_of(
    file: Path, unit: str = "example", accountant: Accountant | None = None, in_sum: bool = False
) -> float:
    """The largest epsilon over those who hold a budget, from `privacy.jsonl` alone; 0 where nothing was spent.

    Args:
        file: the ledger.
        unit: what is protected, `example`, `person` or `client`.
        accountant: by default the one that the ledger names.
        in_sum: from those who see sums alone, where clients share noise out.

    Raises:
        UserError: a line is damaged, or was spent on other terms than the first of its unit.
    """
    events: dict[Holder, Events] = {}
    first: Mapping[str, Any] = {}
    for number, line in enumerate(verified(file, headless=True), 1):
        delta, named = line.get("delta"), line.get("accountant")
        first = first or (line if line["unit"] == unit else {})
        fine = isinstance(delta, float) and 0 < delta < 1 and named in get_args(Accountant)
        if not fine or (line["unit"] == unit and (delta, named) != (first["delta"], first["accountant"])):
            raise UserError(f"{file}:{number}: delta or accountant is damaged, or not as in the first line")
        if line["unit"] == unit:
            holder, event = _holder(line), Event.from_json(line)
            events[holder] = added(events.get(holder, ()), in_sums([event])[0] if in_sum else event)
    return max(
        (epsilon(e, first["delta"], accountant or first["accountant"]) for e in events.values()), default=0.0
    )


def statements(run: Path) -> list[str]:
    """What a run's ledger, or a `privacy.jsonl`, says that was spent, by every accountant, a line each.

    Raises:
        UserError: it is damaged.
    """
    file = run / "privacy.jsonl" if run.is_dir() else run
    lines = [f"{file}: whole, {sum(map(len, replay(file).values()))} events"]
    every = read(file, torn=True)
    for unit, line in {line["unit"]: line for line in every}.items():
        mine = [other for other in every if other["unit"] == unit]
        honest, shares = min(other.get("honest", 1.0) for other in mine), any("sharers" in other for other in mine)
        summed = [IN_SUMS[unit]] if shares else []
        for said_of, accountant in product([unit, *summed], get_args(Accountant)):
            spent = epsilon_of(file, unit, accountant, said_of in summed)
            bands = bands_of(replay(file), unit)
            told = (honest, bands, line.get("person"))
            said = statement(spent, line["delta"], said_of, accountant, *told)
            if summed and said_of == unit:
                said = f"from everybody, {said}{OWN_ALONE}"
            lines.append(f"  {accountant}  {said}")
    return lines


def _append(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines))
