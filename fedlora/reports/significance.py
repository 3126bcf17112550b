"""Whether configurations differ by more than their seeds do, and which of them no other beats."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FEW = 3  # seeds from which a difference is tested


@dataclass(frozen=True)
class Test:
    """Whether two groups differ in the metric.

    Attributes:
        difference: of the means, group less baseline.
        p: two-sided, Holm's correction included; None where there are too few seeds.
        paired: whether seeds were matched.
    """

    difference: float
    p: float | None
    paired: bool


def p_value(base: Mapping[Any, float], group: Mapping[Any, float]) -> tuple[float | None, bool]:
    """Two-sided p of equal means, and whether seeds were matched; of the metric by seed."""
    from scipy.stats import ttest_ind, ttest_rel

    shared = [seed for seed in base if seed in group]
    paired = len(shared) >= FEW
    if paired:
        one, other = ([values[seed] for seed in shared] for values in (base, group))
        spread_of = [statistics.pstdev(b - a for a, b in zip(one, other, strict=True))]
    else:
        one, other = [*base.values()], [*group.values()]
        if min(len(one), len(other)) < FEW:
            return None, False
        spread_of = [statistics.pstdev(one), statistics.pstdev(other)]
    if not any(spread_of):  # no noise to measure a difference against
        return None, paired
    result = ttest_rel(one, other) if paired else ttest_ind(one, other, equal_var=False)
    return float(result.pvalue), paired


def front(costs: Mapping[str, tuple[float, ...]]) -> set[str]:
    """Those that no other is at least as low as in every cost, and lower in one."""

    def beaten(by: tuple[float, ...], one: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in zip(by, one, strict=True)) and by != one

    return {name for name, cost in costs.items() if not any(beaten(other, cost) for other in costs.values())}
