"""Banded noise taken apart: `C e` of a client's updates e, in which the noise of each step is fresh again.

What a client sends stands for `e = g + s x` with `C x = Z` (`fedlora.privacy.mechanisms.bands`). So with one step
a round `C e = C g + s Z`: a sum that was settled before `Z_t` was drawn, and independent noise of the stated size.
It takes the b - 1 updates before. Noise of other bands than are stated stays correlated, and is accused of that.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.audit.noise import Seen

Change = NDArray[np.float32]


class Apart:
    """The last updates of each client, as many as take the next one's noise apart."""

    def __init__(self) -> None:
        self._before: dict[int, list[tuple[int, Any, Change]]] = {}  # number of the step, its terms, what was sent

    def of(self, seen: Seen, change: Change) -> Change | None:
        """What an update stands for, with its noise taken apart.

        Args:
            seen: the update.
            change: what it stands for, over all tensors, (numbers,).

        Returns:
            The same of `C e`; None where a round took several steps, or an update before it is missing, or of
            other tensors.
        """
        if seen.bands == 1:
            return change
        if seen.steps != 1:
            return None
        before, terms = (
            self._before.setdefault(seen.client, []),
            (seen.names, seen.sizes, seen.noise, seen.coefficients),
        )
        before.append((seen.first, terms, change))
        del before[: -seen.bands]
        needed = min(seen.bands, seen.first + 1)
        found = [
            e for n, (step, other, e) in enumerate(reversed(before)) if (step, other) == (seen.first - n, terms)
        ]
        if len(found) < needed:
            return None
        whole = sum(np.float32(c) * e for c, e in zip(seen.coefficients, found, strict=False))
        return np.asarray(whole, np.float32)


def turned(seen: Seen, turn: int) -> int:
    """How many of an update's steps were the turn of a group."""
    return sum(step % seen.bands == turn for step in range(seen.first, seen.first + seen.steps))


def reached(seen: Seen) -> Seen:
    """The update as one of `C e`: each gradient counts in b of them."""
    return replace(seen, reach=sum(seen.coefficients))
