"""What runs on the same rows spent together."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.privacy import accounting, ledger


def total_epsilon(folders: Sequence[Path]) -> dict[str, tuple[float, str]]:
    """What the runs in some folders spent together, by the unit that is protected, and what it means in words.

    Those that were stopped early or failed spent as well; those without privacy are passed over.
    """
    spent: dict[str, list[list[list[accounting.Event]]]] = {}
    deltas: dict[str, list[float]] = {}
    bands: dict[str, set[int]] = {}
    persons: dict[str, None] = {}  # the columns that tell them
    honest = 1.0  # the least that any of them takes for granted
    for file in (folder / "privacy.jsonl" for folder in folders):
        if not file.exists():
            continue
        events, people = ledger.replay(file), False
        for line in ledger.read(file, torn=True):
            deltas.setdefault(line["unit"], []).append(line["delta"])
            honest, people = min(honest, line.get("honest", 1.0)), people or line["unit"] == "person"
            persons |= {line["person"]: None} if "person" in line else {}
        for own in sorted({*map(ledger.unit, events)}):
            unit = "person" if people and own == "example" else own
            bands.setdefault(unit, set()).update(ledger.bands_of(events, unit))
            spent.setdefault(unit, []).append([e for holder, e in events.items() if ledger.unit(holder) == own])
    found = {}
    for unit, runs in spent.items():
        delta = min(deltas[unit])
        value = accounting.epsilon_of_runs(runs, delta)
        many = "one run gives" if len(runs) == 1 else f"{len(runs)} runs together give"
        found[unit] = (
            value,
            f"{many} ({value:.3g}, {delta:g})-differential privacy for each "
            f"{accounting.protected(unit, ' or '.join(persons))}, as if "
            f"it had been in every run with whoever spent most there; {accounting.neighbours(unit)}; by Renyi DP, "
            f"assuming {accounting.assumed(unit, honest, bands.get(unit, ()))}",
        )
    return found
