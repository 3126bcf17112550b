"""FLoRIST (Ramesh et al., 2025, https://arxiv.org/abs/2506.09199): keep the directions that hold the energy.

The average change is decomposed through the stacked thin factors, as in FlexLoRA. Of its directions only
the first p go down to the clients, the fewest with

    S_1^2 + ... + S_p^2  >=  tau (S_1^2 + S_2^2 + ...)

so that the downlink shrinks when the changes are of lower rank than the adapter. Where a client has room
for more than p, the rest of its A is as the seed made it, and of its B zero. p is at most the server's rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedlora import factors
from fedlora.adapter import Adapter, Update, mean_head, names
from fedlora.kinds.averages import shares
from fedlora.strategy import Facts, Strategy


@dataclass(kw_only=True)
class FLoRIST(Strategy):
    """A and B of each client's rank federate; down go the directions that hold the energy of the average."""

    facts: ClassVar[Facts] = Facts(sends="A, B", exact=False)
    unequal_ranks: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("A", "B")

    tau: float = 0.99  # share of the energy to keep, in (0, 1]
    ranks: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # kept of each layer

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a share in (0, 1], not {self.tau}")

    def receives(self, adapter: Adapter, rank: int) -> Adapter:
        """The directions that were kept, as far as the rank goes."""
        cut = super().receives(adapter, rank)
        for module, kept in self.ranks.items():
            b, a = names(self.layout, module)
            cut[b], cut[a] = cut[b][:, :kept], cut[a][:kept]
        return cut

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The change of the least rank that holds the energy."""
        after = mean_head(self.layout, updates)
        for module, parts in shares(self.kind, self.layout, adapter, updates).items():
            b, a = names(self.layout, module)
            u, s, vt = factors.svd(*factors.stack(parts))
            kept = min(self.kind.r, factors.energy_rank(s, self.tau))
            self.ranks[module] = kept
            after[b], after[a] = factors.split(
                u[:, :kept], s[:kept] / self.kind.scaling(), vt[:kept], self.initial[a]
            )
        return after

    def state(self) -> Mapping[str, Any]:
        """The ranks that were kept."""
        return {"ranks": self.ranks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the ranks."""
        self.ranks = dict(state["ranks"])
