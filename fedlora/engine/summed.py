"""A statistic under masks: what each client sends is a vector of the grid, and the server learns their sum alone.

Of L matrices in a statistic an example adds at most `1 / sqrt(L)` to each (`fedlora.passes.statistic`). So a
number of a client's sum is at most `bound = U / sqrt(L)` large, where U is a power of two that no client holds
more examples, or persons, than. Client k sends, rounded at random to whole steps of `fedlora.privacy.grid`,

    cut(s_k, bound) + noise,    cut to `bound` and ten deviations of the noise

- Cutting numbers brings no two sums further apart. So one example moves what is noised by at most 1, whatever the
  server says of U; what is too small a U cuts away is lost, and nothing else.
- Where each client adds all of the noise, what comes after it costs nothing: rounding and masks.
- Where clients share it out, each adds N(0, sigma^2 / K), as in `fedlora.privacy.mechanisms.shared`: the rounded
  parts of K senders sum to the whole if the grid has eight steps to a deviation of each.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.engine.replies import Report, Said, Sums
from fedlora.errors import RoundError, SettingError
from fedlora.privacy import grid, secure
from fedlora.privacy.accounting import Event
from fedlora.privacy.collector import collect
from fedlora.privacy.mechanisms.shared import TAIL
from fedlora.privacy.mechanisms.statistic import flat, numbers, unflat
from fedlora.privacy.noise import Stream
from fedlora.scenario import SecureAggregation

UNITS = "units"  # in the words to sites: U

Shapes = Mapping[str, tuple[int, ...]]


def no_fewer(units: int) -> int:
    """U: so rough that it says little of who holds most."""
    return 1 << max(units - 1, 0).bit_length()


def size(shapes: Shapes) -> int:
    """Numbers of a vector."""
    return sum(map(numbers, shapes.values()))


@dataclass(frozen=True)
class Span:
    """Which numbers the vectors of a statistic may have.

    Attributes:
        units: U.
        shapes: of the sums, by name: symmetric (in, in), or (in,).
        event: that a client pays; None: nothing is noised.
    """

    units: int
    shapes: Shapes
    event: Event | None

    @property
    def noise(self) -> float:
        """Standard deviation of what one client adds."""
        return 0.0 if self.event is None else self.event.noise_multiplier

    @property
    def bound(self) -> float:
        """The largest number without noise."""
        return self.units / math.sqrt(len(self.shapes))

    @property
    def largest(self) -> float:
        """The largest number."""
        return self.bound + TAIL * self.noise

    def check_grid(self) -> None:
        """Make sure that the grid is fine enough for a part of the noise.

        Raises:
            SettingError: it is not.
        """
        if self.event is None or self.event.sharers <= 1:
            return
        steps = self.noise / math.sqrt(2) / self.largest * 2 ** (grid.BITS - 1)  # beside a diagonal
        if steps < grid.FINE:
            raise SettingError(
                "secure_aggregation.noise",
                f"a part of the noise is {steps:.2g} steps of the grid where a client holds up to {self.units}, "
                f"and {grid.FINE:g} are needed: lower statistics.epsilon, or take noise: server",
            )

    def cut(self, sums: Sums) -> Sums:
        """A client's sums before they are noised."""
        return {name: np.clip(values, -self.bound, self.bound) for name, values in sums.items()}

    def vector(self, noised: Sums, rounding: Stream) -> grid.Vector:
        """The same with noise, in whole steps, in the order of names."""
        values = np.concatenate([flat(noised[name]) for name in sorted(self.shapes)])
        return grid.quantise(np.clip(values, -self.largest, self.largest), self.largest, rounding)

    def sums(self, total: grid.Vector, sent: int) -> Sums:
        """What a sum of vectors stands for.

        Args:
            total: of them.
            sent: how many they are.

        Raises:
            RoundError: it is no sum of theirs: somebody's shares or masks were wrong.
        """
        values: NDArray[np.float64] = grid.dequantise(total, self.largest)
        if np.abs(values).max(initial=0.0) > self.largest * sent * (1 + 1e-6):
            raise RoundError("the masks did not come off the sum: a client's shares were wrong")
        ends = np.cumsum([numbers(self.shapes[name]) for name in sorted(self.shapes)])
        parts = np.split(values, ends[:-1])
        return {n: unflat(part, self.shapes[n]) for n, part in zip(sorted(self.shapes), parts, strict=True)}


def said(
    exchange: secure.Exchange,
    reports: dict[int, Report],
    asked: SecureAggregation,
    rng: Stream,
    span: Callable[[int], Span],
) -> Iterator[Said]:
    """What became of each client; the first of those who sent has the sum of all of them.

    Args:
        exchange: with clients, which keeps their reports.
        reports: of each client that is asked.
        asked: the scenario's.
        rng: draws pseudonyms.
        span: of the vectors, by how many were asked for one.

    Raises:
        RoundError: too few stayed; it comes last, as what clients paid counts all the same.
    """
    failed: RoundError | None = None
    whole: dict[str, Any] = {}
    first = -1
    try:
        made = collect(exchange, sorted(reports), rng, asked.survivors)
        of, first, sent = span(len(made.members)), made.sent[0], len(made.sent)
        whole = {"sums": of.sums(made.total, sent), "clients": sent, "deviation": of.noise * math.sqrt(sent)}
        whole["units"] = sum(reports[client].num_examples for client in made.sent)
        reports |= {c: replace(reports[c], error=None) for c in made.sent}  # one may have gone after it had sent
    except RoundError as error:
        failed = error
    for client, report in sorted(reports.items()):
        paid = Said(client=client, event=report.event, again=report.again, bytes_up=report.bytes_up)
        yield replace(paid, **whole) if client == first else paid
    if failed is not None:
        raise failed
