"""What epsilon, delta and their unit mean, for a reader who decides about rows and not about models."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fedlora.record import Record

_MANY = 1e6  # from which a factor is written as a power of ten


class Promise(NamedTuple):
    """What a run has spent.

    Attributes:
        epsilon: the largest; None where nothing bounds it.
        delta: beside it.
        unit: `example`, `person` or `client`.
        person: the column that says who is who; None where no unit is a person.
        honest: where clients share noise out for their examples, the share of senders that keep theirs from the
            server; None elsewhere.
        own: epsilon under a client's own part of that noise alone, where it is known.
    """

    epsilon: float | None
    delta: float
    unit: str
    person: str | None = None
    honest: float | None = None
    own: float | None = None

    @property
    def kept(self) -> str:
        """The share of senders that are counted upon, in words; of `honest` clients alone."""
        return "all" if self.honest == 1 else f"{self.honest:.0%}"

    @property
    def sentence(self) -> str:
        """What it bounds, in one sentence without its full stop."""
        what = {"example": "row"}.get(self.unit, self.unit)
        seen = "the models" if self.unit == "client" else "what was sent"
        seen = seen if self.honest is None else "the sums of what was sent"
        if self.epsilon is None:
            return f"nothing bounds how surely {seen} can tell whether a given {what} was used"
        return f"{seen} can raise the odds that a {what} was used at most {factor(self.epsilon)}-fold, delta aside"


def factor(epsilon: float) -> str:
    """`exp(epsilon)` as people read it."""
    if epsilon > math.log(_MANY):
        return f"10^{epsilon / math.log(10):.1f}"
    found = math.exp(epsilon)
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


def promise_of(run: Record) -> Promise | None:
    """What a run has spent so far; None without privacy."""
    asked = run.scenario.get("privacy")
    if not asked:
        return None
    person = asked.get("person")
    unit = "person" if person else str(asked.get("unit", "example"))
    spent = [line["epsilon"] for line in (run.summary, *run.rounds) if line.get("epsilon") is not None]
    told = (max(spent, default=None), float(asked.get("delta") or 0), unit, person)
    return Promise(*told, honest_of(run.scenario), run.summary.get("own_epsilon"))


def honest_of(scenario: Mapping[str, Any]) -> float | None:
    """The share of senders that are counted upon where clients share noise out for their examples; else None."""
    masks, asked = scenario.get("secure_aggregation") or {}, scenario.get("privacy") or {}
    if masks.get("noise") != "shared" or asked.get("unit", "example") != "example":
        return None
    return float(masks.get("honest", 1.0))


def explained(run: Record) -> Iterator[str]:
    """The promise of a private run in plain sentences, a paragraph each: the unit, the number, the exact form."""
    if (told := promise_of(run)) is not None:
        yield from in_words(told, run.scenario.get("secure_aggregation") is not None)


def in_words(told: Promise, masked: bool) -> Iterator[str]:
    """A promise in plain sentences, a paragraph each.

    Args:
        told: the promise.
        masked: whether clients mask what they send.
    """
    epsilon, delta, unit, person, honest, own = told
    if unit == "person":
        yield (
            f"The unit is one person: all rows of one client's training data with the same {person}. Rows of that "
            "person at another client are not among them."
        )
        one, seen = "person", "everything that the clients sent, every model among it, and knows all other rows"
    elif unit == "example":
        yield (
            "The unit is one example: one row of one client's training data. k rows of one person are covered "
            "together at k times epsilon, and at a delta that grows faster than k."
        )
        one, seen = "row", "everything that the clients sent, every model among it, and knows all other rows"
    else:
        but = " and the clients of the same rounds" if masked else ""
        yield (
            "The unit is one client: all rows that it holds. The promise is against everyone but the server"
            f"{but}; what holds against those is in the sentences below."
        )
        one, seen = "client", "every model of the run and knows the rows of all other clients"
    if honest is not None:
        seen = "each round's sum, every model among it, and knows all other rows"
        yield (
            f"Clients share the noise out. The promise is from the server too, if it follows the protocol and "
            f"{told.kept} of those who send keep their part of the noise from it. If all others give theirs away, "
            f"a client's own part remains, and a larger epsilon{f': {own:.2f}' if own is not None else ''}."
        )
    if epsilon is None:
        yield f"No epsilon holds: {told.sentence}."
        return
    yield (
        f"Take one {one}, and an onlooker who sees {seen}. The onlooker can tell whether the {one} was used, or "
        f"counted for nothing, at odds at most exp({epsilon:.2f}) = {factor(epsilon)} times those before. "
        f"Exactly: they say “used” where it was used at most {factor(epsilon)} times as often as where it was "
        f"not, plus delta = {delta:g}."
    )


def not_covered(run: Record, shared: bool) -> Iterator[str]:
    """What epsilon does not cover, a sentence each.

    Args:
        run: with privacy.
        shared: whether the page is one that leaves out what epsilon does not cover.
    """
    asked = run.scenario.get("privacy") or {}
    if shared:
        yield (
            "The figures of the test rows on this page. Test rows are not trained on; they are the server's, and "
            "count as public. Everything else that epsilon does not cover is left out of this page."
        )
    else:
        yield (
            "This page. Sizes and labels of single clients, failures, times, test rows and the seed are shown as "
            "they are. Where rows are real people's, share the page that fedlora report --share writes."
        )
    if asked.get("unit") != "client":
        whom = "persons" if asked.get("person") else "rows"
        yield f"How many {whom} each client holds: by this definition that number is public."
    if "scenario's seed" in str(run.summary.get("privacy")):
        yield (
            "A reader who has the seed. This run was a simulation: its noise follows from the seed, and can be "
            "taken off with it. At sites nobody can draw the noise again."
        )
    if asked.get("share_metrics"):
        yield "Training losses and numbers of examples that clients shared (privacy.share_metrics)."
    yield (
        "Any other run on the same rows, a search for settings included. Each spends its own epsilon, and all of "
        "them add up."
    )
