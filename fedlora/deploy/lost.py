"""What a restore charges: steps that one ledger has and another lacks, and what the owner says was lost.

A round is paid for in the site's account and in its run's ledger. So where one of them is gone the other says what
it had, whatever the owner says (`level`). What neither has is the owner's to say (`charge`): rounds by run, or the
submitter's ledger, and steps of training further, surveys and noised figures, which the account alone has. Where
nobody knows, the account is closed: it counts as all that the site allows, and nothing is paid from it any more.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.deploy import figures, surveyed
from fedlora.deploy.account import STATISTIC, begun, terms_of
from fedlora.deploy.backup import ACCOUNT, records
from fedlora.deploy.figures import FIGURES
from fedlora.deploy.site import Site
from fedlora.deploy.state import RUN, State
from fedlora.deploy.surveyed import SURVEY
from fedlora.errors import UserError, suggestion
from fedlora.privacy import accounting, chain, ledger
from fedlora.privacy.accounting import Event, added, adds, alike, alone, epsilon, in_sums
from fedlora.privacy.ledger import Ledger, Own
from fedlora.scenario import Scenario

NONE, ALL = "none", "all"  # words of --lost
_MOST_LOST = 10**6  # rounds
_NOISE = 1e-3, 1e5  # of the event that fills an account
_UNKNOWN = "--lost all"  # the run that it stands for; no run has such a name

Line = dict[str, Any]
Owed = Iterable[tuple[int, Event]]  # by round
Gone = Mapping[str, int]  # ledgers that may lack what was spent after a backup: how many lines it has of each


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; none where there is none.

    Raises:
        UserError: it is damaged.
    """
    return ledger.verified(file) if file.exists() or chain.head_of(file).exists() else []


def paid(folder: Path) -> list[str]:
    """The runs that have a ledger under a state folder."""
    return [Path(name).parent.name for name in records(folder) if name != ACCOUNT]


def _ledger(run: str) -> str:
    return f"runs/{run}/privacy.jsonl"


def example_lines(folder: Path, run: str) -> list[dict[str, Any]]:
    """The lines of a run's ledger that are about a site's examples, or persons."""
    lines = lines_of(folder / _ledger(run))
    return [line for line in lines if line["unit"] in ("example", "person")]


def level(site: Site, new: Path, gone: Gone, ahead: Mapping[str, Sequence[Line]]) -> int:
    """Charge the account for what runs' ledgers have and it lacks; a run whose ledger is gone the other way round.

    The backup's lines are held against one another, then those that follow: each pair ends at one time.

    Args:
        site: whose.
        new: the state folder in the making, with the ledgers of both.
        gone: as in `charge`.
        ahead: of each ledger the last lines, which the backup lacked.

    Returns:
        How many steps were charged.
    """
    if site.privacy is None:
        return 0
    account, charged = lines_of(new / ACCOUNT), 0
    then = len(account) - len(ahead.get(ACCOUNT, ()))
    for run in paid(new):
        lines, last = example_lines(new, run), ahead.get(_ledger(run), ())
        came = len(lines) - sum(line["unit"] in ("example", "person") for line in last)
        own = [
            [line for line in part if line.get("run") == run and (line["round"] or STATISTIC in line)]
            for part in (account[:then], account[then:])
        ]
        owed, left = _compared(lines[:came], own[0])
        earlier = () if _ledger(run) in gone else lines[:came]
        more, left_then = _compared(lines[came:], own[1], {} if ACCOUNT in gone else left, earlier)
        for form in left if ACCOUNT in gone else ():
            left_then[form] = left_then.get(form, 0) + left[form]
        owed += more
        kind = _statistic(lines)
        _into_account(site, new, run, owed, kind)
        lacks = []
        if _ledger(run) in gone:
            every = [line for part in own for line in part]
            likes = {replace(_alone(Event.from_json(line)), steps=0): line for line in lines}
            for form, steps in left_then.items():
                if steps and form in likes:
                    event = Event.from_json(likes[form])
                    most = min(steps * event.bands, accounting.MAX_STEPS)
                    round = 0 if STATISTIC in likes[form] else max(line["round"] for line in every)
                    lacks.append((round, replace(event, steps=most)))
        if lacks:
            _into_run(site, new, run, lacks, lines[-1], kind)
        charged += sum(event.steps for _, event in (*owed, *lacks))
    return charged


def _compared(
    lines: Sequence[Line],
    own: Sequence[Line],
    left: Mapping[Event, int] | None = None,
    earlier: Sequence[Line] = (),
) -> tuple[list[tuple[int, Event]], dict[Event, int]]:
    """What an account's lines of a run lack of the run's, and by terms the steps that they have beyond them.

    Args:
        lines: of the run.
        own: of the account, about the run; none that is of training further.
        left: steps that the account had beyond the run before these lines.
        earlier: lines of the run, whose turns under banded noise these go on with.
    """
    left = dict(left or {})
    for line in own:
        event = Event.from_json(line)
        terms = replace(event, steps=0)
        left[terms] = left.get(terms, 0) + event.steps
    owed, before = [], dict[int, tuple[Event, ...]]()
    for line in earlier:
        before[line["client"]] = added(before.get(line["client"], ()), Event.from_json(line))
    for line in lines:
        event = Event.from_json(line)
        mine = before.get(line["client"], ())
        steps = adds(mine, event).steps
        before[line["client"]] = added(mine, event)
        form = replace(_alone(event), steps=0)  # as the account counted it
        taken = min(steps, left.get(form, 0))
        if taken:
            steps, left[form] = steps - taken, left[form] - taken
        if steps:
            owed.append((line["round"], replace(_alone(event), steps=steps)))
    return owed, left


def _alone(event: Event) -> Event:
    """An event whoever shares noise out, relying on nobody."""
    return replace(alone(event), bands=1)


def charge(
    site: Site,
    new: Path,
    gone: Gone,
    words: Sequence[str],
    personalised: int | None,
    surveys: int | None = None,
) -> dict[str, int]:
    """Pay for what may have been trained after the backup; gives the rounds by run.

    Args:
        site: whose.
        new: the state folder in the making.
        gone: the ledgers that may lack what was spent after the backup.
        words: of --lost.
        personalised: steps of `fedlora site personalise`; None: the owner did not say.
        surveys: that were answered, and evaluations by `figures`; None: the owner did not say.

    Raises:
        UserError: it cannot be known what that cost.
    """
    charged: dict[str, int] = {}
    if NONE in words and len(words) > 1:
        raise UserError("--lost none: says that nothing was trained; name nothing beside it")
    if personalised is not None and not 0 <= personalised <= accounting.MAX_STEPS:
        raise UserError(f"--personalised {personalised}: should be from 0 to {accounting.MAX_STEPS:,}")
    if surveys is not None and not 0 <= surveys <= _MOST_LOST:
        raise UserError(f"--surveys {surveys}: should be from 0 to {_MOST_LOST:,}")
    for word in words:
        if word in (NONE, ALL):
            continue
        run, equals, what = word.partition("=")
        if not equals or not RUN.fullmatch(run):
            raise UserError(f"--lost {word}: write none, all, RUN=ROUNDS, RUN=FILE or RUN=all")
        if run in charged:
            raise UserError(f"--lost {word}: names {run} a second time")
        if what == ALL:
            charged[run] = _rounds(site, new, run, what, _most(site, new, gone, run))
        elif what.isascii() and what.isdecimal():
            charged[run] = _rounds(site, new, run, what, int(what))
        else:
            charged[run] = _as_submitted(site, new, run, Path(what))
    if charged and ACCOUNT in gone and personalised is None and ALL not in words and site.privacy is not None:
        raise UserError(
            "--lost: says nothing of what was personalised since, which the account alone had: add --personalised "
            "STEPS, in all runs together (0: nothing was), or --lost all if nobody knows"
        )
    silent = ACCOUNT in gone and surveys is None and ALL not in words
    if silent and (charged or NONE in words) and _survey(site, new) is not None:
        raise UserError(
            "--lost: says nothing of surveys and noised figures that were answered since, which the account alone "
            "had: add --surveys N (0: none was), or --lost all if nobody knows"
        )
    if ALL in words:
        for run in paid(new):
            if run not in charged and not State(new).forgotten(run):
                charged[run] = _rounds(site, new, run, ALL, _most(site, new, gone, run))
    if personalised:
        _personalised(site, new, personalised)
    if surveys:
        _surveys(site, new, _survey(site, new), surveys)
    if ALL in words:
        _close(site, new)
    return {run: rounds for run, rounds in charged.items() if rounds}


def _rounds(site: Site, new: Path, run: str, word: str, count: int) -> int:
    """Pay for rounds of a run, each as its dearest."""
    if count > _MOST_LOST:
        raise UserError(f"--lost {run}={word}: more than {_MOST_LOST:,} rounds")
    if not (lines := example_lines(new, run)):
        raise UserError(
            f"--lost {run}={word}: the backup has no round of it ({suggestion(run, paid(new))}), so nobody here "
            f"knows what one costs: name the submitter's ledger, {run}=FILE"
        )
    last, event = lines[-1], _dearest(lines)
    _spend(site, new, run, [(last["round"] + turn, event) for turn in range(1, count + 1)], last)
    return count


def _as_submitted(site: Site, new: Path, run: str, file: Path) -> int:
    """Pay for what the submitter's ledger of a run says that this site spent, and its own does not.

    The submitter hears what a site spent by its answers. So each turn after the last in which it heard counts too,
    and one that may have been under way.
    """
    if not file.is_file():
        raise UserError(f"--lost {run}={file}: is neither a number of rounds nor a file")
    every = ledger.verified(file, headless=True)
    told = [line for line in every if line["client"] == site.client and line["unit"] in ("example", "person")]
    if not told:
        raise UserError(
            f"--lost {run}={file}: has no line of client {site.client}: name {run}=ROUNDS, or all if nobody knows"
        )
    have = [Event.from_json(line) for line in example_lines(new, run)]
    events, owed = [Event.from_json(line) for line in told], list[tuple[int, Event]]()
    for line, event in zip(reversed(told), reversed(events), strict=True):  # the last rounds are those that lack
        steps = alike(events, event) - alike([*have, *(more for _, more in owed)], event)
        if steps > 0:
            owed.append((line["round"], replace(event, steps=min(steps, event.steps))))
    heard = max(map(_turn, told))
    unheard = 1 + len({turn for turn in map(_turn, every) if turn > heard})
    more = [(heard[0] + turn, _dearest(told)) for turn in range(1, unheard + 1)]
    _spend(site, new, run, [*reversed(owed), *more], told[-1], _statistic(told))
    return len(owed) + unheard


def _turn(line: Line) -> tuple[int, int]:
    return line["round"], line.get("attempt", 0)


def _most(site: Site, new: Path, gone: Gone, run: str) -> int:
    """The most rounds that a run could pay for, each as its dearest, within what it promised.

    Where its ledger is gone it was held to that from the backup on; what it has now may be of a later start.

    Raises:
        UserError: it promised nothing that would bound them.
    """
    if not (lines := example_lines(new, run)):
        return 0
    words = State(new).introduction(run) or State(site.folder).introduction(run)
    asked = None if words is None else Scenario.model_validate(words["scenario"]).example_privacy
    if asked is None or asked.epsilon is None:
        raise UserError(
            f"--lost all: {run} promised no epsilon that bounds what it spent: write --lost {run}=ROUNDS or "
            f"--lost {run}=FILE beside it"
        )
    known = lines_of(new / _ledger(run))[: gone.get(_ledger(run))]
    had, event = [Event.from_json(line) for line in known], _dearest(lines)
    promised, delta, accountant = asked.epsilon * (1 + 1e-9), asked.delta, asked.accountant

    def fits(rounds: int) -> bool:
        more = replace(event, steps=min(rounds * event.steps, accounting.MAX_STEPS))
        return epsilon(in_sums([*had, more]), delta, accountant) <= promised

    low, high = 0, 1
    while fits(high) and high < _MOST_LOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _dearest(lines: Sequence[Line]) -> Event:
    """The event of a round that costs most by itself, of some lines."""
    rounds = [line for line in lines if STATISTIC not in line] or lines
    events = list(dict.fromkeys(Event.from_json(line) for line in rounds))
    delta, accountant = lines[-1]["delta"], lines[-1]["accountant"]
    return events[0] if len(events) == 1 else max(events, key=lambda e: epsilon([e], delta, accountant))


def _personalised(site: Site, new: Path, steps: int) -> None:
    """Pay for steps of training further, on the dearest terms that are known.

    Raises:
        UserError: none are.
    """
    if (cap := site.privacy) is None:
        return
    known = {
        replace(_alone(Event.from_json(line)), steps=steps): r for r in paid(new) for line in example_lines(new, r)
    }
    if not known:
        raise UserError(
            f"--personalised {steps}: no run is known by whose noise that was: write --lost all, which closes the "
            "account"
        )
    event = max(known, key=lambda e: epsilon([e], cap.delta, cap.accountant))
    _into_account(site, new, known[event], [(0, event)])


def _survey(site: Site, new: Path) -> Event | None:
    """What noised counts or figures cost at most, by the account and the site file; None where none were told."""
    if (cap := site.privacy) is None:
        return None
    lines = lines_of(new / ACCOUNT)
    known = [Event.from_json(line) for line in lines if str(line.get("run")).startswith((SURVEY, FIGURES))]
    known += [surveyed.event(site.survey, cap)] if site.survey is not None else []
    known += [figures.event(site.figures, cap)] if site.figures is not None else []
    return max((replace(e, steps=1) for e in known), key=lambda e: epsilon([e], cap.delta), default=None)


def _surveys(site: Site, new: Path, each: Event | None, count: int) -> None:
    """Pay for surveys.

    Raises:
        UserError: nobody knows what one cost.
    """
    if each is None:
        raise UserError(
            f"--surveys {count}: neither the backup nor the site file says what one cost: write --lost all, which "
            "closes the account"
        )
    _into_account(site, new, f"{SURVEY}lost", [(0, replace(each, steps=count))])


def _close(site: Site, new: Path) -> None:
    """Fill the account to the most that the site allows, so that nothing is paid from it any more."""
    if (cap := site.privacy) is None:
        return
    spent = _account(new).events.get(Own(), ())

    def event(noise: float) -> Event:
        return Event(noise_multiplier=noise, sample_rate=1.0, steps=1, clip_norm=1.0)

    low, high = _NOISE
    while high > 1.002 * low:
        middle = math.sqrt(low * high)
        full = epsilon([*spent, event(middle)], cap.delta, cap.accountant) >= cap.max_epsilon
        low, high = (middle, high) if full else (low, middle)
    _into_account(site, new, _UNKNOWN, [(0, event(low))], closed=True)


def _spend(site: Site, new: Path, run: str, owed: Owed, like: Line, kind: str | None = None) -> None:
    """Put lines into a run's ledger and the account, whatever they come to."""
    owed = list(owed)
    before: tuple[Event, ...] = ()  # turns of banded noise are counted from here: never fewer than they were
    counted: list[tuple[int, Event]] = []
    for round, event in owed:
        counted.append((round, replace(_alone(event), steps=adds(before, event).steps)))
        before = added(before, event)
    _into_account(site, new, run, counted, kind)
    _into_run(site, new, run, owed, like, kind)


def _statistic(lines: Iterable[Line]) -> str | None:
    """The kind of the statistic that a run asked for before its first round; None where it asked for none."""
    return next((str(line[STATISTIC]) for line in lines if STATISTIC in line), None)


def _marked(round: int, kind: str | None) -> dict[str, Any]:
    """The word of a statistic's line, by which a later restore knows it for what it is."""
    return {} if round or kind is None else {STATISTIC: kind}


def _into_account(site: Site, new: Path, run: str, owed: Owed, kind: str | None = None, **more: Any) -> None:
    if (cap := site.privacy) is None:
        return
    book = _account(new)
    for round, event in owed:
        book.spend(
            round,
            {site.client: event},
            **terms_of(cap, run),
            lost=True,
            **_marked(round, kind),
            **more,
            **begun(book),
        )


def _into_run(site: Site, new: Path, run: str, owed: Owed, like: Line, kind: str | None) -> None:
    (folder := new / "runs" / run).mkdir(parents=True, exist_ok=True)
    book = Ledger(folder)
    terms = {key: like[key] for key in ("delta", "unit", "accountant", "person", "honest") if key in like}
    for round, event in owed:
        book.spend(round, {site.client: event}, **terms, lost=True, **_marked(round, kind), **begun(book))


def _account(new: Path) -> Ledger:
    (folder := (new / ACCOUNT).parent).mkdir(parents=True, exist_ok=True)
    return Ledger(folder)
