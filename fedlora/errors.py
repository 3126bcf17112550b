"""Every exception that fedlora raises on purpose.

FedloraError
├── UserError            the input is wrong; one line for each problem, exit code 2
│   ├── ScenarioError    a scenario file or an override is wrong
│   └── SettingError     a setting names something that does not fit the data or the model
├── RoundError           a round ended with too few replies
├── ContractError        a strategy or a client broke its contract
└── Refusal              a site will not do what its server asks
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_LISTED = 60  # names in a line, at most


def counted(count: int, thing: str) -> str:
    """A count and its noun, as `1 client` and `2 clients`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


class FedloraError(Exception):
    """Base of all errors that fedlora raises on purpose."""


class UserError(FedloraError):
    """Something the user gave is wrong; each line says where, what, and what to write instead."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines: Sequence[str] = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ScenarioError(UserError):
    """A scenario, or an override of it, does not describe a run."""


class SettingError(UserError):
    """The value of one scenario key does not work with what it meets; `key` is its dotted path.

    Raised where the file and line are not known; whoever holds the scenario adds them
    (`Scenario.located`).
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.args = (key, message)  # what unpickling calls the class with
        self.key, self.message = key, message


class RoundError(FedloraError):
    """Too few clients of a round replied for it to mean anything."""


class ContractError(FedloraError):
    """A strategy or a client did something that its contract rules out."""


class Refusal(FedloraError):
    """What a site will not do, in words that the server may read: nothing in them comes from its examples.

    `event`, of `fedlora.privacy.accounting`, is what was spent all the same. `own` says more to the site's owner.
    """

    def __init__(self, why: str, event: Any = None, own: str | None = None) -> None:
        super().__init__(why)
        self.event, self.own = event, own or why


def cut(word: object, most: int = 40) -> str:
    """A name or a value as a line shows it: its first characters, where it is long."""
    shown = str(word)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to write instead of `word`: the nearest known name, else a list of those that are known."""
    if not (names := sorted(known)):
        return "there is none"
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {cut(near[0])!r}?"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"known: {', '.join(map(cut, names[:_LISTED]))}{more}"
