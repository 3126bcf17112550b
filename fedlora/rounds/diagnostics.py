"""What a round made of the adapter, in figures: of what everybody may know who sees the aggregate.

Of each layer, with s the singular values of its whole change dW and `p = s / sum(s)`

    effective rank       exp(-sum_i p_i log p_i)         (Roy and Vetterli, 2007): 1 of one direction, k of k alike
    noise to signal      sqrt(sum t^2) / || change ||    over the numbers of its tensors in the round's mean change

where t is the standard deviation of the noise in a number (`fedlora.rounds.known_noise`). The change holds that
noise, so of noise alone the ratio is about 1, and far below it where a round learnt. Beside them stands the
`nuclear_norm` of an evaluation (`fedlora.engine.representations`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora import factors
from fedlora.adapter import Change, Layout, Tensor, Update
from fedlora.kinds.contract import Kind
from fedlora.rounds import likeness
from fedlora.rounds.progress import Line

LAYERS, GROUPS = "layers", "groups"
FIGURES = ("effective_rank", "noise_to_signal", "nuclear_norm")
"""Of a round, over all layers."""


def effective_rank(s: NDArray[np.floating]) -> float:
    """Of a matrix with these singular values; 0 where all are zero."""
    if not (total := float(s.sum())) > 0:
        return 0.0
    p = s[s > 1e-12 * s.max()] / total
    return float(np.exp(-(p * np.log(p)).sum()))


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The figures of rounds.

    Attributes:
        layout: of the adapter.
        kind: of the adapter.
    """

    layout: Layout
    kind: Kind

    def of(
        self,
        before: Mapping[str, Tensor],
        mean: Mapping[str, Tensor],
        adapter: Mapping[str, Tensor],
        noise: Mapping[str, float],
        merged: Change | None = None,
    ) -> Line:
        """Means over layers, and by layer under `layers`.

        Args:
            before: what the clients started from.
            mean: what the strategy made of their updates.
            adapter: every tensor after the round.
            noise: standard deviation of the noise in each number of the mean change; empty where it is not known.
            merged: what was folded into the base so far, scaling included.
        """
        layers: dict[str, Line] = {}
        for module, pair in self.kind.change(self.layout, adapter).items():
            parts = [(self.kind.scaling(), *pair)]
            if merged and module in merged:
                parts.append((1.0, *merged[module]))
            layers[module] = {"effective_rank": effective_rank(factors.svd(*factors.stack(parts))[1])}
        squares: dict[str, NDArray[np.float64]] = {}
        for name in sorted(set(noise) & set(mean)):
            change = mean[name].astype(np.float64) - before[name]
            both = np.array([change.size * noise[name] ** 2, float((change**2).sum())])
            module = self.layout[name].module
            squares[module] = squares.get(module, np.zeros(2)) + both
        for module, both in squares.items():
            layers.setdefault(module, {})["noise_to_signal"] = _ratio(both)
        ranks = [told["effective_rank"] for told in layers.values() if "effective_rank" in told]
        return {
            "effective_rank": float(np.mean(ranks)) if ranks else None,
            "noise_to_signal": _ratio(sum(squares.values(), np.zeros(2))) if squares else None,
            LAYERS: layers,
        }

    def alike(self, before: Mapping[str, Tensor], updates: Sequence[Update]) -> Line:
        """Under `groups` the clients that changed the same directions, where each update is of one client.

        Args:
            before: every tensor that clients started from.
            updates: of the round.
        """
        found = likeness.groups(self.kind, self.layout, before, updates)
        return {GROUPS: found} if found else {}


def _ratio(squares: NDArray[np.float64]) -> float | None:
    """The root of noise over change; None where nothing changed."""
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else None
