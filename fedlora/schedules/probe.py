"""Choice of layers, after DiffoRA (Jiang et al., 2025, https://arxiv.org/abs/2502.08905): a paid probe.

The first round trains all layers and only measures. Of each layer with the change `d` in the round's mean, over
the n numbers that are zero at first, it takes

    score = || d ||^2 / n

and the layers of the largest scores train from round 2 on. The mean is not taken: the adapter begins where it was.
The probe is an ordinary round, clipped, noised and paid as one before clients train, so that the choice is a
function of what was released. The noise has one size in each number, so by expectation it lifts all scores alike;
where it is louder than the signal, the choice is chance.

DiffoRA learns a gate for each layer. A gate has no gradient where B is zero, so here B's own change stands for it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora import plugins
from fedlora.adapter import Tensor
from fedlora.kinds.contract import Kind
from fedlora.schedules.contract import Schedule, Turned


@dataclass(kw_only=True)
class Probe(Schedule):
    """The first round measures all layers, paid as any round, and the share that moves most trains after it."""

    share: float = 0.5

    @property
    def narrows(self) -> bool:
        """After the first round."""
        return True

    def refuses(self, kind: Kind, trained: Collection[str]) -> str | None:
        """Something that trains must be zero at first, or there is no change to measure."""
        if any(kind.counts(role) for role in trained):
            return None
        return f"{plugins.called(type(kind))} trains nothing under this strategy that is zero at first"

    def measures(self, round: int) -> bool:
        """The first."""
        return round == 1

    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """After the first round, the layers that train."""
        if not self.measures(round):
            return Turned({})
        found = self.scores(adapter)
        count = max(1, int(self.share * len(found) + 0.5))
        return Turned({}, layers=sorted(sorted(found, key=lambda module: (-found[module], module))[:count]))

    def scores(self, adapter: Mapping[str, Tensor]) -> dict[str, float]:
        """Of each layer the mean square of its numbers that are zero at first."""
        moved: dict[str, list[Tensor]] = {}
        for name, slot in sorted(self.layout.items()):
            if slot.trainable and self.kind.counts(slot.role):
                moved.setdefault(slot.module, []).append(adapter[name].ravel())
        return {m: float(np.square(np.concatenate(each), dtype=np.float64).mean()) for m, each in moved.items()}
