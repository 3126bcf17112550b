"""Nested ranks, after Maestro (Horvath et al., 2023, https://arxiv.org/abs/2308.14929): a model for each prefix.

Columns of B are ordered. A client trains the first r_k of them, as its device can; each column is averaged over
the clients that trained it (`fedlora.schedules.levels`), by their weights:

    b_j = sum_(k: r_k >= j) w_k (s_k / s) b_kj / sum_(k: r_k >= j) w_k

So all clients meet in the first columns, and the change cut to any rank r is what devices of that rank trained:
one run gives a model for each of them, evaluated at its end. A column that few clients hold carries more noise,
which the cut models do not have. Maestro also drops columns at random inside a client; here a client trains all it
holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import Tensor
from fedlora.schedules.contract import Schedule, Turned


@dataclass(kw_only=True)
class Nested(Schedule):
    """Clients train the first columns that their rank holds, each averaged over those who do: a model a rank."""

    @property
    def unequal(self) -> bool:
        """It is made for them."""
        return True

    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """Nothing more."""
        return Turned({})
