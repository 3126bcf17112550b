"""`fedlora site restore`: a backup back in the state folder, where what was spent is counted right or too high.

A backup is older than what happened after it. What a ledger lacks would count as never spent. So:

- **A line in either is a line in both.** Where the state has lines that the backup lacks nothing is restored,
  unless the ledgers are to be merged: then they have the backup's lines and the state's.
- **What neither has is for the owner to say.** Where the state's ledger is gone, or does not begin with the
  backup's, rounds may lie between that nobody here knows of. They are named (`Lost`) and paid for in the ledgers
  before these are put in place.
- **No noise is used twice.** A site draws noise from the operating system for each training, and keeps none. What
  it answered in a round is in no backup, and answers in the state are removed: a round under way is trained again,
  with fresh noise, and paid for again. Steps of banded noise are counted by the ledger, so they never go back.

Ledgers come first, then all else. An interruption leaves a ledger that is refused, or rounds that are charged a
second time when this is run again.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.deploy import history
from fedlora.deploy.account import terms_of
from fedlora.deploy.answers import ANSWERS
from fedlora.deploy.backup import ACCOUNT, records, unpack
from fedlora.deploy.history import History
from fedlora.deploy.site import Site, load
from fedlora.deploy.state import JUDGED, RUN, State
from fedlora.errors import UserError, counted, suggestion
from fedlora.privacy import accounting, chain, ledger, lock
from fedlora.privacy.accounting import Event, adds, alike, epsilon, in_sums
from fedlora.privacy.ledger import Ledger, Own
from fedlora.scenario import Scenario

NONE, ALL = "none", "all"  # words of --lost
_MOST_LOST = 10**6  # rounds
_SHOWN = 8  # rounds in a line

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        files: that came back.
        lost: rounds that were charged because they may have been trained after the backup, by run.
        merged: lines of ledgers that the backup lacked and the state had.
        before: epsilon that the backup's account says; None where it has none.
        after: the same of the account now.
    """

    files: int
    lost: Mapping[str, int]
    merged: int
    before: float | None
    after: float | None

    def lines(self) -> list[str]:
        """What a terminal shows."""
        told = [f"{counted(self.files, 'file')} restored"]
        if self.merged:
            told.append(f"{counted(self.merged, 'line')} of ledgers that the backup lacked are kept")
        told += [f"{run}: {counted(rounds, 'round')} charged as lost" for run, rounds in self.lost.items()]
        if self.after is not None:
            told.append(f"epsilon {self.before or 0.0:.3f} by the backup, {self.after:.3f} by the account now")
        told.append("a round that was under way is trained again, with fresh noise, and paid for again")
        return told


def restore(
    file: Path, backup: Path, secret: Path | None = None, lost: Sequence[str] = (), merge: bool = False
) -> Restored:
    """Put a backup's files back into a site's state folder.

    Args:
        file: the site's YAML file.
        backup: the file that `fedlora site backup` wrote.
        secret: the file that it was encrypted under.
        lost: what may have been trained after the backup, by runs whose rounds the state does not have: `none`,
            `all` that the backup's runs may spend, or `RUN=ROUNDS`, or `RUN=FILE` with the submitter's ledger.
        merge: whether ledgers get the lines of both, where the state has some that the backup lacks.

    Raises:
        UserError: a worker is up, the backup is not this site's, or epsilon could be counted too low.
    """
    site = load(file)
    try:
        site.folder.mkdir(parents=True, exist_ok=True)
        held = lock.hold(site.folder / "lock")
        with tempfile.TemporaryDirectory(prefix=".restoring-", dir=site.folder) as new:
            made = _restored(site, backup, Path(new), unpack(backup, Path(new), secret), lost, merge)
    except OSError as error:
        raise UserError(f"{error.filename or site.folder}: {error.strerror or error}; run this again") from error
    History(site.folder).write(history.RESTORED, history.ANSWERED)
    del held  # not before
    return made


def _restored(
    site: Site, backup: Path, new: Path, told: Mapping[str, Any], lost: Sequence[str], merge: bool
) -> Restored:
    """Make every ledger as it is to be, beside the state; then put them and all else in place."""
    if told["site"] != site.name:
        raise UserError(f"{backup}: is a backup of the site {told['site']!r:.80}, and this is {site.name!r}")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(told["made"]))
    before, gone, ahead = _spent(site, new), False, dict[str, Sequence[Line]]()
    for name in dict.fromkeys([*records(new), *records(site.folder)]):
        there, here = _lines(new / name), _own(site.folder / name)
        common = _common(there, here)
        gone |= common < len(there) or (name == ACCOUNT and not here)
        if here[common:]:
            ahead[name] = here[common:]
            _write(new / name, [*there, *here[common:]])
    gone |= site.privacy is not None and not (site.folder / ACCOUNT).exists()
    if ahead and not merge:
        raise UserError(
            f"{site.folder}: holds what was spent after the backup of {when} was made: {_between(ahead)}. A "
            "ledger that goes back would count less: write --merge, and the ledgers have the lines of both"
        )
    if gone and not lost:
        raise UserError(*_asks(site, new, when))
    charged = _charge(site, new, lost)
    after, merged = _spent(site, new), sum(map(len, ahead.values()))
    return Restored(_place(site, new), charged, merged, before, after)


def _lines(file: Path) -> list[dict[str, Any]]:
    return ledger.verified(file) if file.exists() or chain.head_of(file).exists() else []


def _own(file: Path) -> list[dict[str, Any]]:
    """The lines of a ledger of the state.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _lines(file)
    except UserError as error:
        raise UserError(
            f"{error}. To restore a backup instead, move {file.name} and {chain.head_of(file).name} elsewhere: "
            "what was spent after the backup then counts as lost"
        ) from error


def _common(one: Sequence[Line], other: Sequence[Line]) -> int:
    """How many lines two records begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _write(file: Path, lines: Iterable[Line]) -> None:
    """A record of some lines, chained again."""
    last, text, count = "", "", 0
    for line in lines:
        plain = {key: value for key, value in line.items() if key != "chain"}
        last, count = chain.link(last, plain), count + 1
        text += json.dumps({**plain, "chain": last}) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    chain.write_head(file, count, last)


def _spent(site: Site, folder: Path) -> float | None:
    """What a folder's account says; None where it is of nothing."""
    cap, file = site.privacy, folder / ACCOUNT
    if cap is None or not file.exists():
        return None
    return epsilon(ledger.replay(file).get(Own(), ()), cap.delta, cap.accountant)


def _between(ahead: Mapping[str, Sequence[Line]]) -> str:
    """The runs and rounds of some lines."""
    rounds: dict[str, set[int]] = {}
    for name, lines in ahead.items():
        for line in lines:
            rounds.setdefault(str(line.get("run", Path(name).parent.name)), set()).add(line["round"])
    return "; ".join(f"{run}, {_listed(sorted(of))}" for run, of in rounds.items())


def _listed(rounds: Sequence[int]) -> str:
    more = f" and {len(rounds) - _SHOWN} more" if len(rounds) > _SHOWN else ""
    return f"round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds[:_SHOWN]))}{more}"


def _asks(site: Site, new: Path, when: str) -> list[str]:
    """What the owner has to say, where nobody here knows what was trained after the backup."""
    known = [f"{run} ({counted(len(_example_lines(new, run)), 'round')} paid)" for run in _paid(new)]
    return [
        f"{site.folder}: its ledger does not have all that the backup's has, so nobody here can say what was "
        f"trained after {when}. Say it with --lost:",
        f"  the backup knows of {', '.join(known) or 'no run'}",
        "  --lost none          nothing was: no worker was up after the backup",
        "  --lost RUN=ROUNDS    so many rounds of a run at most",
        "  --lost RUN=FILE      what the submitter's ledger says (privacy.jsonl); for runs that began later too",
        "  --lost all           all that the backup's runs may spend by their promise; name later runs beside it",
    ]


def _paid(folder: Path) -> list[str]:
    """The runs that have a ledger."""
    return [Path(name).parent.name for name in records(folder) if name != ACCOUNT]


def _example_lines(folder: Path, run: str) -> list[dict[str, Any]]:
    """The lines of a run's ledger that are about a site's examples, or persons."""
    lines = _lines(folder / "runs" / run / "privacy.jsonl")
    return [line for line in lines if line["unit"] in ("example", "person")]


def _charge(site: Site, new: Path, lost: Sequence[str]) -> dict[str, int]:
    """Pay for what may have been trained after the backup; gives the rounds by run.

    Raises:
        UserError: it cannot be known what that cost.
    """
    charged: dict[str, int] = {}
    if NONE in lost and len(lost) > 1:
        raise UserError("--lost none: says that nothing was trained; name nothing beside it")
    for word in lost:
        if word in (NONE, ALL):
            continue
        run, equals, what = word.partition("=")
        if not equals or not RUN.fullmatch(run):
            raise UserError(f"--lost {word}: write none, all, RUN=ROUNDS or RUN=FILE")
        if run in charged:
            raise UserError(f"--lost {word}: names {run} a second time")
        if what.isascii() and what.isdecimal():
            charged[run] = _rounds(site, new, run, int(what))
        else:
            charged[run] = _as_submitted(site, new, run, Path(what))
    if ALL in lost:
        for run in _paid(new):
            if run not in charged and not any(State(at).forgotten(run) for at in (site.folder, new)):
                charged[run] = _rounds(site, new, run, _most(new, run))
    return {run: rounds for run, rounds in charged.items() if rounds}


def _rounds(site: Site, new: Path, run: str, count: int) -> int:
    """Pay for rounds of a run, each as its last."""
    if count > _MOST_LOST:
        raise UserError(f"--lost {run}={count}: more than {_MOST_LOST:,} rounds")
    if not (lines := _example_lines(new, run)):
        raise UserError(
            f"--lost {run}={count}: the backup has no round of it ({suggestion(run, _paid(new))}), so nobody here "
            f"knows what one costs: name the submitter's ledger, {run}=FILE"
        )
    last, event = lines[-1], Event.from_json(lines[-1])
    _spend(site, new, run, [(last["round"] + turn, event) for turn in range(1, count + 1)], last)
    return count


def _as_submitted(site: Site, new: Path, run: str, file: Path) -> int:
    """Pay for what the submitter's ledger of a run says that this site spent, and its own does not."""
    if not file.is_file():
        raise UserError(f"--lost {run}={file}: is neither a number of rounds nor a file")
    told = [line for line in ledger.verified(file, headless=True) if line["client"] == site.client]
    told = [line for line in told if line["unit"] in ("example", "person")]
    have = [Event.from_json(line) for line in _example_lines(new, run)]
    events, owed = [Event.from_json(line) for line in told], list[tuple[int, Event]]()
    for line, event in zip(reversed(told), reversed(events), strict=True):  # the last rounds are those that lack
        steps = alike(events, event) - alike([*have, *(more for _, more in owed)], event)
        if steps > 0:
            owed.append((line["round"], replace(event, steps=min(steps, event.steps))))
    if owed:
        _spend(site, new, run, reversed(owed), told[-1])
    return len(owed)


def _most(new: Path, run: str) -> int:
    """The most rounds that a run can still pay for, each as its last, within what it promised.

    Raises:
        UserError: it promised nothing that would bound them.
    """
    if not (lines := _example_lines(new, run)):
        return 0
    words = State(new).introduction(run)
    asked = None if words is None else Scenario.model_validate(words["scenario"]).example_privacy
    if asked is None or asked.epsilon is None:
        raise UserError(
            f"--lost all: {run} promised no epsilon that bounds what it spent: write --lost {run}=ROUNDS or "
            f"--lost {run}=FILE beside it"
        )
    paid = [Event.from_json(line) for line in lines]
    event = paid[-1]

    def fits(rounds: int) -> bool:
        more = replace(event, steps=min(rounds * event.steps, accounting.MAX_STEPS))
        promised = asked.epsilon * (1 + 1e-9) if asked is not None and asked.epsilon is not None else 0.0
        return asked is not None and epsilon([*paid, more], asked.delta, asked.accountant) <= promised

    low, high = 0, 1
    while fits(high) and high < _MOST_LOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _spend(site: Site, new: Path, run: str, owed: Iterable[tuple[int, Event]], like: Line) -> None:
    """Put lines into a run's ledger and the account, whatever they come to."""
    folder = new / "runs" / run
    for place in (folder, new / "ledger"):
        place.mkdir(parents=True, exist_ok=True)
    own, account = Ledger(folder), Ledger(new / "ledger") if site.privacy is not None else None
    terms = {key: like[key] for key in ("delta", "unit", "accountant", "person", "honest") if key in like}
    for round, event in owed:
        before = own.events.get(site.client, ())
        if account is not None and site.privacy is not None:
            counted_ = event if event.bands == 1 else adds(before, event)
            alone = in_sums([counted_], 0.0)[0]  # whoever shares noise out, relying on nobody
            account.spend(round, {site.client: alone}, **terms_of(site.privacy, run), lost=True)
        own.spend(round, {site.client: event}, **terms, lost=True)


def _place(site: Site, new: Path) -> int:
    """Move what was made into the state folder, ledgers first; how many files."""
    here, state = site.folder, State(site.folder)
    forgotten = {run.name for run in (here / "runs").glob("*") if state.forgotten(run.name)}
    first = [path for name in records(new) for path in (new / name, chain.head_of(new / name))]
    told = _merged_log(here / history.NAME, new / history.NAME)
    if told is not None:
        first += [new / history.NAME, chain.head_of(new / history.NAME)]
    rest = [path for path in sorted(new.rglob("*")) if path.is_file() and path not in first]
    count = 0
    for path in [*first, *rest]:
        inside = path.relative_to(new)
        spent = path in first
        if not spent and inside.parts[0] == "runs" and inside.parts[1] in forgotten:
            continue
        if inside.parts[0] in (history.NAME, "history.head") and told is None:
            continue
        if inside.parts[0] == "site.log" and (here / inside).exists():
            continue
        if path.name == JUDGED and (here / inside).exists():
            both = {**json.loads(path.read_text()), **json.loads((here / inside).read_text())}
            path.write_text(json.dumps(both))
        (here / inside).parent.mkdir(parents=True, exist_ok=True)
        path.replace(here / inside)
        count += 1
    for answer in (here / "runs").glob(f"*/{ANSWERS}*"):
        answer.unlink()
    return count


def _merged_log(here: Path, there: Path) -> bool | None:
    """Put the log of both in place of the backup's; None where the state's is to stay as it is."""
    try:
        old, came = history.read(here), history.read(there)
    except UserError:
        return None  # damaged: it shows that, and stays for people to look at
    common = _common(came, old)
    if common == len(came):
        return None
    _write(there, [*came, *old[common:]])
    return True
