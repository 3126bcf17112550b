"""What an epsilon means in words: for whom, from whom, and what it takes for granted."""

import math
from collections.abc import Iterable

from fedlora.privacy.accounting import Accountant

_WORDS = {
    "pld": "privacy loss distributions (dp-accounting)",
    "prv": "privacy random variables (Opacus)",
    "rdp": "Renyi DP (dp-accounting)",
}
FROM_SERVER = "client_from_server"  # the unit of what the noise that clients share out promises each of them
FROM_CLIENTS = "client_from_clients"  # of what is promised from others of a round, who are told how many it has
IN_SUMS = {"example": "example_in_sums", "person": "person_in_sums"}  # of what shared noise promises each of these
OWN_ALONE = ", under its client's own part of the noise alone"  # after what holds where all others collude

_NEIGHBOURS = {
    "example": "neighbouring datasets differ in one example, which counts for nothing in one of them (zero-out: "
    "how many examples a client holds is public)",
    "person": "neighbouring datasets differ in all rows of one person, who counts for nothing in one of them "
    "(zero-out: how many persons a client holds is public)",
    "client": "neighbouring datasets differ in one client, whose change counts for nothing in one of them "
    "(zero-out: how many clients there are is public)",
    FROM_SERVER: "from the server, which follows the protocol and sees each round's sum and who is in it; "
    "neighbouring runs differ in that one client sends nothing",
    **{
        unit: "from all who see sums and models, the server among them, which follows the protocol; neighbouring "
        f"datasets differ in {one} in one of them (zero-out: how many {few}s a client holds is public)"
        for unit, few, one in (
            (IN_SUMS["example"], "example", "one example, which counts for nothing"),
            (IN_SUMS["person"], "person", "all rows of one person, who counts for nothing"),
        )
    },
    FROM_CLIENTS: "from another client that is in the same rounds, which knows how many are and not who; "
    "neighbouring runs differ in that one client sends nothing",
}


def protected(unit: str, person: str | None = None) -> str:
    """What it is that a unit protects: an example, a person, by the column that tells them, or a client."""
    unit = next((own for own, summed in IN_SUMS.items() if summed == unit), unit)
    if unit == "person" and person:
        return f"person (all rows with the same {person})"
    return "client" if unit in (FROM_SERVER, FROM_CLIENTS) else unit


def neighbours(unit: str) -> str:
    """What cannot be told apart under an epsilon, and from whom where that is not from everybody."""
    return _NEIGHBOURS[unit]


def named(bands: Iterable[int | str]) -> str:
    """The bands of noise in words; empty where noise is independent."""
    told = sorted(set(bands), key=lambda b: (isinstance(b, str), b))
    if not told or told == [1]:
        return ""
    return f"banded noise, b = {' or '.join(map(str, told))}"


def assumed(unit: str, honest: float = 1.0, bands: Iterable[int | str] = ()) -> str:
    """What an epsilon takes for granted; the arguments as in `terms`."""
    if unit == FROM_SERVER:
        return (
            f"no sampling, that of those who sent {honest:.0%} keep their noise to themselves, and that rounded "
            "noise adds up to a Gaussian"
        )
    if unit == FROM_CLIENTS:
        return "no sampling"
    if own := next((own for own, summed in IN_SUMS.items() if summed == unit), None):
        return (
            f"Poisson sampling of {own}s, that of those who sent {honest:.0%} keep their noise to themselves, and "
            "that rounded noise adds up to a Gaussian"
        )
    turns = named(bands)
    return f"{'cyclic ' * bool(turns)}Poisson sampling of {unit}s{' and ' * bool(turns)}{turns}"


def terms(unit: str, accountant: Accountant, honest: float = 1.0, bands: Iterable[int | str] = ()) -> str:
    """Under which neighbouring relation, by which accountant and sampling an epsilon holds.

    Args:
        unit: `example`, `person`, `client`, `FROM_SERVER`, `FROM_CLIENTS` or one of `IN_SUMS`.
        accountant: that gave it.
        honest: share of the clients in a sum whose noise the server does not learn; for `FROM_SERVER`, `IN_SUMS`.
        bands: of the noise of all clients.
    """
    largest = "the largest over clients, " if unit not in ("client", FROM_CLIENTS) else ""
    return f"{neighbours(unit)}; {largest}by {_WORDS[accountant]}, assuming {assumed(unit, honest, bands)}"


def statement(
    epsilon: float,
    delta: float,
    unit: str,
    accountant: Accountant,
    honest: float = 1.0,
    bands: Iterable[int | str] = (),
    person: str | None = None,
) -> str:
    """What an epsilon means, in one sentence; the arguments as in `terms` and `protected`."""
    said = terms(unit, accountant, honest, bands)
    if not math.isfinite(epsilon):
        return f"no epsilon bounds what is lost at delta {delta:g}, for each {protected(unit, person)}, {said}"
    return f"({epsilon:.3g}, {delta:g})-differential privacy for each {protected(unit, person)}, {said}"
