"""`fedlora site restore`: a backup back in the state folder, where what was spent is counted right or too high.

A backup is older than what happened after it. What a ledger lacks would count as never spent. So:

- **A line in either is a line in both.** Where the state has lines that the backup lacks nothing is restored,
  unless the ledgers are to be merged: then they have the backup's lines and the state's.
- **What neither has is for the owner to say.** Where the state's ledger is gone, does not begin with the backup's,
  or was begun again, rounds may lie between that nobody here knows of. The owner names them, and they are paid for
  in the ledgers before these are put in place (`fedlora.deploy.lost`).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.deploy import history, lost
from fedlora.deploy.answers import ANSWERS
from fedlora.deploy.backup import ACCOUNT, KEY, records, unpack
from fedlora.deploy.history import History
from fedlora.deploy.site import Site, load
from fedlora.deploy.state import JUDGED, SURVEYS, State
from fedlora.errors import UserError, counted
from fedlora.privacy import chain, ledger, lock
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Own

_SHOWN = 8  # rounds in a line

Line = dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        files: that came back.
        lost: rounds that were charged because they may have been trained after the backup, by run.
        level: steps that were charged because one ledger had them and another did not.
        merged: lines of ledgers that the backup lacked and the state had.
        before: epsilon that the backup's account says; None where it has none.
        after: the same of the account now.
        closed: whether nothing is paid from the account any more.
        back: runs that can be asked for again, and could not before.
    """

    files: int
    lost: Mapping[str, int]
    level: int
    merged: int
    before: float | None
    after: float | None
    closed: bool
    back: Sequence[str]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        told = [f"{counted(self.files, 'file')} restored"]
        if self.merged:
            told.append(f"{counted(self.merged, 'line')} of ledgers that the backup lacked are kept")
        if self.level:
            told.append(f"{counted(self.level, 'step')} charged that one ledger had and another lacked")
        told += [f"{run}: {counted(rounds, 'round')} charged as lost" for run, rounds in self.lost.items()]
        if self.after is not None:
            told.append(f"epsilon {self.before or 0.0:.3f} by the backup, {self.after:.3f} by the account now")
        if self.closed:
            told.append("the account is closed: nobody knows what was spent, so nothing is paid from it any more")
        if self.back:
            told.append(
                f"can be asked for again: {', '.join(self.back)}; where one was forgotten after the backup, run "
                "fedlora site forget again"
            )
        told.append("a round that was under way is trained again, with fresh noise, and paid for again")
        return told


def restore(
    file: Path,
    backup: Path,
    secret: Path | None = None,
    lost: Sequence[str] = (),
    merge: bool = False,
    personalised: int | None = None,
    surveys: int | None = None,
) -> Restored:
    """Put a backup's files back into a site's state folder.

    Args:
        file: the site's YAML file.
        backup: the file that `fedlora site backup` wrote.
        secret: the file that it was encrypted under.
        lost: what may have been trained after the backup, by runs whose rounds the state does not have: `none`;
            `RUN=ROUNDS`, `RUN=FILE` with the submitter's ledger, or `RUN=all` that its promise allows; `all` that
            the site allows, after which nothing is paid any more.
        merge: whether ledgers get the lines of both, where the state has some that the backup lacks.
        personalised: steps of `fedlora site personalise` after the backup that the state's account does not have.
        surveys: surveys and noised figures that were answered after it, likewise.

    Raises:
        UserError: a worker is up, the backup is not this site's, or epsilon could be counted too low.
    """
    site = load(file)
    try:
        site.folder.mkdir(parents=True, exist_ok=True)
        held = lock.hold(site.folder / "lock")
        with tempfile.TemporaryDirectory(prefix=".restoring-", dir=site.folder) as new:
            told = unpack(backup, Path(new), secret)
            made = _restored(site, backup, Path(new), told, lost, merge, personalised, surveys)
    except OSError as error:
        raise UserError(f"{error.filename or site.folder}: {error.strerror or error}; run this again") from error
    History(site.folder).write(history.RESTORED, history.ANSWERED)
    del held  # not before
    return made


def _restored(
    site: Site,
    backup: Path,
    new: Path,
    told: Mapping[str, Any],
    words: Sequence[str],
    merge: bool,
    personalised: int | None,
    surveys: int | None,
) -> Restored:
    """Make every ledger as it is to be, beside the state; then put them and all else in place."""
    if told["site"] != site.name:
        raise UserError(f"{backup}: is a backup of the site {told['site']!r:.80}, and this is {site.name!r}")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(told["made"]))
    before, (gone, ahead) = _spent(site, new), _merged(site, new)
    if ahead and not merge:
        raise UserError(
            f"{site.folder}: holds what was spent after the backup of {when} was made: {_between(ahead)}. A "
            "ledger that goes back would count less: write --merge, and the ledgers have the lines of both"
        )
    level = lost.level(site, new, gone, ahead)
    if gone and not words:
        raise UserError(*_asks(site, new, when, ACCOUNT in gone))
    charged = lost.charge(site, new, gone, words, personalised, surveys)
    after, merged = _spent(site, new), sum(map(len, ahead.values()))
    closed = any(line.get("closed") for line in lost.lines_of(new / ACCOUNT))
    known = _known(site.folder)
    files = _place(site, new)
    back = sorted(_known(site.folder) - known)
    return Restored(files, charged, level, merged, before, after, closed, back)


def _merged(site: Site, new: Path) -> tuple[dict[str, int], dict[str, Sequence[Line]]]:
    """Give each ledger the lines of both.

    Returns:
        How many lines the backup has of each ledger whose later ones may not all be here; those that it lacked.
    """
    gone, ahead, again = dict[str, int](), dict[str, Sequence[Line]](), _begun_again(site.folder, new)
    names = [*([ACCOUNT] if site.privacy is not None else []), *records(new), *records(site.folder)]
    for name in dict.fromkeys(names):
        there, here = lost.lines_of(new / name), _own(site.folder / name)
        common = 0 if again else _common(there, here)
        if again or common < len(there) or (ACCOUNT in (name, *gone) and not (there and here)):
            gone[name] = len(there)
        if here[common:]:
            ahead[name] = here[common:]
            _write(new / name, [*there, *here[common:]])
    return gone | ({KEY: 0} if again else {}), ahead  # also where neither has a ledger


def _begun_again(here: Path, there: Path) -> bool:
    """Whether a state may be another than a backup is of.

    The site's own key shows it, and chance in the account's first line: a run that begins again has equal lines.
    """

    def marks(folder: Path) -> list[Any]:
        key, lines = folder / KEY, _own(folder / ACCOUNT)
        return [key.read_bytes() if key.exists() else None, lines[0].get("begun") if lines else None]

    return not any(a == b is not None for a, b in zip(marks(here), marks(there), strict=True))


def _known(folder: Path) -> set[str]:
    """The runs that can be asked for without another introduction."""
    state = State(folder)
    return {run for run in state.runs() if state.introduction(run) is not None}


def _own(file: Path) -> list[dict[str, Any]]:
    """The lines of a ledger of the state.

    Raises:
        UserError: it is damaged.
    """
    try:
        return lost.lines_of(file)
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


def _asks(site: Site, new: Path, when: str, account: bool) -> list[str]:
    """What the owner has to say, where nobody here knows what was trained after the backup.

    Args:
        site: whose.
        new: the ledgers, with the lines of both.
        when: the backup was made.
        account: whether the account is one of those that are gone.
    """
    rounds = {run: len(lost.example_lines(new, run)) for run in lost.paid(new)}
    known = [f"{run} ({counted(count, 'round')} paid)" for run, count in rounds.items()]
    asks = [
        f"{site.folder}: nobody here can say what was trained after {when}: its ledger does not have all that the "
        "backup's has, or was begun again. Say it with --lost:",
        f"  the ledgers know of {', '.join(known) or 'no run'}",
        "  --lost none          nothing beside it: nothing was trained or personalised",
        "  --lost RUN=ROUNDS    so many rounds of a run at most",
        "  --lost RUN=FILE      what the submitter's ledger says (privacy.jsonl); for runs that began later too",
        "  --lost RUN=all       all that the run may spend by its promise",
        "  --lost all           nobody knows: all that the site allows, and its account pays for nothing any more",
    ]
    further = [
        "  --personalised N     steps of fedlora site personalise, beside RUN=...; 0: none were",
        "  --surveys N          surveys and noised figures that were answered; 0: none was",
    ]
    return [*asks, *further] if account and site.privacy is not None else asks


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
        if path.name in (JUDGED, SURVEYS) and (here / inside).exists():
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
