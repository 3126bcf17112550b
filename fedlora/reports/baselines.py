"""What a run's baselines say of it, in sentences: what privacy costs, and what federating gains."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.errors import UserError
from fedlora.record import Record
from fedlora.reports.tables import spread
from fedlora.scenario.baseline import configuration


@dataclass(frozen=True)
class Measured:
    """A configuration as the sentences see it.

    Attributes:
        label: what it is called.
        kind: of baseline; None for a run that is none.
        of: its configuration, or the one that it is a baseline of.
        by_seed: the metric at the end, by seed.
        epsilon: the largest that it spent; None without privacy.
        ends: the least and the most of its clients' own models, where they were judged one by one.
    """

    label: str
    kind: str | None
    of: str
    by_seed: Mapping[int, float]
    epsilon: float | None = None
    ends: tuple[float, float] | None = None


def kind_of(run: Record) -> str | None:
    """The kind of baseline that a run is; None if it is none."""
    told = run.scenario.get("baseline")
    return str(told.get("kind")) if isinstance(told, dict) else None


def of(run: Record) -> str:
    """The configuration that a run is of, or is a baseline of."""
    told = run.scenario.get("baseline")
    return str(told.get("of")) if isinstance(told, dict) else configuration(run.scenario)


def beside(run: Record) -> list[Record]:
    """The baselines of a run, for its seed, in the folder that it lies in."""
    if kind_of(run) is not None:
        return []
    found = []
    for file in sorted(run.folder.resolve().parent.glob("*/scenario.yaml")):
        try:
            if "\nbaseline:\n" in file.read_text(encoding="utf-8"):
                other = Record.open(file.parent)
                if (of(other), other.scenario.get("seed")) == (of(run), run.scenario.get("seed")):
                    found.append(other)
        except (OSError, ValueError, UserError):
            continue  # a damaged neighbour says nothing of this run
    return found


def sentences(measured: Sequence[Measured], metric: str, higher_is_better: bool) -> list[str]:
    """What the baselines among some configurations say of the others, which they are baselines of."""
    wholes = [m for m in measured if m.kind is None and any(m.of == b.of for b in measured if b.kind)]
    said = []
    for whole in wholes:
        before = f"{whole.label}: " if len(wholes) > 1 else ""
        best: dict[str, Measured] = {}  # one that was tuned is the harder to beat
        for one in measured:
            if one.kind is not None and one.of == whole.of and one.by_seed:
                if one.kind not in best or _lead(one, best[one.kind], higher_is_better) > 0:
                    best[one.kind] = one
        said += [f"{before}{told}" for told in _of(whole, best, metric, higher_is_better)]
    return said


def _of(whole: Measured, best: Mapping[str, Measured], metric: str, higher: bool) -> Iterator[str]:
    for one in best.values():
        if not set(one.by_seed) & set(whole.by_seed):
            yield f"{one.label} and {whole.label} share no seed, so they are not compared."
    known = {kind: one for kind, one in best.items() if set(one.by_seed) & set(whole.by_seed)}
    pooled, private, alone = (known.get(kind) for kind in ("pooled", "pooled_private", "alone"))

    def apart(what: str, one: Measured, other: Measured) -> str:
        """`what 0.0100 in accuracy: one has 0.7100, and other 0.7000`, the means of the seeds that both have."""
        seeds = [seed for seed in one.by_seed if seed in other.by_seed]
        sign = 1 if higher else -1
        gap = spread([sign * (one.by_seed[seed] - other.by_seed[seed]) for seed in seeds])
        many = f" over {len(seeds)} seeds" if len(seeds) > 1 else ""
        means = [statistics.fmean(m.by_seed[seed] for seed in seeds) for m in (one, other)]
        what = what.format(f"{gap} in {metric}{many}")
        return f"{what}: {one.label} has {means[0]:.4f}, and {other.label} {means[1]:.4f}"

    if pooled is not None:
        price = (
            "Federating costs {}"
            if whole.epsilon is None
            else f"Privacy at epsilon {whole.epsilon:.2f} costs {{}}"
        )
        yield f"{apart(price, pooled, whole)}."
    if private is not None:
        yield f"{apart('Trusting no single place with the rows costs {}', private, whole)}."
    if alone is not None:
        told = apart("Federating gains {} over training alone", whole, alone)
        spanned = f", from {alone.ends[0]:.4f} to {alone.ends[1]:.4f} by client" if alone.ends else ""
        yield f"{told} on average{spanned}."


def _lead(one: Measured, other: Measured, higher: bool) -> float:
    """How much better the first is on average."""
    means = [statistics.fmean(m.by_seed.values()) for m in (one, other)]
    return (means[0] - means[1]) * (1 if higher else -1)


def ends(runs: Sequence[Record], metric: str) -> tuple[float, float] | None:
    """The least and the most of the clients' own models of some runs; None where one did not judge them."""
    found = [[run.summary.get(f"{metric}_{end}") for end in ("least", "most")] for run in runs]
    known = [(least, most) for least, most in found if least is not None and most is not None]
    return (min(least for least, _ in known), max(most for _, most in known)) if len(known) == len(runs) else None
