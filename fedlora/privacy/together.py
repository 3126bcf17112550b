"""What runs on the same rows spent together."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.privacy import accounting, ledger, wording


def total_epsilon(folders: Sequence[Path]) -> dict[str, tuple[float, str]]:
    """What the runs in some folders spent together, by the unit that is protected, and what it means in words.

    Those that were stopped early or failed spent as well; those without privacy are passed over.
    """
    spent: dict[str, list[list[list[accounting.Event]]]] = {}
    deltas: dict[str, list[float]] = {}
    bands: dict[str, set[int]] = {}
    honest = 1.0  # the least that any of them takes for granted
    for file in (folder / "privacy.jsonl" for folder in folders):
        if not file.exists():
            continue
        events, person = ledger.replay(file), ""
        lines = ledger.read(file, torn=True)
        for line in lines:
            honest, person = min(honest, line.get("honest", 1.0)), person or line.get("person", "")
        for own in sorted({*map(ledger.unit, events)}):
            told = "person" if person and own == "example" else own
            mine = [e for holder, e in events.items() if ledger.unit(holder) == own]
            ways = {told: mine}
            if any(event.sharers > 1 for each in mine for event in each):
                ways[wording.IN_SUMS[told]] = [[*accounting.in_sums(each)] for each in mine]
            for way, by_holder in ways.items():
                unit = f"{way} {person}" if told == "person" else way
                deltas.setdefault(unit, []).extend(line["delta"] for line in lines if line["unit"] == told)
                bands.setdefault(unit, set()).update(ledger.bands_of(events, told))
                spent.setdefault(unit, []).append(by_holder)
    found = {}
    several = len({*map(_protected, spent)}) > 1
    for key, runs in spent.items():
        unit, _, person = key.partition(" ")
        others = " of these" if several else ""
        delta = min(deltas[key])
        value = accounting.epsilon_of_runs(runs, delta)
        many = "one run gives" if len(runs) == 1 else f"{len(runs)} runs together give"
        found[key if several else unit] = (
            value,
            f"{many} ({value:.3g}, {delta:g})-differential privacy for each "
            f"{wording.protected(unit, person)}, as if "
            f"it had been in every run{others} with whoever spent most there; {wording.neighbours(unit)}; by "
            f"Renyi DP, assuming {wording.assumed(unit, honest, bands.get(key, ()))}"
            + (wording.OWN_ALONE if wording.IN_SUMS.get(unit, "") in {k.partition(" ")[0] for k in spent} else "")
            + ("; what the other runs add, which protect another unit, is not in it" if several else ""),
        )
    return found


def _protected(key: str) -> str:
    """What a key of `total_epsilon` is about: the server's own view of clients is about clients, too."""
    unit, _, person = key.partition(" ")
    return wording.protected(unit, person)
